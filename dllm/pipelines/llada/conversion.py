"""Writes a checkpoint anew: in another dtype, in shards of another size, with an adapter merged into it."""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import BitsAndBytesConfig, PreTrainedModel

from dllm.errors import CheckpointError, OptionError
from dllm.layers.adapters import attach, base_of, import_peft, merged, read_quantisation
from dllm.pipelines.llada.checkpoint_files import check_free, check_shard_size, hub_folder, written_whole
from dllm.pipelines.llada.embedded import resolve
from dllm.pipelines.llada.loading import adapter_folder, load_model
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

    The name may be an adapter's, which is merged into its own base. Where a base was quantised in training (QLoRA), the adapter
    has learnt upon rounded weights: it is merged into those, unpacked, and a warning says so.

    The folder appears under its name once it is whole; until then it is `NAME.partial`.

    Args:
        name_or_path: a folder, a hub id or `builtin:NAME`; of a checkpoint or an adapter.
        output_dir: a folder that does not exist or is empty.
        dtype: of the written weights; "auto" takes what config.json says.
        max_shard_size: such as "5GB"; a model that is larger becomes several files and an index.
        adapter: a folder or hub id of a LoRA adapter to merge (needs the extra `peft`).

    Raises:
        OptionError: the output folder is not empty or cannot be written, or a dtype or shard size that does not exist.
        CheckpointError: the checkpoint or the adapter cannot be read.
        MissingExtraError: peft is needed and not installed.
    """
    output = Path(output_dir)
    check_free(output)
    check_shard_size(max_shard_size)
    own = adapter_folder(name_or_path)
    if own is not None and adapter is not None:
        raise OptionError(f"{name_or_path!r} is an adapter itself: leave the other adapter, {adapter!r}, out.")
    if own is not None:
        model = _merged(base_of(own), name_or_path, dtype)
    elif adapter is not None:
        model = _merged(name_or_path, adapter, dtype)
    else:
        model = load_model(name_or_path, dtype=dtype)
    try:
        tokenizer = load_tokenizer(name_or_path)
    except CheckpointError as error:
        warnings.warn(f"Only the model is written: {error}", stacklevel=2)
        tokenizer = None
    with written_whole(output, model) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return output


def _merged(name_or_path: str, adapter: str, dtype: str) -> PreTrainedModel:
    """The model with an adapter's products added to its weights."""
    import_peft("Merging an adapter")
    try:
        folder = Path(resolve(adapter))
        if not folder.is_dir():
            folder = hub_folder(adapter)
        quantisation = read_quantisation(folder)
        if quantisation is None:
            model = load_model(name_or_path, dtype=dtype)
        else:
            config = BitsAndBytesConfig.from_dict(quantisation)
            model = load_model(name_or_path, dtype=dtype, quantization_config=config).dequantize()
            warnings.warn(
                f"The adapter {adapter!r} was trained on weights of {4 if config.load_in_4bit else 8} bits. It is merged into "
                f"those, unpacked: what the rounding to them cost stays, and the sums are rounded once more, to {model.dtype}.",
                stacklevel=3,
            )
        return merged(attach(model, folder))
    except CheckpointError as error:
        raise CheckpointError(
            f"The adapter {adapter!r} could not be merged into {name_or_path!r}: {str(error).splitlines()[0]}"
        ) from error
