"""Writes a checkpoint anew: in another dtype, in shards of another size, with an adapter merged into it."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from dllm.errors import CheckpointError, MissingExtraError, OptionError
from dllm.pipelines.llada.loading import load_model
from dllm.pipelines.llada.tokenizer import load_tokenizer

ADAPTER = "adapter_model.safetensors"


def convert(
    name_or_path: str,
    output_dir: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    adapter: str | None = None,
) -> Path:
    """Loads a checkpoint and saves it with its tokenizer, in the public tensor names.

    The folder appears under its name once it is whole; until then it is `NAME.partial`.

    Args:
        name_or_path: a folder, a hub id or `builtin:NAME`.
        output_dir: a folder that does not exist or is empty.
        dtype: of the written weights; "auto" takes what config.json says.
        max_shard_size: such as "5GB"; a model that is larger becomes several files and an index.
        adapter: a folder or hub id of a LoRA adapter to merge (needs the extra `peft`).

    Raises:
        OptionError: the output folder is not empty, or a dtype or shard size that does not exist.
        CheckpointError: the checkpoint or the adapter cannot be read.
        MissingExtraError: peft is needed and not installed.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OptionError(f"{output} is not empty: name a folder that does not exist.")
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", max_shard_size):
        raise OptionError(f"max_shard_size {max_shard_size!r}: write a number and KB, MB, GB or TB, such as 5GB.")
    model = load_model(name_or_path, dtype=dtype)
    try:
        tokenizer = load_tokenizer(name_or_path)
    except CheckpointError as error:
        warnings.warn(f"Only the model is written: {error}", stacklevel=2)
        tokenizer = None
    if adapter is not None:
        model = _merged(model, name_or_path, adapter)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output.exists():
        output.rmdir()
    return partial.rename(output)


def _merged(model: PreTrainedModel, name_or_path: str, adapter: str) -> PreTrainedModel:
    """The model with the adapter's products added to its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError("peft", "peft", "Merging an adapter") from error
    try:
        folder = Path(adapter).expanduser()
        if not folder.is_dir():
            # these two files alone: peft would take a pickle where there is no safetensors file
            folder = Path(snapshot_download(adapter, allow_patterns=["adapter_config.json", ADAPTER]))
        if not (folder / ADAPTER).exists():
            raise ValueError(f"it holds no {ADAPTER}, and dllm reads no pickles")
        with warnings.catch_warnings():
            # what is missing would be merged as nothing
            warnings.filterwarnings("error", message=".*missing adapter keys")
            # peft reads an attribute that transformers has renamed
            warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, UserWarning) as error:
        raise CheckpointError(
            f"The adapter {adapter!r} could not be merged into {name_or_path!r}: {str(error).splitlines()[0]}"
        ) from error
