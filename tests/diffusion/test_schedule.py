"""The schedule: how much is masked, what it weighs, how fast it goes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.sampler import shares

from dllm.diffusion.schedule import EPS, alpha, elbo_weight, mask_probability, reveal_counts

times = st.floats(0, 1, allow_subnormal=False)


@given(st.floats(1e-6, 1))
def test_the_weight_is_the_bounds_own(t: float) -> None:
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    alpha_t = alpha(time)
    (slope,) = torch.autograd.grad(alpha_t, time)
    expected = -slope / (1 - alpha_t)
    torch.testing.assert_close(elbo_weight(1 - alpha_t), expected, rtol=1e-9, atol=0)
    # with eps the schedule is 1 - alpha stretched to begin at eps: the same weight at the same share of masks
    torch.testing.assert_close(mask_probability(time, 0.0), 1 - alpha_t, rtol=1e-9, atol=0)


@given(times, st.floats(1e-6, 0.5))
def test_probability_runs_from_eps_to_one_in_a_straight_line(t: float, eps: float) -> None:
    time = torch.tensor([0.0, t, 1.0], dtype=torch.float64)
    start, here, end = mask_probability(time, eps).tolist()
    assert (start, end) == pytest.approx((eps, 1))
    assert here == pytest.approx(start + t * (end - start))
    assert elbo_weight(mask_probability(time, eps)).max().item() <= (1 + 1e-12) / eps


def test_eps_is_that_of_the_published_training() -> None:
    assert EPS == 1e-3
    assert mask_probability(torch.zeros(1)).item() == pytest.approx(1e-3)


def test_a_token_counts_once_in_expectation_at_every_time() -> None:
    p = mask_probability(torch.linspace(0, 1, 101, dtype=torch.float64))
    torch.testing.assert_close(p * elbo_weight(p), torch.ones_like(p))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(1, 70))
def test_reveals_are_shared_evenly_and_the_first_steps_take_what_is_left(masked: list[int], steps: int) -> None:
    counts = reveal_counts(torch.tensor(masked), steps)
    assert counts.shape == (len(masked), steps)
    assert counts.dtype == torch.int64
    assert counts.sum(1).tolist() == masked
    assert (counts.max(1).values - counts.min(1).values <= 1).all()
    assert (counts.diff(dim=1) <= 0).all()
    assert counts.tolist() == [shares(row, steps) for row in masked]


@pytest.mark.parametrize("steps", [0, -3])
def test_no_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps={steps}: at least one step is needed"):
        reveal_counts(torch.tensor([4]), steps)
