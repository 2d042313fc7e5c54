"""GGUF files: whole ones are adapted as they read, and what cannot be is refused by their header."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines.llada.test_adaptation import WORDS, V, causal_logits, some_ids
from reference import autoregressive
from transformers import AutoConfig

from dllm.errors import CheckpointError, MissingExtraError
from dllm.pipelines import llada
from dllm.pipelines.llada.gguf_files import WIDTH_KEYS, check_gguf, gguf_config, read_gguf_header

gguf = pytest.importorskip("gguf")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return autoregressive.write_gguf(tmp_path / "small.gguf", autoregressive.model("llama", V), WORDS)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("llama", "F32"),
        ("qwen2", "Q8_0"),
        *(
            pytest.param(m, k, marks=pytest.mark.slow)
            for m, k in (("llama", "F16"), ("llama", "Q8_0"), ("qwen2", "F32"))
        ),
    ],
)
def test_a_gguf_file_is_the_model_that_was_written(model_type: str, kind: str, tmp_path: Path) -> None:
    theirs = autoregressive.model(model_type, V, tie_word_embeddings=kind != "F32")
    file = autoregressive.write_gguf(tmp_path / "small.gguf", theirs, WORDS, kind)
    done = llada.adapt(tmp_path, tmp_path / "out", gguf_file=file.name)
    number = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in theirs.parameters():  # what quantisation leaves of the matrices
            if parameter.dim() > 1:
                packed = gguf.quantize(parameter.numpy(), number)
                parameter.copy_(torch.from_numpy(np.array(gguf.dequantize(packed, number))))
        expected = theirs(some_ids()).logits
    model, words = llada.load_model(done.folder), llada.load_tokenizer(done.folder)
    assert model.dtype == torch.float32
    # llama.cpp's order of queries and keys is undone, and blocks of Q8_0 are cut in that order
    rounded = 0.05 if (model_type, kind) == ("llama", "Q8_0") else 2e-5
    found = causal_logits(model, some_ids())[..., :V]
    torch.testing.assert_close(found, expected, rtol=0, atol=rounded * float(expected.abs().max()))
    text = "<|im_start|>user\nthe cat ate 12 hats<|im_end|>\n"
    assert words(text)["input_ids"] == WORDS(text)["input_ids"]
    assert (done.eos, done.eot, done.mask.id, done.chat_template) == ("<|endoftext|>", "<|im_end|>", V, "marked")


def test_the_header_says_what_the_package_reads(small: Path) -> None:
    header, reader = read_gguf_header(small), gguf.GGUFReader(small)
    assert header.architecture == "llama"
    assert header.of_model("attention.head_count_kv") == 2
    assert header.metadata["tokenizer.ggml.tokens"].number == V
    start = min(int(tensor.data_offset) for tensor in reader.tensors)
    assert header.data_start == start
    assert header.tensors == {
        tensor.name: (int(tensor.tensor_type), int(tensor.n_elements), int(tensor.data_offset) - start)
        for tensor in reader.tensors
    }
    assert check_gguf(small) == header


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_configuration_is_the_one_that_transformers_reads(model_type: str, tmp_path: Path) -> None:
    theirs = autoregressive.model(model_type, V + 3, tie_word_embeddings=model_type == "qwen2")
    file = autoregressive.write_gguf(tmp_path / "a.gguf", theirs, WORDS)
    found, slow = gguf_config(check_gguf(file), "a.gguf"), AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
    elsewhere = {"_name_or_path", "_model_name_or_path", *(f"{name}_token_id" for name in ("bos", "eos", "pad", "unk"))}
    values, slow_values = (
        {key: value for key, value in config.to_dict().items() if key not in elsewhere} for config in (found, slow)
    )
    assert values == slow_values
    assert slow_values["rope_parameters"]["rope_theta"] == theirs.config.rope_parameters["rope_theta"]


def test_a_size_that_the_header_does_not_say_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"a\.gguf does not say its embedding_length"):
        llada.adapt(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.parametrize("given", [("attention.key_length",), ("rope.dimension_count",), WIDTH_KEYS, ()])
def test_the_width_of_heads_is_what_one_of_two_keys_says(given: tuple[str, ...], tmp_path: Path) -> None:
    extra = {f"llama.{key}": 8 for key in given}
    file = autoregressive.write_gguf(tmp_path / "a.gguf", autoregressive.model("llama", V), WORDS, extra=extra)
    assert gguf_config(check_gguf(file), "a.gguf").head_dim == 8


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_positions_that_turn_a_part_of_each_head_are_refused(model_type: str, tmp_path: Path) -> None:
    extra = {f"{model_type}.{key}": width for key, width in zip(WIDTH_KEYS, (8, 4), strict=True)}
    file = autoregressive.write_gguf(tmp_path / "a.gguf", autoregressive.model(model_type, V), WORDS, extra=extra)
    with pytest.raises(
        CheckpointError, match=r"a part of each head, of width 8 \(rope\.dimension_count=4\), which LLaDA's"
    ):
        llada.adapt(file, tmp_path / "out")


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


DAMAGED = {
    "a string in an array, of 2**63 - 1 bytes": (1, 0, _entry("a", 9, struct.pack("<IQQ", 8, 1, 2**63 - 1))),
    "an array of 2**62 numbers": (1, 0, _entry("a", 9, struct.pack("<IQ", 0, 2**62))),
    "an array of 2**62 wide numbers": (1, 0, _entry("a", 9, struct.pack("<IQ", 12, 2**62))),
    "an array of 2**62 strings": (1, 0, _entry("a", 9, struct.pack("<IQ", 8, 2**62))),
    "2**62 keys": (2**62, 0, _entry("a", 4, struct.pack("<I", 1))),
    "2**62 tensors": (0, 2**62, b""),
    "no alignment": (1, 0, _entry("general.alignment", 4, struct.pack("<I", 0))),
    "an alignment that is text": (1, 0, _entry("general.alignment", 8, struct.pack("<Q", 2) + b"32")),
    "a tensor of 2**31 axes": (0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**31) + bytes(64)),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header_is_one_error(what: str, tmp_path: Path) -> None:
    keys, tensors, content = DAMAGED[what]
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + content)
    with pytest.raises(
        CheckpointError, match=r"a\.gguf is cut short or damaged: its header cannot be read\. Copy it again\."
    ):
        read_gguf_header(tmp_path / "a.gguf")


def test_a_size_of_none_is_named(small: Path) -> None:
    content, key = bytearray(small.read_bytes()), b"llama.embedding_length"
    struct.pack_into("<I", content, content.index(key) + len(key) + 4, 0)
    small.write_bytes(content)
    with pytest.raises(CheckpointError, match="is cut short or damaged: its embedding_length is 0"):
        llada.adapt(small, small.parent / "out")


MORE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"llama.rope.scaling.type": "yarn"}, r"another scale \(rope\.scaling\.type='yarn'\)"),
    (
        "llama",
        {"tensor:rope_freqs.weight": np.ones(4, np.float32)},
        r"Llama 3\.1 and later .*tensor='rope_freqs\.weight'",
    ),
    ("llama", {"llama.expert_count": 8}, r"a mixture of experts \(expert_count=8\)"),
    ("llama", {"llama.attention.sliding_window": 64}, r"a sliding window \(attention\.sliding_window=64\)"),
    ("llama", {"tensor:blk.0.attn_q.bias": np.ones(32, np.float32)}, r"biases that .*tensor='blk\.0\.attn_q\.bias'"),
    ("qwen2", {"tensor:blk.0.attn_q_norm.weight": np.ones(8, np.float32)}, r"QK norm\) \(tensor='blk\.0\.attn_q_norm"),
    ("llama", {"tensor:other.weight": np.ones(8, np.float32)}, r"a tensor of its own \(tensor='other\.weight'\)"),
    ("llama", {"split.count": 3}, r"is one part of several: put them together with  llama-gguf-split --merge"),
]


@pytest.mark.parametrize(("model_type", "extra", "message"), MORE)
def test_what_the_block_has_not_is_refused_by_the_header(
    model_type: str, extra: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = autoregressive.write_gguf(tmp_path / "a.gguf", autoregressive.model(model_type, V), WORDS, extra=extra)
    with pytest.raises(CheckpointError, match=message):
        llada.adapt(file, tmp_path / "out")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match="of the architecture 'gemma2': of GGUF files, dllm adapts llama and qwen2"
    ):
        llada.adapt(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.parametrize(("number", "name"), [(15, "Q8_K"), (6, "Q5_0"), (77, "77")])
def test_a_quantisation_that_cannot_be_read_is_named(number: int, name: str, small: Path) -> None:
    content = bytearray(small.read_bytes())
    place = content.index(b"output_norm.weight") + len("output_norm.weight")
    assert struct.unpack_from("<I", content, place)[0] == 1  # one dimension; then its size, then the type
    struct.pack_into("<I", content, place + 12, number)
    small.write_bytes(content)
    with pytest.raises(
        CheckpointError,
        match=rf"holds output_norm\.weight in the quantisation {name}, which transformers .* cannot read",
    ):
        llada.adapt(small, small.parent / "out")


@pytest.mark.parametrize(
    "gone", ["token_embd.weight", "output_norm.weight", "blk.0.ffn_up.weight", "blk.1.attn_k.bias"]
)
def test_a_tensor_that_is_not_there_is_named(gone: str, tmp_path: Path) -> None:
    file = autoregressive.write_gguf(tmp_path / "a.gguf", autoregressive.model("qwen2", V), WORDS, without=gone)
    with pytest.raises(CheckpointError, match=rf"or a part of a model: it has no tensor {re.escape(gone)}"):
        llada.adapt(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "is cut short or damaged"),
        (20, "is cut short or damaged"),
        (4000, "is cut short"),
        (-9, "ends behind the file's end"),
    ],
)
def test_a_file_that_is_cut_short(keep: int, message: str, small: Path) -> None:
    small.write_bytes(small.read_bytes()[: keep or 0])
    with pytest.raises(CheckpointError, match=message):
        llada.adapt(small, small.parent / "out")


def test_no_gguf_file_at_all(small: Path) -> None:
    small.write_bytes(b"PK" + small.read_bytes()[2:])
    with pytest.raises(CheckpointError, match="is no GGUF file: it does not begin with GGUF"):
        llada.adapt(small, small.parent / "out")
    small.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(CheckpointError, match="is of version 9 of GGUF; versions 2 and 3 can be read"):
        llada.adapt(small, small.parent / "out")


def test_without_the_package_the_extra_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        MissingExtraError, match=r"Reading small\.gguf needs the package 'gguf': run  pip install 'dllm\[gguf\]'"
    ):
        llada.adapt(small, small.parent / "out")
