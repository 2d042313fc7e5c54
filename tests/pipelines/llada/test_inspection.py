"""What a checkpoint is, from its configuration and the headers of its files: counted models agree, and no weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden import cases
from safetensors.torch import load_file
from system.workshop import save_tiny_model

from dllm.errors import CheckpointError
from dllm.pipelines import llada
from dllm.pipelines.llada.checkpoint_files import INDEX, SINGLE
from dllm.pipelines.llada.inspection import CheckpointInfo, inspect
from dllm.pipelines.llada.presets import PRESETS

ALL = [*cases.DENSE, "llada_moe"]
every_model = pytest.mark.parametrize("name", ALL)


def of(name: str) -> CheckpointInfo:
    return inspect(str(cases.folder(name)))


@every_model
def test_parameters_are_those_of_the_loaded_model(name: str) -> None:
    info, model = of(name), llada.load_model(cases.folder(name))
    assert info.architecture == type(model).__name__
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    stored = load_file(cases.folder(name) / SINGLE)
    assert info.parameters == sum(tensor.numel() for tensor in stored.values())
    tables = [key for key in stored if key.endswith(("wte.weight", "transformer.ff_out.weight", "embed_tokens.weight"))]
    tables += [key for key in stored if key == "lm_head.weight"]
    assert len(tables) == (1 if name == "llada_dense_gqa_tied" else 2)
    assert info.embedding_parameters == sum(stored[key].numel() for key in tables)
    assert (info.dtype, info.stored_bytes) == ("float32", 4 * info.parameters)


@every_model
def test_active_parameters_are_those_that_a_gradient_of_one_token_reaches(name: str) -> None:
    model = llada.load_model(cases.folder(name))
    model(torch.tensor([[3]])).logits.sum().backward()
    reached = 0
    for key, parameter in model.named_parameters():
        if ".experts." in key:  # rows that no token was sent to have a gradient of exactly zero
            reached += sum(part.numel() for part, g in zip(parameter, parameter.grad, strict=True) if g.abs().max() > 0)
        else:
            reached += parameter.numel()
    assert of(name).active_parameters == reached
    assert (of(name).active_parameters < of(name).parameters) is (name == "llada_moe")


def test_a_dense_layer_of_a_mixture_is_active_as_a_whole(tmp_path: Path) -> None:
    config = json.loads((cases.folder("llada_moe") / "config.json").read_text())
    model = llada.LLaDAMoEModelLM(llada.LLaDAMoEConfig(**{**config, "moe_layer_freq": [0, 1]}))
    model.save_pretrained(tmp_path)
    info = inspect(str(tmp_path))
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert info.parameters - info.active_parameters == 6 * 3 * 48 * 64


def test_one_table_at_both_ends_of_a_mixture_counts_once(tmp_path: Path) -> None:
    config = json.loads((cases.folder("llada_moe") / "config.json").read_text())
    model = llada.LLaDAMoEModelLM(llada.LLaDAMoEConfig(**{**config, "tie_word_embeddings": True}))
    model.save_pretrained(tmp_path)
    info = inspect(str(tmp_path))
    assert info.embedding_parameters == 256 * 64
    assert info.stored_bytes == 4 * info.parameters == 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("preset", "total", "active", "embedding"),
    # the published numbers: arXiv:2502.09992, table 5; arXiv:2509.24389 (1.4 B a token, its output table not counted twice)
    [("8b", 8.02, 8.02, 1.036), ("1b", 1.49, 1.49, 0.518), ("moe-7b", 7.36, 1.72, 0.644)],
)
def test_presets_have_the_published_sizes(preset: str, total: float, active: float, embedding: float) -> None:
    info = inspect(preset)
    assert info.parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert info.active_parameters / 1e9 == pytest.approx(active, rel=0.005)
    assert info.embedding_parameters / 1e9 == pytest.approx(embedding, rel=0.005)
    assert (info.dtype, info.stored_bytes, info.special_tokens) == (None, None, {})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_described(preset: str) -> None:
    info = inspect(preset)
    assert info.architecture == ("LLaDAMoEModelLM" if preset.startswith("moe") else "LLaDAModelLM")
    assert ("experts" in info.sizes) is preset.startswith("moe")
    assert info.sizes["layers"] == PRESETS[preset].get("n_layers", PRESETS[preset].get("num_hidden_layers"))


def test_sizes_are_those_of_the_configuration() -> None:
    assert of("llada_moe").sizes == {
        "layers": 2,
        "width": 64,
        "query heads": 4,
        "key/value heads": 4,
        "context": 256,
        "vocabulary": 256,
        "experts": 8,
        "experts a token": 2,
        "expert width": 48,
    }
    tied = of("llada_dense_gqa_tied").sizes
    assert (tied["query heads"], tied["key/value heads"]) == (4, 2)
    assert "feed-forward width" in tied


def test_memory_is_bytes_a_parameter() -> None:
    info = of("llada_dense")
    memory = {name: round(size * 1e9 / info.parameters, 6) for name, size in info.memory().items()}
    stored = load_file(cases.folder("llada_dense") / SINGLE)
    linear = sum(t.numel() for key, t in stored.items() if ".blocks." in key and t.dim() == 2) / info.parameters
    assert memory == {
        "inference, float32": 4,
        "inference, bfloat16": 2,
        "inference, 8 bit": round(2 - 1.0 * linear, 6),  # two bytes, and for the blocks' matrices one, or half a one
        "inference, 4 bit": round(2 - 1.5 * linear, 6),
        "training, AdamW": 16,
        "training, AdamW with 8-bit moments": 10,
        "training, Muon and AdamW": 12,
        "training, SGD": 8,
    }


@every_model
def test_no_weight_is_read(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cases.folder(name), tmp_path / "garbage"))
    whole = (folder / SINGLE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    with (folder / SINGLE).open("wb") as file:  # a hole where the tensors should be: as large as the header says
        file.write(whole[:header])
        file.truncate(len(whole))
    expected = of(name)
    assert inspect(str(folder)).__dict__ == {**expected.__dict__, "name": str(folder)}


def test_shards_and_mixed_dtypes_are_summed(tmp_path: Path) -> None:
    model = llada.load_model(cases.folder("llada_dense"))
    model.model.transformer["ff_out"].to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX).exists()
    info = inspect(str(tmp_path))
    assert info.dtype == "bfloat16, float32"
    assert info.stored_bytes == 4 * info.parameters - 2 * 256 * 64


def test_special_tokens_come_from_the_tokenizer_or_else_from_the_configuration(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    tokenizer = llada.load_tokenizer(folder)
    assert inspect(str(folder)).special_tokens == {
        "mask": ("<|mdm_mask|>", tokenizer.mask_token_id),
        "bos": ("<|startoftext|>", tokenizer.bos_token_id),
        "eos": ("<|endoftext|>", tokenizer.eos_token_id),
        "pad": ("<|endoftext|>", tokenizer.pad_token_id),
        "eot": ("<|eot_id|>", tokenizer.eot_token_id),
    }
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    without = inspect(str(folder)).special_tokens
    assert without["mask"] == (None, tokenizer.mask_token_id)
    assert without.keys() == {"mask", "bos", "eos", "pad"}
    assert of("llada_moe").special_tokens == {"eos": (None, 251), "pad": (None, 251)}


def test_the_model_inside_is_described() -> None:
    info = inspect("builtin:sudoku9")
    assert info.architecture == "LLaDAModelLM"
    assert info.special_tokens["mask"][0] == "<|mdm_mask|>"
    assert info.stored_bytes is not None
    assert info.stored_bytes < 10e6


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cases.folder("llada_moe"), tmp_path / "damaged"))
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="it is cut short or damaged"):
        inspect(str(folder))
    with pytest.raises(CheckpointError, match="There is no model folder 'nowhere'"):
        inspect("nowhere")
