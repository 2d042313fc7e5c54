"""Which candidates to commit: pure functions of the statistics of the places of the current blocks.

| policy | a step commits | takes back |
|---|---|---|
| fixed | as many as the schedule says, the surest first | |
| threshold | all whose confidence is at least `threshold` | |
| factor | the n surest, n the largest with (n + 1)(1 - c_(n)) < `factor` | |
| entropy_bound | the k of least entropy, k the largest with sum(H) - max(H) <= `gamma` | |
| klass | all above `threshold` whose prediction is stable, KL < `kl_threshold` for `kl_steps` steps | |
| wino | all above `threshold` | what a shadow mask gives less than `verify_threshold`, fewer than were committed |
| hierarchical | all above `threshold`; the surest of each run of masks, if above `low_threshold` | |
| remdm | the schedule's number, and one for each taken back | the `eta`-th part, those that were least sure |

Each commits at least one open place of every row that has one, and commits more than it takes back: a block of m masks
takes at most m steps. What is equal goes to the leftmost. Nothing is read back to the host, and no row looks at another.
Options are numbers of `dllm.sampling.config.POLICY_OPTIONS`; they are compared in fp32, as confidences are.

Where ends come last (`eos_last`), their confidence is 2 lower: no threshold lets them pass, and they are committed when
nothing else is open.

Shapes: R rows, W places of the widest current block (at least 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.sampling.config import PolicyName
from dllm.sampling.statistics import Statistics


class Decision(NamedTuple):
    """What a step does to the places of the current blocks."""

    commit_RW: Tensor
    """bool [R, W]: these candidates are written; open places all."""
    remask_RW: Tensor | None
    """bool [R, W]: these tokens become masks again; committed places all. None for a policy that takes nothing back."""
    memory_RW: Tensor
    """fp32 [R, W]: what the policy wants to be given at the block's next step."""


class Policy(NamedTuple):
    """A rule, and what it has to be given."""

    decide: Callable[..., Decision]
    """(statistics, memory_RW, count_R, **options) -> Decision; memory_RW is fp32 [R, W], zeros at a block's first step, and
    count_R int64 [R], the number of tokens that the fixed schedule commits now."""
    needs: frozenset[str] = frozenset()
    """Statistics beyond the confidence: "entropy", "change", "verified"."""
    revocable: bool = False
    """Whether it takes tokens back."""


def most_confident(confidence_RW: Tensor, open_RW: Tensor, count_R: Tensor) -> Tensor:
    """The `count` open positions of each row with the highest confidence; of equal ones the leftmost.

    Args:
        confidence_RW: any float [R, W], finite where open; larger is surer. Only its order matters.
        open_RW: bool [R, W], positions that may be committed.
        count_R: int64 [R], how many of them.

    Returns:
        bool [R, W], True where to commit: exactly min(count, open) per row, and none where the count is below 0.

    Source: LLaDA, arXiv:2502.09992, Algorithm 5.
    """
    return open_RW & (ranks(confidence_RW, open_RW) < count_R[:, None])


def ranks(key_RW: Tensor, among_RW: Tensor) -> Tensor:
    """The place of each position in the order of falling keys, 0 the first; of equal ones the leftmost is first.

    Args:
        key_RW: any float [R, W], finite where `among`.
        among_RW: bool [R, W], the positions that are ordered; all others come after them.

    Returns:
        int64 [R, W], a permutation of 0 .. W - 1 in each row.
    """
    order_RW = key_RW.masked_fill(~among_RW, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places_RW = torch.arange(order_RW.shape[1], device=order_RW.device).expand_as(order_RW)
    return torch.empty_like(order_RW).scatter_(1, order_RW, places_RW)


def _or_the_best(accepted_RW: Tensor, statistics: Statistics) -> Tensor:
    """What is accepted; in rows where nothing is, the surest open place."""
    one_R = torch.ones_like(accepted_RW[:, 0], dtype=torch.int64)
    best_RW = most_confident(statistics.confidence_RW, statistics.open_RW, one_R)
    return torch.where(accepted_RW.any(1, keepdim=True), accepted_RW, best_RW)


def _not_ends(statistics: Statistics) -> Tensor:
    """The open places less those whose candidate comes last; in rows that have no other, these."""
    others_RW = statistics.open_RW & (statistics.confidence_RW >= 0)
    return torch.where(others_RW.any(1, keepdim=True), others_RW, statistics.open_RW)


def fixed(statistics: Statistics, memory_RW: Tensor, count_R: Tensor) -> Decision:
    """The number that the schedule says, the surest first; which are surest is a matter of `remasking`.

    Source: LLaDA, arXiv:2502.09992, Algorithm 5 (low_confidence and random); Kim et al., arXiv:2502.06768, section 4 (margin).
    """
    commit_RW = most_confident(statistics.confidence_RW, statistics.open_RW, count_R.clamp(min=1))
    return Decision(commit_RW, None, memory_RW)


def threshold(statistics: Statistics, memory_RW: Tensor, count_R: Tensor, *, threshold: float) -> Decision:
    """All whose confidence is at least `threshold` (0 to 1); where there is none, the surest.

    Source: Fast-dLLM, arXiv:2505.22618, section 3.3 and Algorithm 1.
    """
    accepted_RW = statistics.open_RW & (statistics.confidence_RW >= threshold)
    return Decision(_or_the_best(accepted_RW, statistics), None, memory_RW)


def factor(statistics: Statistics, memory_RW: Tensor, count_R: Tensor, *, factor: float) -> Decision:
    """The n surest, n the largest for which (n + 1)(1 - c_(n)) < `factor`, c_(n) the n-th largest confidence; at least one.

    The more are committed at once, the surer each has to be: with (n + 1)(1 - c) < 1 the product of the marginals has
    the same maximum as the joint distribution (Theorem 1 there).

    Source: Fast-dLLM, arXiv:2505.22618, section 3.3.
    """
    among_RW = _not_ends(statistics)
    rank_RW = ranks(statistics.confidence_RW, among_RW)
    holds_RW = among_RW & ((rank_RW + 2) * (1 - statistics.confidence_RW) < factor)
    return Decision(among_RW & (rank_RW < _largest(holds_RW, rank_RW)), None, memory_RW)


def entropy_bound(statistics: Statistics, memory_RW: Tensor, count_R: Tensor, *, gamma: float) -> Decision:
    """The k of least entropy H, k the largest for which sum(H) - max(H) over them is at most `gamma` nats; at least one.

    The bound is one of the KL divergence that comes of drawing k tokens at once, each by itself.

    Source: EB-Sampler, arXiv:2505.24857, Algorithm 1, with the entropy as the measure of error.
    """
    entropy_RW = _given(statistics.entropy_RW, "entropy_RW")
    among_RW = _not_ends(statistics)
    rank_RW = ranks(-entropy_RW, among_RW)
    # sums in fp64: equal in any order of summation for all that matters, so that no company changes them
    dtype = torch.float32 if entropy_RW.device.type == "mps" else torch.float64
    entropy_RW = entropy_RW.masked_fill(~among_RW, torch.inf).to(dtype)
    rising_RW = torch.empty_like(entropy_RW).scatter_(1, rank_RW, entropy_RW)
    bound_RW = (rising_RW.cumsum(1) - rising_RW).gather(1, rank_RW)
    holds_RW = among_RW & (bound_RW <= gamma)
    return Decision(among_RW & (rank_RW < _largest(holds_RW, rank_RW)), None, memory_RW)


def _largest(holds_RW: Tensor, rank_RW: Tensor) -> Tensor:
    """int64 [R, 1]: how many come up to the last rank for which a condition holds; at least 1."""
    return (rank_RW + 1).masked_fill(~holds_RW, 1).amax(1, keepdim=True)


def klass(
    statistics: Statistics,
    memory_RW: Tensor,
    count_R: Tensor,
    *,
    threshold: float,
    kl_threshold: float,
    kl_steps: int,
) -> Decision:
    """All whose confidence is above `threshold` and whose prediction is stable; where there is none, the surest.

    A prediction is stable if KL(p_t || p_{t-1}) was below `kl_threshold` nats at each of the last `kl_steps` steps, this one
    included. The memory holds the length of that succession.

    Source: KLASS, arXiv:2511.05664, Algorithm 1.
    """
    below_RW = statistics.open_RW & (_given(statistics.change_RW, "change_RW") < kl_threshold)
    memory_RW = torch.where(below_RW, memory_RW + 1, 0)
    accepted_RW = statistics.open_RW & (statistics.confidence_RW > threshold) & (memory_RW >= kl_steps)
    return Decision(_or_the_best(accepted_RW, statistics), None, memory_RW)


def wino(
    statistics: Statistics, memory_RW: Tensor, count_R: Tensor, *, threshold: float, verify_threshold: float
) -> Decision:
    """All whose confidence is above `threshold`, at least the surest; committed tokens that do not stand up become masks again.

    A committed token does not stand up if a shadow mask at its position gives it a probability below `verify_threshold`.
    The least probable are taken back first, and strictly fewer than are committed now: the number of masks falls at
    every step, so a block ends.

    Source: WINO, arXiv:2507.18578, Algorithm 1.
    """
    accepted_RW = statistics.open_RW & (statistics.confidence_RW > threshold)
    commit_RW = _or_the_best(accepted_RW, statistics)
    verified_RW = _given(statistics.verified_RW, "verified_RW")
    doubted_RW = statistics.committed_RW & (verified_RW < verify_threshold)
    remask_RW = most_confident(-verified_RW, doubted_RW, commit_RW.sum(1) - 1)
    return Decision(commit_RW, remask_RW, memory_RW)


def hierarchical(
    statistics: Statistics, memory_RW: Tensor, count_R: Tensor, *, threshold: float, low_threshold: float
) -> Decision:
    """All above `threshold`, and the surest of each run of masks if it is above `low_threshold`; at least the surest of all.

    A run is open places at adjoining positions of the canvas. One token in the middle of each splits the masks into ever
    shorter runs, whose tokens depend on each other less. A mask that stands alone between tokens is a run of its own: where
    all do, as on a sudoku, the lower threshold decides.

    Source: dInfer, arXiv:2510.08666, hierarchical decoding.
    """
    confidence_RW, open_RW, position_RW = statistics.confidence_RW, statistics.open_RW, statistics.position_RW
    adjoins_RW = torch.zeros_like(open_RW)
    adjoins_RW[:, 1:] = open_RW[:, :-1] & (position_RW[:, 1:] == position_RW[:, :-1] + 1)
    run_RW = (open_RW & ~adjoins_RW).cumsum(1)  # its number at an open place, from 1
    rank_RW = ranks(confidence_RW, open_RW)
    W = open_RW.shape[1]
    first_RW = rank_RW.new_full((open_RW.shape[0], W + 1), W)
    first_RW.scatter_reduce_(1, run_RW, rank_RW.masked_fill(~open_RW, W), "amin")
    surest_RW = open_RW & (rank_RW == first_RW.gather(1, run_RW))
    accepted_RW = open_RW & (confidence_RW > threshold) | surest_RW & (confidence_RW > low_threshold)
    return Decision(_or_the_best(accepted_RW, statistics), None, memory_RW)


def remdm(statistics: Statistics, memory_RW: Tensor, count_R: Tensor, *, eta: float) -> Decision:
    """The schedule's number of tokens, and besides as many as are taken back: those that were least sure when committed.

    Of a block with n committed tokens and m masks, k of which the schedule commits now, r = min(floor(eta n), m - k) tokens
    become masks again, and the k + r surest masks are committed. That is the expected number of ReMDM's max-capped
    schedule, sigma_t n with sigma_t = min(eta, (1 - alpha_s) / alpha_t), where alpha_t = n / (n + m) and 1 - alpha_s =
    (m - k) / (n + m); which ones is its confidence-based schedule, sigma^l in proportion to exp(-psi^l), psi^l the
    confidence when l was committed, with the likeliest in place of a draw. The memory holds psi.

    A step leaves m - k masks whatever it takes back, as the fixed schedule does: a block takes that schedule's steps.

    Source: ReMDM, arXiv:2503.00307, section 4.1 and Algorithm 1, made deterministic.
    """
    open_R, committed_R = statistics.open_RW.sum(1), statistics.committed_RW.sum(1)
    count_R = count_R.clamp(min=1)
    share_R = (committed_R.float() * eta).floor().long()
    again_R = torch.minimum(share_R, open_R - count_R).clamp(min=0)
    commit_RW = most_confident(statistics.confidence_RW, statistics.open_RW, count_R + again_R)
    remask_RW = most_confident(-memory_RW, statistics.committed_RW, again_R)
    memory_RW = torch.where(commit_RW, statistics.confidence_RW, memory_RW.masked_fill(remask_RW, 0))
    return Decision(commit_RW, remask_RW, memory_RW)


def _given(statistic_RW: Tensor | None, name: str) -> Tensor:
    """A statistic that the policy has asked for."""
    if statistic_RW is None:
        raise ValueError(f"{name} is missing: a policy is given the statistics that POLICIES says it needs.")
    return statistic_RW


POLICIES: dict[PolicyName, Policy] = {
    "fixed": Policy(fixed),
    "threshold": Policy(threshold),
    "factor": Policy(factor),
    "entropy_bound": Policy(entropy_bound, needs=frozenset({"entropy"})),
    "klass": Policy(klass, needs=frozenset({"change"})),
    "wino": Policy(wino, needs=frozenset({"verified"}), revocable=True),
    "hierarchical": Policy(hierarchical),
    "remdm": Policy(remdm, revocable=True),
}
"""By the names of `--policy`."""
