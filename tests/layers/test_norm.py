"""RMSNorm: the formula in fp64, whatever the dtype that comes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.layers import rms_norm
from torch import Tensor

from dllm.layers.norm import RMSNorm


def norm_and_input(width: int, seed: int, scale: float = 1.0, eps: float = 1e-5) -> tuple[RMSNorm, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    norm = RMSNorm(width, eps)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
    return norm, torch.randn(2, 3, width, generator=generator) * scale


@given(
    width=st.integers(1, 70),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    seed=st.integers(0, 2**31),
)
def test_is_the_formula(width: int, scale: float, eps: float, seed: int) -> None:
    norm, x = norm_and_input(width, seed, scale, eps)
    expected = rms_norm(x, norm.weight.detach(), eps)
    torch.testing.assert_close(norm(x).double(), expected, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_costs_two_roundings_and_no_more(dtype: torch.dtype) -> None:
    norm, x = norm_and_input(4096, seed=1)
    norm, x = norm.to(dtype), x.to(dtype)
    expected = rms_norm(x, norm.weight.detach(), norm.eps)
    out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-7)


def test_squares_do_not_overflow_in_fp16() -> None:
    norm, x = norm_and_input(32, seed=2, scale=2000.0)
    half = x.half()
    torch.testing.assert_close(norm.half()(half).float(), norm.float()(half.float()), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [0.25, 3.0, 100.0])
def test_the_scale_of_the_input_drops_out(scale: float) -> None:
    norm, x = norm_and_input(48, seed=3, eps=0.0)
    torch.testing.assert_close(norm(x * scale), norm(x), rtol=1e-6, atol=1e-6)


def test_zeros_stay_zeros() -> None:
    norm, x = norm_and_input(16, seed=4)
    assert torch.equal(norm(torch.zeros_like(x)), torch.zeros_like(x))


def test_autocast_leaves_the_statistics_in_fp32() -> None:
    norm, x = norm_and_input(64, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = norm(x)
    assert torch.equal(inside, norm(x))


def test_gradients_are_those_of_the_formula() -> None:
    norm, x = norm_and_input(8, seed=6)
    inputs = (x.double().requires_grad_(), norm.weight.detach().double().requires_grad_())

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps) * weight

    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    expected = torch.autograd.grad((formula(*inputs) * direction).sum(), inputs)
    found = torch.autograd.grad((norm(x.requires_grad_()) * direction).sum(), (x, norm.weight))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_it_says_its_width_and_eps() -> None:
    assert repr(RMSNorm(64, 1e-6)) == "RMSNorm(64, eps=1e-06)"
