"""Attention: every kernel against the sum written out, and what a mask hides is nowhere in the result."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.layers import attention
from torch import Tensor

from dllm.layers import attention as layer
from dllm.layers.attention import attend, attention_bias, explicit_attention
from dllm.pipelines.llada import LLaDAConfig
from dllm.pipelines.llada.models.modeling_llada import LLaDABlock

HEADS, WIDTH = 4, 8


class Case(NamedTuple):
    """One block and what it mixes."""

    block: LLaDABlock
    query: Tensor
    key: Tensor
    value: Tensor


def case(kernel: str, kv_heads: int = 2, length: int = 7, batch: int = 2, dtype: torch.dtype = torch.float32) -> Case:
    config = LLaDAConfig(
        vocab_size=16, d_model=HEADS * WIDTH, n_heads=HEADS, n_kv_heads=kv_heads, n_layers=1, mlp_hidden_size=8
    )
    config._attn_implementation = kernel
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(batch, heads, length, WIDTH, generator=generator).to(dtype) for heads in (HEADS, kv_heads, kv_heads)
    )
    return Case(LLaDABlock(config, 0), query, key, value)


def bias(c: Case, real: Tensor | None) -> Tensor | None:
    """What the kernel takes for a padding mask [B, L]."""
    B, _, L, _ = c.query.shape
    return attention_bias(c.block.config, torch.zeros(B, L, HEADS * WIDTH, dtype=c.query.dtype), real)


def ragged(batch: int, length: int, hidden: int) -> Tensor:
    """int64 [B, L]: row 0 whole, row 1 padded on the right, row 2 on the left."""
    real = torch.ones(batch, length, dtype=torch.int64)
    real[1:2, length - hidden :] = 0
    real[2:3, :hidden] = 0
    return real


def keys_seen(real: Tensor) -> Tensor:
    return real.bool()[:, None, :].expand(-1, real.shape[1], -1)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@settings(max_examples=15)
@given(kv_heads=st.sampled_from([1, 2, 4]), length=st.integers(1, 6), hidden=st.integers(0, 5))
def test_is_the_sum_written_out(kernel: str, kv_heads: int, length: int, hidden: int) -> None:
    c = case(kernel, kv_heads, length, batch=3)
    real = ragged(3, length, min(hidden, length - 1))
    expected = attention(c.query, c.key, c.value, c.block.scaling, keys_seen(real))
    found = attend(*c, bias(c, real))
    torch.testing.assert_close(found[real.bool()].double(), expected[real.bool()], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_without_a_mask_all_see_all(kernel: str) -> None:
    c = case(kernel)
    expected = attention(c.query, c.key, c.value, c.block.scaling, torch.ones(2, 7, 7, dtype=torch.bool))
    torch.testing.assert_close(attend(*c, None).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_first_position_reads_the_last(kernel: str) -> None:
    c = case(kernel)
    other = c.value.clone()
    other[:, :, -1] += 10.0
    change = attend(*c, None) - attend(*c._replace(value=other), None)
    assert change[:, 0].abs().min() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_hidden_keys_leave_no_trace(kernel: str, dtype: torch.dtype) -> None:
    c = case(kernel, batch=3, dtype=dtype)
    real = ragged(3, 7, 3)
    hidden = ~real.bool()[:, None, :, None]
    other = c._replace(key=c.key.masked_fill(hidden, 50.0), value=c.value.masked_fill(hidden, -90.0))
    found, expected = (attend(*x, bias(x, real))[real.bool()] for x in (other, c))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_row_that_is_all_padding_stays_finite(kernel: str, dtype: torch.dtype) -> None:
    c = case(kernel, dtype=dtype)
    real = torch.tensor([[1] * 7, [0] * 7])
    found = attend(*c, bias(c, real))
    assert found.isfinite().all()


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_may_be_boolean_or_additive(additive: bool) -> None:
    c = case("eager", batch=3)
    seen = keys_seen(ragged(3, 7, 2))[:, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    found, weights = explicit_attention(*c, mask)
    expected = attention(c.query, c.key, c.value, c.block.scaling, seen[:, 0])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    assert weights.shape == (3, HEADS, 7, 7)
    assert not weights.masked_select(~seen).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, HEADS, 7))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_order_of_the_keys_does_not_matter(kernel: str) -> None:
    c = case(kernel)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = c._replace(key=c.key[:, :, order], value=c.value[:, :, order])
    torch.testing.assert_close(attend(*shuffled, None), attend(*c, None), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_the_explicit_product_in_bf16_is_torch_sdpa(
    padded: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case("sdpa", kv_heads, length=40, batch=3, dtype=torch.bfloat16)
    real = ragged(3, 40, 11) if padded else torch.ones(3, 40, dtype=torch.int64)
    explicit = attend(*c, bias(c, real))
    monkeypatch.setattr(layer, "EXPLICIT_CPU_POSITIONS", 0)
    fused = attend(*c, bias(c, real))
    assert explicit.dtype == fused.dtype == torch.bfloat16
    # each rounds scores, weights and sums of size 1 to 8 bits in its own places
    torch.testing.assert_close(explicit[real.bool()], fused[real.bool()], rtol=0, atol=3e-2)
    exact = attention(c.query, c.key, c.value, c.block.scaling, keys_seen(real))[real.bool()]
    for kernel in (explicit, fused):
        torch.testing.assert_close(kernel[real.bool()].double(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("length", "gradients", "explicit"), [(256, True, True), (257, True, False), (256, False, False)]
)
def test_training_on_few_positions_in_bf16_takes_the_explicit_product(
    length: int, gradients: bool, explicit: bool
) -> None:
    c = case("sdpa", length=length, dtype=torch.bfloat16)
    with torch.set_grad_enabled(gradients):
        assert torch.equal(attend(*c, None), explicit_attention(*c, None)[0]) is explicit


def test_nothing_is_built_where_nothing_is_hidden() -> None:
    c = case("sdpa")
    assert bias(c, None) is None
    assert bias(c, torch.ones(2, 7, dtype=torch.int64)) is None
    assert bias(c, ragged(2, 7, 1)) is not None


def test_documents_see_themselves_alone() -> None:
    c = case("sdpa", batch=1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    embeddings = torch.zeros(1, 7, HEADS * WIDTH)
    found = attend(*c, attention_bias(c.block.config, embeddings, real, documents))
    for start, end in ((0, 3), (3, 5), (5, 6)):
        alone = Case(c.block, *(x[:, :, start:end] for x in c[1:]))
        torch.testing.assert_close(found[:, start:end], attend(*alone, None), rtol=0, atol=2e-6)
