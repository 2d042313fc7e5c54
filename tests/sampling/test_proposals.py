"""Candidates, how sure the model is of them, guidance, and the noise behind draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import noise
from reference.sampler import RANK, TOKEN, guided, softmax
from torch import Tensor

from dllm.diffusion.noise import keyed_uniform
from dllm.sampling.proposals import Keys, Proposals, Question, _columns, _reduce, chance, guide
from dllm.sampling.proposals import propose as propose_at

int64s = st.integers(-(1 << 63), (1 << 63) - 1)
temperatures = st.sampled_from([0.0, 0.2, 1.0, 3.0])
vetoes = st.sampled_from([(), (0,), (2, 4)])


def some_logits(seed: int, rows: int = 6, vocabulary: int = 7) -> Tensor:
    return (12 * keyed_uniform(seed, torch.arange(rows)[:, None], torch.arange(vocabulary)) - 6).float()


def keys_of(seed: int, rows: int, request: int = 0, step: int = 0) -> Keys:
    return Keys(torch.full((rows,), seed), torch.full((rows,), request), torch.arange(rows), torch.full((rows,), step))


def some_of(keys: Keys, some: list[int]) -> Keys:
    return Keys(*(key[some] for key in keys))


def ask(logits: Tensor, temperature: float, never: tuple[int, ...], keys: Keys, columns: int = 0) -> Proposals:
    """Logits as the states of a head that changes nothing; through chunks of so many columns."""
    temperatures = torch.full((len(logits),), temperature, dtype=torch.float64) if temperature > 0 else None
    question = Question(keys, never, temperatures, needs=frozenset({"second", "entropy"}))
    if not columns:
        return propose_at(torch.nn.Identity(), logits, question)
    head = torch.nn.Linear(logits.shape[1], logits.shape[1], bias=False)
    torch.nn.init.eye_(head.weight)
    with torch.no_grad():
        return _reduce(_columns(head.to(logits.dtype), logits, columns), question)


def propose(
    logits: Tensor, temperature: float, never: tuple[int, ...], keys: Keys, columns: int = 0
) -> tuple[Tensor, Tensor]:
    return ask(logits, temperature, never, keys, columns)[:2]


@given(int64s, int64s, st.integers(0, 1000), temperatures, vetoes, st.integers(0, 8))
def test_equals_the_slow_one_token_by_token_in_chunks_of_any_width(
    seed: int, request: int, step: int, temperature: float, never: tuple[int, ...], columns: int
) -> None:
    logits = some_logits(seed)
    found = ask(logits, temperature, never, keys_of(seed, 6, request, step), columns)
    tokens, probabilities = found[:2]
    for place, row in enumerate(logits.tolist()):
        row = [-math.inf if token in never else value for token, value in enumerate(row)]
        noised = row
        if temperature > 0:
            noised = [
                value / temperature + noise.gumbel(seed, TOKEN, request, place, step, token)
                for token, value in enumerate(row)
            ]
        assert tokens[place] == noised.index(max(noised))
        p = softmax(row)
        assert probabilities[place].item() == pytest.approx(p[int(tokens[place])], rel=1e-5)
        assert found.best_N[place].item() == pytest.approx(max(p), rel=1e-5)
        assert found.second_N is not None
        assert found.second_N[place].item() == pytest.approx(sorted(p)[-2], rel=1e-5)
        assert found.entropy_N is not None
        assert found.entropy_N[place].item() == pytest.approx(-sum(x * math.log(x) for x in p if x), abs=1e-5)


@given(int64s, temperatures, vetoes, st.randoms())
def test_a_candidate_depends_on_its_own_logits_and_key(
    seed: int, temperature: float, never: tuple[int, ...], random: Any
) -> None:
    logits, keys = some_logits(seed), keys_of(seed, 6, request=4, step=2)
    whole = propose(logits, temperature, never, keys)
    some = random.sample(range(6), random.randint(1, 6))
    part = propose(logits[some], temperature, never, some_of(keys, some))
    assert torch.equal(part[0], whole[0][some])
    torch.testing.assert_close(part[1], whole[1][some], rtol=1e-6, atol=0)
    assert torch.equal(chance(some_of(keys, some)), chance(keys)[some])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("never", [(), (3,)])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float, never: tuple[int, ...]) -> None:
    draws = 40_000
    row = torch.tensor([0.0, 1.0, -2.0, 2.0, 0.5])
    tokens, probabilities = propose(row.expand(draws, -1), temperature, never, keys_of(9, draws))
    counts = torch.bincount(tokens, minlength=5)
    plain = row.index_fill(0, torch.tensor(never, dtype=torch.int64), -torch.inf)
    expected = draws * (plain / temperature).softmax(0)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected) ** 2 / expected)[possible].sum()
    assert statistic < 20  # 4 degrees of freedom: 1 in 2000 by chance
    # how sure the model is has no temperature
    torch.testing.assert_close(probabilities, plain.softmax(0)[tokens])


def test_at_temperature_zero_no_key_matters_and_the_first_of_equals_is_taken() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    for seed in range(3):
        tokens, probabilities = propose(logits, 0.0, (), keys_of(seed, 2))
        assert tokens.tolist() == [1, 0]
        assert probabilities[1].item() == pytest.approx(0.25)
    assert propose(logits, 0.0, (0, 1), keys_of(0, 2))[0].tolist() == [2, 2]


@pytest.mark.parametrize("part", ["seed", "request", "position", "step"])
def test_noise_differs_in_every_part_of_the_key(part: str) -> None:
    logits = torch.zeros(64, 11)
    base: dict[str, Any] = {
        "seed": torch.full((64,), 1),
        "request": torch.arange(64),
        "position": torch.arange(64),
        "step": torch.arange(64),
    }
    other = {**base, part: base[part] + 1}
    one, two = (Keys(*case.values()) for case in (base, other))
    assert (propose(logits, 1.0, (), one)[0] != propose(logits, 1.0, (), two)[0]).float().mean() > 0.7
    assert not torch.isclose(chance(one), chance(two)).any()


@given(int64s, int64s, st.integers(0, 1000))
def test_chance_is_keyed_apart_from_the_tokens_noise(seed: int, request: int, step: int) -> None:
    drawn = chance(keys_of(seed, 5, request, step))
    expected = [noise.uniform(seed, RANK, request, place, step) for place in range(5)]
    torch.testing.assert_close(drawn.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_fp32(dtype: torch.dtype) -> None:
    logits = some_logits(3).to(dtype)
    tokens, probabilities = propose(logits, 0.0, (), keys_of(0, 6))
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, logits.float().softmax(1).max(1).values)
    assert torch.equal(tokens, logits.float().argmax(1))


@settings(max_examples=300)
@given(int64s, st.sampled_from([-300.0, 0.0, 30.0, 300.0]))
def test_probabilities_keep_their_last_digits_whatever_the_size_of_the_logits(seed: int, shift: float) -> None:
    """1 - 1e-6 is not 1: the surest place is chosen by such differences."""
    logits = 3 * some_logits(seed) + shift
    best_N2 = logits.double().softmax(1).topk(2).values
    found = ask(logits, 0.0, (), keys_of(0, 6), columns=3)
    assert found.second_N is not None
    torch.testing.assert_close(found.probability_N.double(), best_N2[:, 0], rtol=4e-7, atol=0)
    torch.testing.assert_close(found.second_N.double(), best_N2[:, 1], rtol=4e-6, atol=0)


def test_logits_are_left_as_they_were() -> None:
    logits = some_logits(1)
    before = logits.clone()
    propose(logits, 1.0, (0, 1), keys_of(0, 6))
    assert torch.equal(logits, before)


@given(int64s, st.floats(0, 8, width=32))
def test_guidance_is_the_published_formula(seed: int, scale: float) -> None:
    conditional, unconditional = some_logits(seed), some_logits(seed + 1 if seed < 0 else seed - 1)
    together = guide(conditional, unconditional, scale)
    expected = unconditional + (scale + 1) * (conditional - unconditional)
    assert torch.equal(together, expected)
    rows = zip(conditional.flatten().tolist(), unconditional.flatten().tolist(), strict=True)
    torch.testing.assert_close(together.flatten(), torch.tensor([guided(c, u, scale) for c, u in rows]))
    torch.testing.assert_close(guide(conditional, conditional, scale), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), conditional, rtol=1e-5, atol=1e-5)
