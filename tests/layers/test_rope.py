"""Rotary positions: complex multiplication, written another way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.layers import rotated
from torch import Tensor

from dllm.layers.rope import rotary_tables, rotate


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turn(x_BHLK: Tensor, positions: list[list[int]], theta: float = 10000.0) -> Tensor:
    return rotate(x_BHLK, *rotary_tables(torch.tensor(positions), x_BHLK.shape[-1], theta))


@settings(max_examples=40)
@given(
    positions=st.lists(st.integers(0, 8192), min_size=1, max_size=4),
    half=st.integers(1, 6),
    heads=st.integers(1, 3),
    theta=st.sampled_from([10000.0, 50000, 500000.0]),
)
def test_is_complex_multiplication(positions: list[int], half: int, heads: int, theta: float) -> None:
    other = [position // 2 for position in positions]
    x = random(2, heads, len(positions), 2 * half)
    found = turn(x, [positions, other], theta)
    # an angle of fp32 has a relative error of a few 2^-24, so that of p radians is off by p times that
    bound = float(x.abs().max()) * 5e-7 * (1 + max(positions))
    torch.testing.assert_close(found.double(), rotated(x, torch.tensor([positions, other]), theta), rtol=0, atol=bound)


def test_position_zero_changes_nothing() -> None:
    x = random(1, 2, 3, 8)
    assert torch.equal(turn(x, [[0, 0, 0]]), x)


def test_the_length_of_every_pair_is_kept() -> None:
    x = random(2, 2, 3, 8)
    found = turn(x, [[3, 100, 4095], [0, 1, 2]])
    lengths = [torch.hypot(*y.chunk(2, dim=-1)) for y in (found, x)]
    torch.testing.assert_close(*lengths, rtol=1e-6, atol=1e-6)


def test_turning_back_gives_the_vector_back() -> None:
    x = random(1, 2, 3, 8)
    torch.testing.assert_close(turn(turn(x, [[1, 7, 300]]), [[-1, -7, -300]]), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1, 13, 400])
def test_products_depend_on_distance_alone(shift: int) -> None:
    query, key, here = random(1, 1, 5, 16), random(1, 1, 5, 16, seed=1), [[0, 1, 2, 5, 9]]
    there = [[position + shift for position in here[0]]]
    products = [turn(query, place) @ turn(key, place).transpose(2, 3) for place in (here, there)]
    torch.testing.assert_close(*products, rtol=0, atol=2e-7 * 16 * (1 + shift))


def test_different_distances_give_different_products() -> None:
    query, key = random(1, 1, 2, 16), random(1, 1, 2, 16, seed=1)
    products = [turn(query, place) @ turn(key, place).transpose(2, 3) for place in ([[0, 1]], [[0, 2]])]
    assert (products[0] - products[1]).abs().max() > 0.1


def test_every_row_has_its_own_positions() -> None:
    x = random(2, 2, 3, 8)
    positions = [[0, 1, 2], [5, 0, 9]]
    both = turn(x, positions)
    for row in range(2):
        assert torch.equal(both[row : row + 1], turn(x[row : row + 1], [positions[row]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rotated_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    x = random(1, 2, 3, 8).to(dtype)
    found = turn(x, [[1, 50, 4000]])
    assert found.dtype == dtype
    assert torch.equal(found, turn(x.float(), [[1, 50, 4000]]).to(dtype))


def test_autocast_leaves_angles_and_rotation_in_fp32() -> None:
    x = random(1, 2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tables = rotary_tables(torch.tensor([[1, 50, 4000]]), 8, 10000.0)
        inside = rotate(x, *tables)
    assert {table.dtype for table in tables} == {torch.float32}
    assert torch.equal(inside, turn(x, [[1, 50, 4000]]))
