"""The bound of the likelihood: its mean against every set of masks, its spread, and what its masks depend on."""

from __future__ import annotations

import re
from functools import partial
from itertools import combinations, permutations
from math import comb, factorial, sqrt

import pytest
import torch
from reference.predictor import HashPredictor
from torch import Tensor

from dllm.diffusion.likelihood import Text, likelihood
from dllm.diffusion.objective import masked_nll

V, MASK = 7, 6


def nll(
    predictor: HashPredictor, xt_RL: Tensor, masked_RL: Tensor, targets_M: Tensor, real_RL: Tensor | None = None
) -> Tensor:
    return masked_nll(predictor(xt_RL, real_RL, masked_RL), targets_M)


def of_set(predictor: HashPredictor, ids: Tensor, hidden: tuple[int, ...]) -> Tensor:
    """-log p of each token of a set that is masked, given all others, in reading order."""
    masked = torch.zeros(1, len(ids), dtype=torch.bool)
    masked[0, list(hidden)] = True
    return nll(predictor, ids.masked_fill(masked[0], MASK)[None], masked, ids[masked[0]]).double()


def every_set(predictor: HashPredictor, ids: Tensor, prompt_length: int) -> tuple[float, float]:
    """Mean and variance of one sample whose k is drawn by itself: over every k, and every set of k tokens."""
    places = range(prompt_length, len(ids))
    n = len(places)
    mean = square = 0.0
    for k in range(1, n + 1):
        for hidden in combinations(places, k):
            value = float(of_set(predictor, ids, hidden).sum()) * n / k
            mean += value / n / comb(n, k)
            square += value**2 / n / comb(n, k)
    return mean, square - mean**2


IDS = torch.tensor([3, 0, 5, 2, 2, 1])


@pytest.mark.parametrize(("length", "prompt_length"), [(1, 0), (5, 0), (6, 2)])
def test_the_mean_is_that_over_every_set_of_masks(length: int, prompt_length: int) -> None:
    predictor, ids, seeds, samples = HashPredictor(V), IDS[:length], 60, 6
    texts = [Text(ids, prompt_length, number) for number in range(seeds)]
    means = likelihood(partial(nll, predictor), texts, MASK, samples=samples, rows=seeds).mean(1)
    mean, variance = every_set(predictor, ids, prompt_length)
    assert abs(float(means.mean()) - mean) <= 4 * float(means.std()) / sqrt(seeds) + 1e-6
    # one sample's variance over their number is what samples drawn by themselves would have
    assert float(means.var()) <= 1.3 * variance / samples + 1e-9


def test_strata_lower_the_variance_where_the_number_of_masks_decides() -> None:
    predictor, samples = HashPredictor(V, spread=0.0), 6  # no logit differs: a sample is A log V whatever is masked
    only_k = partial(_cost_of_the_number, predictor)
    texts = [Text(IDS, number=number) for number in range(20)]
    spread = likelihood(only_k, texts, MASK, samples=samples).mean(1)
    assert float(spread.std()) < 1e-4  # each k once, for every text
    alone = likelihood(only_k, texts, MASK, samples=1).mean(1)
    assert float(alone.std()) > 0.1


def _cost_of_the_number(
    predictor: HashPredictor, xt_RL: Tensor, masked_RL: Tensor, targets_M: Tensor, real_RL: Tensor
) -> Tensor:
    k_R = masked_RL.sum(1)
    return nll(predictor, xt_RL, masked_RL, targets_M, real_RL) * k_R[masked_RL.nonzero(as_tuple=True)[0]]


def test_it_is_the_mean_over_all_orders_of_writing() -> None:
    """The twin that writes token by token: LLaDA's eq. 6 is what a model of any order gives on the mean."""
    predictor, ids = HashPredictor(V), IDS[:4]
    total = 0.0
    for order in permutations(range(4)):
        for place, token in enumerate(order):  # it is written while those after it are hidden
            hidden = order[place:]
            total += float(of_set(predictor, ids, hidden)[sorted(hidden).index(token)])
    assert total / factorial(4) == pytest.approx(every_set(predictor, ids, 0)[0], rel=1e-9)


def test_every_number_of_masks_is_taken_equally_often() -> None:
    predictor = HashPredictor(V)
    likelihood(partial(nll, predictor), [Text(IDS, number=3)], MASK, samples=12, rows=5)
    counts = torch.cat([(ids == MASK).sum(1) for ids, _, _ in predictor.shown])
    assert sorted(counts.tolist()) == sorted([1, 2, 3, 4, 5, 6] * 2)


def test_company_and_rows_at_a_time_change_nothing() -> None:
    predict = partial(nll, HashPredictor(V))
    texts = [Text(IDS, 2, 4), Text(IDS[:3], 0, 5), Text(IDS[1:], 1, 6)]
    alone = [likelihood(predict, [text], MASK, samples=7, rows=1)[0] for text in texts]
    for rows in (2, 5, 100):
        together = likelihood(predict, texts, MASK, samples=7, rows=rows)
        assert together.shape == (3, 7)
        assert torch.equal(together, torch.stack(alone))


def test_two_prompts_see_the_text_under_the_same_masks() -> None:
    shown = []
    for prompt in ([4], [1, 5, 0]):
        predictor = HashPredictor(V)
        ids = torch.cat([torch.tensor(prompt), IDS])
        likelihood(partial(nll, predictor), [Text(ids, len(prompt), number=2)], MASK, samples=8)
        shown.append(torch.cat([xt[:, len(prompt) :] for xt, _, _ in predictor.shown]))
        assert all(xt[:, : len(prompt)].tolist() == [prompt] * len(xt) for xt, _, _ in predictor.shown)
    assert torch.equal(*shown)


def test_texts_and_seeds_have_masks_of_their_own() -> None:
    predict = partial(nll, HashPredictor(V))
    found = [
        likelihood(predict, [Text(IDS, number=n)], MASK, samples=5, seed=s).tolist()
        for n, s in ((0, 0), (1, 0), (0, 1))
    ]
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize("prompt_length", [6, 9, -1])
def test_a_text_without_a_token_behind_its_prompt(prompt_length: int) -> None:
    message = f"A text of 6 tokens with prompt_length={prompt_length}: at least one token behind it is needed"
    with pytest.raises(ValueError, match=re.escape(message)):
        likelihood(partial(nll, HashPredictor(V)), [Text(IDS, prompt_length)], MASK)


@pytest.mark.parametrize(("samples", "rows"), [(0, 4), (4, 0)])
def test_nothing_to_estimate_with(samples: int, rows: int) -> None:
    with pytest.raises(ValueError, match=f"samples={samples}, rows={rows}: at least one of each is needed"):
        likelihood(partial(nll, HashPredictor(V)), [Text(IDS)], MASK, samples=samples, rows=rows)


def test_no_texts() -> None:
    assert likelihood(partial(nll, HashPredictor(V)), [], MASK, samples=3).shape == (0, 3)
