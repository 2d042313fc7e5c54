"""The files of a checkpoint folder: that they are there, whole and safetensors, before a weight is read; and written whole or
not at all.

A safetensors file begins with the length of its header (8 bytes) and the header, JSON that gives each tensor's dtype, shape
and place; so names, shapes and the size that the file must have are known without reading a tensor.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn

from dllm.disk import check_room, put_in_place
from dllm.errors import CheckpointError, OptionError

HUB_OPTIONS = ("revision", "token", "cache_dir")
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""What is downloaded: no pickle, no code."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Safetensors' spelling -> torch's, of dtypes that weights are not packed in."""


def tensor_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype in safetensors' spelling, shape) of every tensor of a checkpoint folder.

    Raises:
        CheckpointError: no weights, only pickled ones, a file that the index names is not there, one that is cut short, or
            one that does not hold what the index says.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(_no_weights(folder))
        return read_header(folder / SINGLE)
    try:
        places: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
        if not places or any(Path(name).name != name for name in places.values()):
            raise ValueError("it does not give each tensor a file of this folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read as an index of weights: copy it again. ({error})") from error
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in sorted(set(places.values())):
        if not (folder / name).exists():
            raise CheckpointError(f"{index} names {name}, and there is no such file in {folder}: copy or download it.")
        header = read_header(folder / name)
        absent = [tensor for tensor, place in places.items() if place == name and tensor not in header]
        if absent:
            raise CheckpointError(f"{index} says that {name} holds {absent[0]}, and it does not: copy both again.")
        found |= header
    return found


def main_dtype(headers: Mapping[str, tuple[str, tuple[int, ...]]], name: str) -> str:
    """The dtype, in torch's spelling, that most weights are stored in; config.json can say another one.

    Args:
        headers: of `tensor_headers`.
        name: of the checkpoint, for errors.

    Raises:
        CheckpointError: most weights are packed, or there are none.
    """
    weights: Counter[str] = Counter()
    for dtype, shape in headers.values():
        weights[dtype] += math.prod(shape)
    most = max(weights, key=lambda dtype: weights[dtype], default="of no dtype")
    if most not in DTYPE_NAMES:
        raise CheckpointError(
            f"Most weights of {name!r} are {most}: dllm reads {', '.join(DTYPE_NAMES)}. Take the checkpoint that was packed."
        )
    return DTYPE_NAMES[most]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, OWNER/NAME; a folder may have it too."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "[" not in name


def check_free(output: Path) -> None:
    """Whether a checkpoint may be written there.

    Raises:
        OptionError: something is there already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OptionError(f"{output} is not empty: name a folder that does not exist.")


def check_shard_size(size: str) -> None:
    """Whether it is one that `save_pretrained` reads.

    Raises:
        OptionError: it is not.
    """
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", size):
        raise OptionError(f"max_shard_size {size!r}: write a number and KB, MB, GB or TB, such as 5GB.")


@contextmanager
def written_whole(output: Path, model: nn.Module) -> Iterator[Path]:
    """The folder `NAME.partial` to write a model into, which is given its name at the end; an error deletes it.

    Args:
        output: a folder that does not exist or is empty.
        model: whose weights will be written, for which the disk must have room.

    Raises:
        OptionError: it has not, or the folder cannot be written.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    check_room(output, needed, "the weights take")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if output.exists():
            output.rmdir()
        put_in_place(partial, output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise OptionError(
                f"{output} could not be written: {error}. Name another folder, or free some space."
            ) from error
        raise


def hub_folder(name: str, **options: Any) -> Path:
    """The files of a hub id, in the hub's cache on this machine: downloaded where they are not there yet.

    Args:
        name: such as GSAI-ML/LLaDA-8B-Instruct.
        **options: `revision`, `token`, `cache_dir`.

    Raises:
        CheckpointError: there is no such id, or it can neither be reached nor found in the cache.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, **options))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"The files of {name!r} could not be had from the hub: {reason}") from error


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of one file's tensors.

    Raises:
        CheckpointError: it is no safetensors file, or not as long as its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path} is cut short or is no safetensors file ({size:,} bytes): copy it again.")
        text = file.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        found = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in entries.items()}
        needed = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # JSON, but of another form
        raise CheckpointError(f"{path} is no safetensors file: its header cannot be read. Copy it again.") from error
    if size != needed:
        raise CheckpointError(
            f"{path} has {size:,} bytes and its header asks for {needed:,}: it is cut short or damaged. Copy it again."
        )
    return found


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} holds its weights as pickles alone ({pickled[0]}), which can run code: dllm reads safetensors. Convert "
            f"them where you trust them, with transformers' save_pretrained."
        )
    return f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there."
