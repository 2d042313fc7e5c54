"""The corruption plan: the right masks as often as they should be, and always the same ones for a sample."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.corruption import masks_of, time_of
from reference.loss import pattern_probability
from torch import Tensor

from dllm.diffusion.corruption import Corrupted, CorruptionPlan
from dllm.diffusion.schedule import mask_probability

MASK = 99
seeds = st.integers(-(1 << 63), (1 << 63) - 1)
maskings = st.sampled_from(["bernoulli", "exact"])
spreads = st.sampled_from(["stratified", "independent"])


def plan_of(**settings: Any) -> CorruptionPlan:
    return CorruptionPlan(**{"group": 8, **settings})


def corrupt(plan: CorruptionPlan, maskable: Tensor, samples: Tensor) -> Corrupted:
    ids = torch.arange(maskable.shape[1]).expand_as(maskable)
    return plan.corrupt(ids, maskable, samples, MASK)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, what may be masked, and sample numbers from any place of a run."""
    rows, length = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    bits = st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)
    maskable = torch.tensor(draw(bits)).view(rows, length)
    samples = draw(st.lists(st.integers(0, 1 << 40), min_size=rows, max_size=rows))
    return torch.arange(rows * length).view(rows, length) % 50, maskable, torch.tensor(samples)


@given(batches(), seeds, maskings, spreads, st.integers(1, 9), st.sampled_from([(0.0, 1.0), (0.2, 0.7)]))
def test_equals_the_slow_one_token_by_token(
    batch: tuple[Tensor, Tensor, Tensor], seed: int, masking: Any, times: Any, group: int, bounds: tuple[float, float]
) -> None:
    """Its keys are those of docs/symbols.md: a run resumed by a later version goes on with the masks it began with."""
    ids, maskable, samples = batch
    low, high = bounds
    plan = CorruptionPlan(group=group, times=times, masking=masking, seed=seed, min_time=low, max_time=high)
    _, masked, weight, t = plan.corrupt(ids, maskable, samples, MASK)
    for row, sample in enumerate(samples.tolist()):
        expected = masks_of(plan, maskable[row].tolist(), sample)
        assert t[row].item() == pytest.approx(time_of(plan, sample), rel=1e-12)
        assert masked[row].nonzero()[:, 0].tolist() == sorted(expected)
        assert weight[row][masked[row]].tolist() == pytest.approx([expected[i] for i in sorted(expected)], rel=1e-6)


@given(batches(), seeds, maskings, spreads, st.integers(1, 9))
def test_only_maskable_tokens_become_masks_and_only_masks_weigh(
    batch: tuple[Tensor, Tensor, Tensor], seed: int, masking: Any, times: Any, group: int
) -> None:
    ids, maskable, samples = batch
    before = ids.clone()
    plan = CorruptionPlan(group=group, times=times, masking=masking, seed=seed)
    xt, masked, weight, t = plan.corrupt(ids, maskable, samples, MASK)
    assert torch.equal(ids, before)
    assert not (masked & ~maskable).any()
    assert (xt[masked] == MASK).all()
    assert torch.equal(xt[~masked], ids[~masked])
    assert ((weight > 0) == masked).all()
    assert weight.dtype == torch.float32
    assert t.dtype == torch.float64
    assert torch.equal(t, plan.sample_times(samples))
    for row in range(len(ids)):
        n = int(maskable[row].sum())
        if masking == "exact":
            k = int(masked[row].sum())
            assert k == (min(n, math.floor(t[row].item() * n) + 1) if n else 0)
            expected = n / max(k, 1)
        else:
            expected = 1 / mask_probability(t[row]).item()
        assert weight[row][masked[row]].tolist() == pytest.approx([expected] * int(masked[row].sum()), rel=1e-6)


@given(batches(), seeds, maskings, spreads, st.integers(1, 9), st.integers(0, 4), st.randoms())
def test_a_sample_has_its_masks_in_any_batch_order_and_padding(
    batch: tuple[Tensor, Tensor, Tensor], seed: int, masking: Any, times: Any, group: int, padding: int, random: Any
) -> None:
    ids, maskable, samples = batch
    plan = CorruptionPlan(group=group, times=times, masking=masking, seed=seed)
    whole = plan.corrupt(ids, maskable, samples, MASK)
    order = random.sample(range(len(ids)), random.randint(1, len(ids)))
    wide = torch.nn.functional.pad(ids[order], (0, padding), value=7)
    part = plan.corrupt(wide, torch.nn.functional.pad(maskable[order], (0, padding)), samples[order], MASK)
    length = ids.shape[1]
    assert (part.xt_BL[:, length:] == 7).all()
    assert torch.equal(part.xt_BL[:, :length], whole.xt_BL[order])
    assert torch.equal(part.masked_BL[:, :length], whole.masked_BL[order])
    assert torch.equal(part.weight_BL[:, :length], whole.weight_BL[order])
    assert torch.equal(part.t_B, whole.t_B[order])


@given(batches(), seeds, st.integers(1, 12))
def test_a_row_that_is_cut_keeps_the_masks_of_what_is_left(
    batch: tuple[Tensor, Tensor, Tensor], seed: int, length: int
) -> None:
    ids, maskable, samples = batch
    plan = CorruptionPlan(group=4, seed=seed)
    whole = plan.corrupt(ids, maskable, samples, MASK)
    part = plan.corrupt(ids[:, :length], maskable[:, :length], samples, MASK)
    assert torch.equal(part.xt_BL, whole.xt_BL[:, :length])
    assert torch.equal(part.weight_BL, whole.weight_BL[:, :length])


@given(seeds, st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_exact_masks_hide_the_same_tokens_first_whatever_the_number(seed: int, first: int, second: int) -> None:
    maskable = torch.ones(1, 16, dtype=torch.bool)
    few, many = (
        corrupt(plan_of(masking="exact", seed=seed, min_time=low, max_time=low + 0.25), maskable, torch.tensor([first]))
        for low in (0.25, 0.75)
    )
    assert few.masked_BL.sum() < many.masked_BL.sum()
    assert not (few.masked_BL & ~many.masked_BL).any()
    other = corrupt(
        plan_of(masking="exact", seed=seed + 1, min_time=0.5), maskable.expand(64, -1), torch.arange(64) + second
    )
    assert len(set(map(tuple, other.masked_BL.tolist()))) > 48


@given(st.integers(1, 200), st.integers(0, 1 << 40), seeds)
def test_each_interval_of_a_step_holds_one_time(group: int, step: int, seed: int) -> None:
    times = CorruptionPlan(group=group, seed=seed).sample_times(step * group + torch.arange(group))
    assert (times * group).floor().sort().values.tolist() == list(range(group))
    gaps = torch.cat([times.sort().values, times.min()[None] + 1]).diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / group))


@given(st.integers(1, 60), seeds, st.floats(0, 0.9), st.floats(0.05, 1), spreads)
def test_bounds_stretch_the_times(group: int, seed: int, low: float, width: float, spread: Any) -> None:
    high = min(1.0, low + width)
    samples = 5 * group + torch.arange(group)
    whole = CorruptionPlan(group=group, seed=seed, times=spread)
    times = replace(whole, min_time=low, max_time=high).sample_times(samples)
    torch.testing.assert_close(times, low + (high - low) * whole.sample_times(samples))
    assert ((times >= low) & (times <= high)).all()
    if spread == "stratified":
        places = ((times - low) / (high - low) * group).floor()
        assert places.sort().values.tolist() == list(range(group))


@pytest.mark.parametrize("spread", ["stratified", "independent"])
def test_the_time_of_any_one_place_is_uniform_over_steps(spread: Any) -> None:
    steps = torch.arange(1600)
    for place in (0, 5):
        times = plan_of(times=spread).sample_times(steps * 8 + place)
        counts = torch.histc(times, 16, 0, 1)
        assert ((counts - 100) ** 2 / 100).sum() < 40  # 15 degrees of freedom: 1 in 2000 by chance
        assert abs(torch.corrcoef(torch.stack([times[1:], times[:-1]]))[0, 1]) < 0.1


def test_the_order_inside_a_step_changes_from_step_to_step() -> None:
    times = plan_of().sample_times(torch.arange(8 * 200)).view(200, 8)
    assert len({tuple(row.argsort().tolist()) for row in times}) > 190


def test_independent_times_do_not_know_the_group() -> None:
    samples = torch.arange(100)
    assert torch.equal(
        plan_of(times="independent").sample_times(samples),
        plan_of(times="independent", group=3).sample_times(samples),
    )


@pytest.mark.parametrize("masking", ["bernoulli", "exact"])
def test_steps_and_seeds_have_masks_of_their_own(masking: Any) -> None:
    maskable = torch.ones(8, 64, dtype=torch.bool)
    here = corrupt(plan_of(masking=masking, min_time=0.4, max_time=0.6), maskable, torch.arange(8)).masked_BL
    later = corrupt(plan_of(masking=masking, min_time=0.4, max_time=0.6), maskable, 8 + torch.arange(8)).masked_BL
    other = corrupt(plan_of(masking=masking, min_time=0.4, max_time=0.6, seed=1), maskable, torch.arange(8)).masked_BL
    for one, two in [(here, later), (here, other), (here[:4], here[4:])]:
        assert 0.4 < (one ^ two).float().mean() < 0.6  # two fair coins differ half the time


@pytest.mark.parametrize("masking", ["bernoulli", "exact"])
@pytest.mark.parametrize(
    ("low", "high", "eps"), [(0.0, 1.0, 1e-3), (0.3, 0.300001, 1e-3), (0.5, 1.0, 1e-3), (0.0, 0.5, 0.2)]
)
def test_every_set_of_masks_is_drawn_as_often_as_it_should_be(
    masking: Any, low: float, high: float, eps: float
) -> None:
    n, draws = 4, 1 << 15
    plan = CorruptionPlan(group=draws, masking=masking, min_time=low, max_time=high, eps=eps)
    # one place that must not be masked lies in between
    maskable = torch.tensor([True, True, False, True, True])
    masked = corrupt(plan, maskable.expand(draws, -1), torch.arange(draws)).masked_BL[:, maskable]
    patterns = (masked * torch.tensor([8, 4, 2, 1])).sum(1)
    counts = torch.bincount(patterns, minlength=1 << n).double()

    grid = low + (high - low) * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    expected = torch.zeros(1 << n, dtype=torch.float64)
    for pattern in range(1 << n):
        k = pattern.bit_count()
        if masking == "bernoulli":
            probabilities = [pattern_probability(k, n, p) for p in mask_probability(grid, eps).tolist()]
        else:
            probabilities = [(math.floor(t * n) + 1 == k) / math.comb(n, k) for t in grid.tolist()]
        expected[pattern] = draws * sum(probabilities) / len(probabilities)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected) ** 2 / expected)[possible].sum().item()
    assert statistic < 40  # 15 degrees of freedom at most: 1 in 2000 by chance


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 0}, "group=0: a step has at least one sample"),
        ({"times": "even"}, "times='even': it is 'stratified' or 'independent'"),
        ({"masking": "poisson"}, "masking='poisson': it is 'bernoulli' or 'exact'"),
        ({"eps": 0.0}, "eps=0.0: it lies between 0 and 1"),
        ({"eps": 1.0}, "eps=1.0: it lies between 0 and 1"),
        ({"min_time": 0.7, "max_time": 0.7}, "min_time=0.7, max_time=0.7: 0 <= min_time < max_time <= 1 is needed"),
        ({"min_time": -0.1}, "min_time=-0.1, max_time=1.0: 0 <= min_time"),
        ({"max_time": 1.5}, "min_time=0.0, max_time=1.5: 0 <= min_time"),
        ({"max_time": math.nan}, "min_time=0.0, max_time=nan: 0 <= min_time"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(**settings)
