"""Keyed random numbers: the same for the same key, random for another."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import noise as slow

from dllm.diffusion import noise
from dllm.diffusion.noise import keyed_bits, keyed_gumbel, keyed_permutation, keyed_uniform

LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1
EDGES = [LOWEST, LOWEST + 1, -1, 0, 1, HIGHEST - 1, HIGHEST]
int64s = st.integers(LOWEST, HIGHEST) | st.sampled_from(EDGES)


def chi_square(counts: torch.Tensor, expected: torch.Tensor | float) -> float:
    """How many standard deviations the statistic lies above its mean; about normal where there are many bins."""
    statistic = ((counts.double() - expected) ** 2 / expected).sum().item()
    freedom = counts.numel() - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@given(st.lists(int64s, min_size=1, max_size=5))
def test_equals_splitmix_in_whole_numbers(key: list[int]) -> None:
    assert keyed_bits(*key).item() % 2**64 == slow.bits(*key)
    assert keyed_bits(*(torch.tensor(part) for part in key)).item() % 2**64 == slow.bits(*key)
    assert keyed_uniform(*key).item() == slow.uniform(*key)
    assert keyed_gumbel(*key).item() == pytest.approx(slow.gumbel(*key), rel=1e-13, abs=1e-15)


def test_numbers_never_change() -> None:
    """Published runs depend on them. The first line is the first number of the published SplitMix64, seed 0."""
    assert slow.mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert keyed_bits(0).item() % 2**64 == 0x0397AB29740681D9
    assert keyed_bits(1, 2, 3).item() % 2**64 == 0x003F53A1FE784BBF
    assert keyed_bits(-1, HIGHEST).item() % 2**64 == 0xE7842386FC25E1D8


@given(st.integers(-(2**70), 2**70))
def test_python_integers_count_modulo_64_bits(key: int) -> None:
    assert torch.equal(keyed_bits(key), keyed_bits(key % 2**64))
    assert torch.equal(keyed_bits(key, 1), keyed_bits(key + 2**64, 1))


@given(st.lists(int64s, min_size=1, max_size=4), st.lists(int64s, min_size=1, max_size=4), int64s)
def test_an_element_does_not_depend_on_the_shape_that_it_is_in(rows: list[int], columns: list[int], seed: int) -> None:
    row_R1, column_C = torch.tensor(rows)[:, None], torch.tensor(columns)
    whole = keyed_bits(seed, row_R1, column_C)
    assert whole.shape == (len(rows), len(columns))
    assert whole.dtype == torch.int64
    for (r, row), (c, column) in itertools.product(enumerate(rows), enumerate(columns)):
        assert whole[r, c] == keyed_bits(seed, row, column)
    assert torch.equal(whole.T, keyed_bits(seed, row_R1.T, column_C[:, None]))


def test_edge_keys_give_different_numbers() -> None:
    keys = [
        *itertools.product(EDGES, repeat=1),
        *itertools.product(EDGES, repeat=2),
        *itertools.product(EDGES, repeat=3),
    ]
    assert len({keyed_bits(*key).item() for key in keys}) == len(keys)


@pytest.mark.parametrize("key", [(7,), (7, 3), (7, 3, -1)])
@pytest.mark.parametrize("stride", [1, -1, 1000, 1 << 32, 1 << 46])
def test_consecutive_keys_give_uniform_numbers(key: tuple[int, ...], stride: int) -> None:
    places = torch.arange(1 << 16) * stride
    for part in range(len(key) + 1):
        u = keyed_uniform(*key[:part], places, *key[part:])
        assert abs(chi_square(torch.histc(u, 256, 0, 1), 256.0)) < 4
        pairs = (u[:-1] * 16).floor() * 16 + (u[1:] * 16).floor()
        assert abs(chi_square(torch.histc(pairs, 256, 0, 256), (len(u) - 1) / 256)) < 4


@pytest.mark.parametrize("bit", range(0, 64, 3))
def test_one_bit_of_a_key_turns_half_the_bits(bit: int) -> None:
    keys = torch.arange(512)
    turned = keys ^ ((1 << bit) if bit < 63 else LOWEST)
    for one, other in [((keys,), (turned,)), ((keys, 5), (turned, 5)), ((5, keys), (5, turned))]:
        differ = keyed_bits(*one) ^ keyed_bits(*other)
        share_per_bit = torch.stack([(differ >> place) & 1 for place in range(64)]).double().mean(1)
        assert abs(share_per_bit.mean() - 0.5) < 0.015
        assert (share_per_bit - 0.5).abs().max() < 0.12


def test_the_extreme_bits_stay_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "keyed_bits", lambda *key, device=None: torch.tensor([0, -1, LOWEST, HIGHEST]))
    u = keyed_uniform(0)
    assert (u > 0).all()
    assert (u < 1).all()
    assert u.argsort().tolist() == [0, 3, 2, 1]
    assert keyed_gumbel(0).isfinite().all()


def test_gumbel_has_its_mean_and_variance() -> None:
    gumbel = keyed_gumbel(11, torch.arange(200_000))
    assert gumbel.dtype == torch.float64
    assert gumbel.mean().item() == pytest.approx(0.5772156649, abs=4 * math.pi / math.sqrt(6 * 200_000))
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_argmax_draws_from_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0], dtype=torch.float64)
    draws = 60_000
    gumbel = keyed_gumbel(3, torch.arange(draws)[:, None], torch.arange(len(logits)))
    counts = torch.bincount((logits / temperature + gumbel).argmax(1), minlength=len(logits))
    assert abs(chi_square(counts, draws * (logits / temperature).softmax(0))) < 4


@given(st.integers(0, 300), st.lists(int64s, min_size=1, max_size=3))
def test_a_permutation_holds_every_place_once(n: int, key: list[int]) -> None:
    permutation = keyed_permutation(n, *key)
    assert permutation.dtype == torch.int64
    assert permutation.sort().values.tolist() == list(range(n))
    assert torch.equal(permutation, keyed_permutation(n, *key))


def test_every_permutation_is_equally_likely() -> None:
    places = {order: place for place, order in enumerate(itertools.permutations(range(4)))}
    drawn = torch.tensor([places[tuple(keyed_permutation(4, 5, key).tolist())] for key in range(4800)])
    assert abs(chi_square(torch.bincount(drawn, minlength=24), 200.0)) < 4


def test_numbers_are_made_on_the_device_of_the_key() -> None:
    on_meta = torch.empty(3, dtype=torch.int64, device="meta")
    assert keyed_uniform(1, on_meta).device.type == "meta"
    assert keyed_uniform(1, 2, device="meta").device.type == "meta"
    assert keyed_uniform(1, 2).device.type == "cpu"


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers() -> None:
    key = torch.arange(-5000, 5000)
    assert torch.equal(keyed_bits(3, key.cuda()).cpu(), keyed_bits(3, key))
    assert torch.equal(keyed_uniform(3, key.cuda()).cpu(), keyed_uniform(3, key))
    torch.testing.assert_close(keyed_gumbel(3, key.cuda()).cpu(), keyed_gumbel(3, key), rtol=1e-12, atol=1e-12)
