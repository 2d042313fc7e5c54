"""Presets: as large as their names say, counted without memory for a single weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dllm.pipelines import llada
from dllm.pipelines.llada.presets import PRESETS
from dllm.pipelines.llada.tokenizer import char_tokenizer

TOKENIZER = char_tokenizer()
DENSE = [name for name, shape in PRESETS.items() if "d_model" in shape]


def on_meta(name: str, tokenizer: PreTrainedTokenizerBase = TOKENIZER, overrides: str | None = None) -> Any:
    with torch.device("meta"):
        return llada.fresh_model(name, tokenizer, overrides)


def by_hand(V: int, D: int, layers: int, heads: int, kv_heads: int, hidden: int) -> int:
    """Tables, attention (q, o, k, v), three matrices of the gated network, two norms a layer and one at the end."""
    attention = 2 * D * D + 2 * D * (D // heads * kv_heads)
    return 2 * V * D + layers * (attention + 3 * D * hidden + 2 * D) + D


@pytest.mark.parametrize("name", DENSE)
def test_parameters_are_what_the_shape_says(name: str) -> None:
    shape = PRESETS[name]
    heads = shape["n_heads"]
    expected = by_hand(
        len(TOKENIZER),
        shape["d_model"],
        shape["n_layers"],
        heads,
        shape.get("n_kv_heads", heads),
        shape["mlp_hidden_size"],
    )
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == expected


def count(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


# LLaDA, arXiv:2502.09992, table 5: all parameters, and those outside the two tables of the vocabulary
@pytest.mark.parametrize(("name", "total", "inside"), [("8b", 8.02, 6.98), ("1b", 1.49, 0.97)])
def test_the_published_sizes_have_the_published_number_of_parameters(name: str, total: float, inside: float) -> None:
    model = on_meta(name, overrides="vocab_size=126464")
    tables = count(model.get_input_embeddings()) + count(model.get_output_embeddings())
    assert count(model) == pytest.approx(total, rel=0.005)
    assert count(model) - tables == pytest.approx(inside, rel=0.005)


def test_8b_is_eight_billion_within_one_per_cent_and_has_the_public_tensors() -> None:
    model = on_meta("8b", overrides="vocab_size=126464")
    assert count(model) == pytest.approx(8.0, rel=0.01)
    assert len(model.state_dict()) == 291
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes["model.transformer.wte.weight"] == shapes["model.transformer.ff_out.weight"] == (126464, 4096)
    assert shapes["model.transformer.blocks.31.up_proj.weight"] == (12288, 4096)
    assert shapes["model.transformer.blocks.0.k_proj.weight"] == (4096, 4096)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", PRESETS)
def test_vocabulary_and_special_ids_come_from_the_tokenizer(name: str) -> None:
    config = on_meta(name).config
    assert config.vocab_size == len(TOKENIZER)
    for kind in ("mask", "bos", "eos", "pad"):
        assert getattr(config, f"{kind}_token_id") == getattr(TOKENIZER, f"{kind}_token_id") is not None
    for key, value in PRESETS[name].items():
        assert getattr(config, key) == value


@pytest.mark.parametrize("name", ["tiny", "moe-tiny"])
@pytest.mark.parametrize(("max_length", "context"), [(None, 512), (100, 512), (512, 512), (1000, 1000)])
def test_the_context_grows_to_the_length_that_is_needed(name: str, max_length: int | None, context: int) -> None:
    with torch.device("meta"):
        model = llada.fresh_model(name, TOKENIZER, max_length=max_length)
    assert model.config.max_position_embeddings == context
