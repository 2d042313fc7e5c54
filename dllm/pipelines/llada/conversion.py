"""Writes a checkpoint anew: in another dtype, in shards of another size, with an adapter merged into it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from dllm.errors import CheckpointError, MissingExtraError, OptionError
from dllm.pipelines.llada.loading import load_model
from dllm.pipelines.llada.tokenizer import load_tokenizer


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
        dtype: of the written weights; "auto" keeps theirs.
        max_shard_size: such as "5GB"; a model that is larger becomes several files and an index.
        adapter: a folder or hub id of a LoRA adapter to merge (needs the extra `peft`).

    Raises:
        OptionError: the output folder is not empty.
        CheckpointError: the checkpoint or the adapter cannot be read.
        MissingExtraError: peft is needed and not installed.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OptionError(f"{output} is not empty: name a folder that does not exist.")
    model = load_model(name_or_path, dtype=dtype)
    try:
        tokenizer = load_tokenizer(name_or_path)
    except CheckpointError as error:
        warnings.warn(f"Only the model is written: {error}", stacklevel=2)
        tokenizer = None
    if adapter is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise MissingExtraError("peft", "peft", "Merging an adapter") from error
        try:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The adapter {adapter!r} could not be merged into {name_or_path!r}: {error}"
            ) from error
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
