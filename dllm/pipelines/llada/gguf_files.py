"""GGUF files: what one says of itself and which tensors it holds, and whether dllm can adapt it; without reading a weight.

Source: the GGUF specification, versions 2 and 3: magic, version, number of tensors and of keys; the keys with their values; name,
shape, type and place of each tensor. The package `gguf` reads the same, and takes seconds for the vocabulary on its way.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from dllm.errors import CheckpointError, MissingExtraError
from dllm.pipelines.llada.adaptable import BIASED, refusal

ARCHITECTURES = ("llama", "qwen2")
BLOCK_PARTS = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
TENSORS = re.compile(
    rf"(token_embd|output|output_norm|blk\.\d+\.({'|'.join(BLOCK_PARTS)}))\.weight|blk\.\d+\.attn_[qkv]\.bias"
)
BEYOND = {
    "rope.scaling.type": ("rotary positions of another scale", "none"),
    "attention.sliding_window": ("a sliding window", 0),
    "expert_count": ("a mixture of experts", 0),
}
"""Key of the architecture -> what it stands for, and the value that means nothing."""
FEATURES = {
    "rope_freqs": "rotary positions of another scale (rope_scaling, as Llama 3.1 and later have it)",
    "attn_q_norm": "norms of each head's queries and keys (QK norm)",
    "attn_k_norm": "norms of each head's queries and keys (QK norm)",
    "_exps": "a mixture of experts",
    ".bias": "biases that LLaDA's dense block has no place for",
}
"""Part of a tensor's name -> what it stands for."""

CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Key of the architecture -> transformers' key."""
OPTIONAL_KEYS = {
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
}
WIDTH_KEYS = ("attention.key_length", "rope.dimension_count")
"""A head's width, and how much of it turns with the position: all."""

UNPACKED = (0, 1, 30)
"""Numbers of F32, F16 and BF16."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 24
"""Bytes of a string, beyond which a file is taken to be damaged: templates have thousands."""
_MOST_AXES = 4
"""Of a tensor, as ggml has it."""


@dataclass(frozen=True)
class Entries:
    """What is kept of an array."""

    number: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says before its weights."""

    architecture: str
    """In llama.cpp's spelling, such as llama or qwen2."""
    metadata: dict[str, Any]
    """Key -> value."""
    tensors: dict[str, tuple[int, int, int]]
    """Name -> (number of its type, weights, place in the data in bytes)."""
    data_start: int
    """Bytes before the data."""

    def of_model(self, key: str, default: Any = None) -> Any:
        """The value of an architecture's own key, such as `attention.head_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_gguf_header(path: Path) -> GGUFHeader:
    """Reads it.

    Raises:
        CheckpointError: no GGUF file, a version that is not known, or one that is cut short.
    """
    with path.open("rb") as file:
        try:
            magic, version, tensors, keys = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF":
                raise CheckpointError(
                    f"{path} is no GGUF file: it does not begin with GGUF. Copy or download it again."
                )
            if version not in (2, 3):
                raise CheckpointError(f"{path} is of version {version} of GGUF; versions 2 and 3 can be read.")
            metadata = dict(_entry(file) for _ in range(keys))
            table = dict(_tensor(file) for _ in range(tensors))
            alignment = metadata.get("general.alignment", 32)
            if not isinstance(alignment, int) or alignment < 1:
                raise ValueError
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"{path} is cut short or damaged: its header cannot be read. Copy it again."
            ) from error
        return GGUFHeader(
            str(metadata.get("general.architecture", "")), metadata, table, -(-file.tell() // alignment) * alignment
        )


def check_gguf(path: Path) -> GGUFHeader:
    """The header of a GGUF file that can be read, and whose weights have a place in LLaDA's dense block.

    Raises:
        CheckpointError: they have none, or the file is damaged.
        MissingExtraError: the package `gguf` is not installed.
    """
    header = read_gguf_header(path)
    if header.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} holds a model of the architecture {header.architecture!r}: of GGUF files, dllm adapts "
            f"{' and '.join(ARCHITECTURES)} (Llama, Mistral, SmolLM; Qwen2, Qwen2.5)."
        )
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path} is one part of several: put them together with  llama-gguf-split --merge  first."
        )
    for key, (feature, plain) in BEYOND.items():
        value = header.of_model(key)
        if value and value != plain:
            raise refusal(str(path), feature, key, value)
    for name in header.tensors:
        if not TENSORS.fullmatch(name) or (name.endswith(".bias") and header.architecture not in BIASED):
            feature = next((what for part, what in FEATURES.items() if part in name), "a tensor of its own")
            raise refusal(str(path), feature, "tensor", name)
    _check_types(path, header)
    return header


def gguf_config(header: GGUFHeader, name: str) -> PreTrainedConfig:
    """The configuration that a file's header gives.

    transformers makes the same, and reads the whole vocabulary to do so: seconds for each 50,000 tokens.

    Args:
        header: of `check_gguf`.
        name: of the file, for errors.

    Raises:
        CheckpointError: a size or a tensor is missing, or positions turn a part of each head.
    """
    values = {ours: header.of_model(key) for key, ours in CONFIG_KEYS.items()}
    for key, ours in CONFIG_KEYS.items():
        if not isinstance(values[ours], int | float):
            raise CheckpointError(
                f"{name} does not say its {key}, or one for each layer: dllm reads files with one for all."
            )
        if not values[ours] > 0:
            raise CheckpointError(f"{name} is cut short or damaged: its {key} is {values[ours]}. Copy it again.")
    found = {ours: header.of_model(key) for key, ours in OPTIONAL_KEYS.items()}
    width, turning = (header.of_model(key) for key in WIDTH_KEYS)
    if None not in (width, turning) and width != turning:
        raise refusal(name, f"rotary positions on a part of each head, of width {width}", WIDTH_KEYS[1], turning)
    if header.architecture == "llama":  # elsewhere transformers' model takes no width of heads
        found["head_dim"] = turning if width is None else width
    if missing := next((each for each in _tensors_of(header) if each not in header.tensors), None):
        raise CheckpointError(f"{name} is damaged, or a part of a model: it has no tensor {missing}. Copy it again.")
    _, weights, _ = header.tensors["token_embd.weight"]
    return AutoConfig.for_model(
        header.architecture,
        vocab_size=weights // values["hidden_size"],
        tie_word_embeddings="output.weight" not in header.tensors,
        **values,
        **{key: value for key, value in found.items() if isinstance(value, int | float)},
    )


def _tensors_of(header: GGUFHeader) -> Iterator[str]:
    """The names of all that a model of these sizes has, but for a head of its own."""
    yield from ("token_embd.weight", "output_norm.weight")
    for block in range(int(header.of_model("block_count"))):
        yield from (f"blk.{block}.{part}.weight" for part in BLOCK_PARTS)
        if header.architecture in BIASED:
            yield from (f"blk.{block}.attn_{part}.bias" for part in "qkv")


def _check_types(path: Path, header: GGUFHeader) -> None:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", f"Reading {path.name}") from error
    names, readable = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}, _readable_types()
    blocks: dict[int, tuple[int, int]] = {}
    for number, name in {number: name for name, (number, _, _) in header.tensors.items()}.items():
        try:
            kind = gguf.GGMLQuantizationType(number)
            blocks[number] = gguf.GGML_QUANT_SIZES[kind]
            # one block of zeros: some types have a name and a size, and no way back to numbers
            gguf.dequantize(np.zeros((1, blocks[number][1]), dtype=np.uint8), kind)
            if readable and number not in readable:
                raise NotImplementedError
        except (ValueError, KeyError, NotImplementedError) as error:
            packages = " and ".join(f"{each} {importlib.metadata.version(each)}" for each in ("transformers", "gguf"))
            raise CheckpointError(
                f"{path} holds {name} in the quantisation {names.get(number, number)}, which {packages} cannot read: take "
                f"another file of the model, such as its Q8_0 or F16."
            ) from error
    end = path.stat().st_size - header.data_start
    for name, (number, weights, place) in header.tensors.items():
        block, size = blocks[number]
        if place + weights // block * size > end:
            raise CheckpointError(f"{path} is cut short: {name} ends behind the file's end. Copy it again.")


def _readable_types() -> set[int]:
    """Numbers of the types that transformers reads: fewer than `gguf` does. Empty where it does not say."""
    try:
        from transformers.integrations.gguf.dequant import GGML_BLOCK
    except ImportError:
        return set()
    return {*GGML_BLOCK, *UNPACKED}


def _entry(file: BinaryIO) -> tuple[str, Any]:
    key = _string(file)
    return key, _value(file, _number(file, "I"))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _number(file, _SCALARS[kind])
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner == _STRING:
        for _ in range(count):
            _skip(file, _number(file, "Q"))
    else:
        _skip(file, count * struct.calcsize(f"<{_SCALARS[inner]}"))
    return Entries(count)


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, int, int]]:
    name, weights, axes = _string(file), 1, _number(file, "I")
    if axes > _MOST_AXES:
        raise OverflowError
    for _ in range(axes):
        weights *= _number(file, "Q")
    kind, place = _number(file, "I"), _number(file, "Q")
    return name, (kind, weights, place)


def _skip(file: BinaryIO, length: int) -> None:
    if length > os.fstat(file.fileno()).st_size - file.tell():
        raise OverflowError  # seek itself goes beyond the end, or fails, as the number may be
    file.seek(length, 1)


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]


def _string(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > _LONGEST:
        raise OverflowError
    return file.read(length).decode("utf-8")
