"""Loads a model, or makes a fresh one, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from dllm.errors import CheckpointError, OptionError, did_you_mean
from dllm.pipelines.llada.embedded import resolve
from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig, is_mixture
from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig
from dllm.pipelines.llada.presets import PRESETS


def best_device() -> torch.device:
    """cuda, mps or cpu: the first that is there."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_model(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """A checkpoint's model in evaluation mode, from safetensors alone.

    Args:
        name_or_path: a folder, a hub id, or `builtin:NAME`.
        **kwargs: passed to `from_pretrained` (dtype, device_map, attn_implementation, ...).

    Raises:
        CheckpointError: there is no such checkpoint, it is not LLaDA's, or it cannot be read.
    """
    path = resolve(name_or_path)
    config = load_config(name_or_path)
    try:
        return AutoModelForMaskedLM.from_pretrained(path, config=config, use_safetensors=True, **kwargs).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The weights of {name_or_path!r} could not be loaded: {_first_line(error)}") from error


def load_config(name_or_path: str) -> LLaDAConfig | LLaDAMoEConfig:
    """A checkpoint's configuration.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not LLaDA's.
    """
    path = resolve(name_or_path)
    local = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or "[" in path
    if looks_local and not local.is_dir():
        presets = f" or a preset to pretrain from ({', '.join(PRESETS)})" if path.count("/") == 0 else ""
        raise CheckpointError(
            f"There is no model folder {name_or_path!r} (taken from {Path.cwd()}). Give the folder of a checkpoint, a hub id "
            f"such as GSAI-ML/LLaDA-8B-Instruct, builtin:sudoku9{presets}."
        )
    if local.is_dir() and not (local / "config.json").exists():
        raise CheckpointError(f"The folder {name_or_path!r} has no config.json: it is not a checkpoint.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name_or_path!r} is no folder here, and the hub gave no configuration for it: {_first_line(error)}"
            if not local.is_dir()
            else f"The configuration of {name_or_path!r} cannot be read: {_first_line(error)}"
        ) from error
    if not isinstance(config, LLaDAConfig | LLaDAMoEConfig):
        raise CheckpointError(
            f"{name_or_path!r} is a {config.model_type!r} model; dllm loads LLaDA checkpoints (model_type 'llada')."
        )
    return config


def fresh_model(
    name_or_path: str, tokenizer: PreTrainedTokenizerBase, overrides: str | None = None, max_length: int | None = None
) -> PreTrainedModel:
    """A model with random weights, in fp32.

    Args:
        name_or_path: a preset, or a checkpoint whose configuration it takes.
        tokenizer: gives a preset its vocabulary and special ids.
        overrides: changes such as "n_layers=8,d_model=192".
        max_length: the context must hold at least this many tokens; a preset's grows to it.

    Raises:
        CheckpointError: no such preset or checkpoint.
        OptionError: an override that does not exist or does not fit.
    """
    if name_or_path in PRESETS:
        ids = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "bos", "eos", "pad")
        }  # fmt: skip
        settings = {**PRESETS[name_or_path], "vocab_size": len(tokenizer), **ids}
        longest = "max_position_embeddings" if is_mixture(settings) else "max_sequence_length"
        settings[longest] = max(settings[longest], max_length or 0)
    else:
        settings = load_config(name_or_path).to_dict()
    kind = LLaDAMoEConfig if is_mixture(settings) else LLaDAConfig
    settings = {**settings, **_read_overrides(overrides, kind().to_dict())}
    settings.pop("dtype", None)
    model = AutoModelForMaskedLM.from_config(kind(**settings), dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    return model


def _read_overrides(text: str | None, known: Collection[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise OptionError(f"config_overrides {part!r}: there is no key {key!r}.{did_you_mean(key, known)}")
        try:
            out[key] = (
                {"true": True, "false": False}.get(value.lower())
                if value.lower() in ("true", "false")
                else (float(value) if any(c in value for c in ".e") else int(value))
            )
        except ValueError as error:
            raise OptionError(f"config_overrides {part!r}: write it as {key}=NUMBER.") from error
        if not equals:
            raise OptionError(f"config_overrides {part!r}: write it as {key}=NUMBER.")
    return out


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
