"""Low-rank adapters: their files, and how one is put onto a model.

An adapter is a folder as peft writes it: `adapter_config.json`, which names the base model, and `adapter_model.safetensors`.
Where the base was quantised in training, `base_quantization.json` beside them says how (peft keeps no note of it).
Source: Hu et al., LoRA, arXiv:2106.09685; Dettmers et al., QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from torch import nn

SETTINGS, TENSORS, QUANTISATION = "adapter_config.json", "adapter_model.safetensors", "base_quantization.json"


def import_peft(purpose: str) -> Any:
    """The package peft.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "peft", purpose) from error
    return peft


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    return (folder / SETTINGS).is_file() and not (folder / "config.json").exists()


def read_settings(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        settings.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / SETTINGS} cannot be read: copy it again. ({error})") from error
    return settings


def base_of(folder: Path) -> str:
    """The name of the model that an adapter changes: a folder, a hub id or `builtin:NAME`.

    Raises:
        CheckpointError: the adapter names none, or a folder that is not there.
    """
    name = read_settings(folder).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder / SETTINGS} does not say which model the adapter changes: write base_model_name_or_path into it."
        )
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise CheckpointError(
            f"The adapter {str(folder)!r} changes the model in {name!r}, and there is no such folder: write where it is now as "
            f"base_model_name_or_path into {folder / SETTINGS}."
        )
    return str(name)


def read_quantisation(folder: Path) -> dict[str, Any] | None:
    """How the base was quantised while the adapter was trained, as transformers' BitsAndBytesConfig has it; None if not."""
    path = folder / QUANTISATION
    if not path.is_file():
        return None
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def attach(model: nn.Module, folder: Path, *, trainable: bool = False) -> Any:
    """The model with an adapter on it, as peft's PeftModel; the model itself is changed too.

    Raises:
        CheckpointError: the adapter is pickled, damaged, lacks tensors, or does not fit the model.
        MissingExtraError: peft is not installed.
    """
    peft = import_peft("An adapter")
    try:
        if not (folder / TENSORS).exists():
            raise ValueError(f"it holds no {TENSORS}, and dllm reads no pickles")
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # what is missing would count as nothing
            return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, TypeError, UserWarning) as error:
        raise CheckpointError(
            f"{str(folder)!r} does not fit the model: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error


def merged(adapted: Any) -> Any:
    """The model of a PeftModel with the adapter's products added to its weights, each rounded once to their dtype.

    Raises:
        CheckpointError: a product is not finite.
    """
    try:
        with quiet():
            return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)  # peft froze it
    except ValueError as error:
        raise CheckpointError(f"The adapter could not be merged: {str(error).splitlines()[0]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that peft causes and nobody can act upon."""
    with warnings.catch_warnings():
        # peft reads attributes that transformers has renamed
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".gradient_checkpointing_enable.", category=FutureWarning)
        yield
