"""Weights of 4 and 8 bits: the blocks' matrices are quantised, the ends of the model are not, and its logits stay near."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from golden import cases
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from dllm.data.sudoku import puzzles
from dllm.evaluation.sudoku import score
from dllm.pipelines import llada
from dllm.pipelines.llada import loading

MODEL = "builtin:sudoku9"
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


@pytest.mark.parametrize(("name", "head"), [
    ("llada_dense", "model.transformer.ff_out"),
    ("llada_dense_gqa_tied", None),
    ("llada_moe", "lm_head"),
])  # fmt: skip
def test_every_matrix_of_the_blocks_may_be_quantised_and_the_head_may_not(name: str, head: str | None) -> None:
    model = llada.load_model(cases.folder(name))
    kept = get_keys_to_not_convert(model)
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [key for key in linear if not should_convert_module(key, kept)] == ([] if head is None else [head])
    assert len(linear) - (head is not None) == 2 * (4 if name == "llada_moe" else 7)


@cache
def ids_and_logits() -> tuple[Tensor, Tensor]:
    tokenizer = llada.load_tokenizer(MODEL)
    ids = torch.tensor([tokenizer(PUZZLE.replace(".", tokenizer.mask_token), add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return ids, llada.load_model(MODEL, dtype=torch.float32)(ids).logits


def quantised(bits: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    if bits == 4:
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        config = BitsAndBytesConfig(load_in_4bit=True, **kind)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return llada.load_model(MODEL, quantization_config=config, dtype=dtype)


# NF4 rounds weights to 16 levels; the 8-bit product rounds a row's activations to 256 levels too, and eight blocks add it up
@pytest.mark.parametrize(("bits", "bound"), [(4, 0.3), (8, 0.5)])
def test_quantised_blocks_stay_near(bits: int, bound: float) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = quantised(bits)
    layer = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    for block in model.model.transformer["blocks"]:
        for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
            assert type(getattr(block, name)) is layer, name
    assert type(model.get_output_embeddings()) in (nn.Linear, nn.Embedding)
    ids, expected = ids_and_logits()
    with torch.no_grad():
        logits = model(ids).logits.float()
    assert not torch.equal(logits, expected)
    assert (logits - expected).norm() < bound * expected.norm()
    unseen = [puzzle for puzzle, _ in puzzles(9, "test", 10, clues=(36, 50))]
    assert score(model, llada.load_tokenizer(MODEL), unseen, tokens_per_forward=4).exact >= 0.9


def test_what_was_left_in_bf16_stays_so_on_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loading, "bf16_is_fast", lambda cpu: False)
    model = quantised(4, torch.bfloat16)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert set(before.values()) == {torch.uint8, torch.bfloat16}
    moved = llada.to_device(model, torch.device("cpu"))
    assert {name: parameter.dtype for name, parameter in moved.named_parameters()} == before
