"""The slow twins of the masked loss: sums over every mask, over every order of writing, and over every token by itself.

A predictor here is a function of a row with masks in it: it gives the negative log-probability of each clean token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Nll = Callable[[tuple[int, ...]], Sequence[float]]
"""From the row with masks to -log p(clean token) of each position, in nats."""


def hide(ids: Sequence[int], places: Sequence[int], mask_token_id: int) -> tuple[int, ...]:
    return tuple(mask_token_id if place in places else token for place, token in enumerate(ids))


def subsets(places: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for size in range(len(places) + 1):
        yield from itertools.combinations(places, size)


def pattern_probability(masked: int, of: int, p: float) -> float:
    """The probability of one certain set of `masked` tokens out of `of`, each masked by itself with probability p."""
    return p**masked * (1 - p) ** (of - masked)


def bernoulli_loss(ids: Sequence[int], maskable: Sequence[int], mask_token_id: int, nll: Nll, p: float) -> float:
    """LLaDA eq. 3 at one time: the expectation over all masks of sum of CE / p."""
    total = 0.0
    for places in subsets(maskable):
        scores = nll(hide(ids, places, mask_token_id))
        total += pattern_probability(len(places), len(maskable), p) * sum(scores[i] for i in places) / p
    return total


def exact_loss(ids: Sequence[int], maskable: Sequence[int], mask_token_id: int, nll: Nll) -> float:
    """LLaDA eq. 6: k uniform in 1 .. n, then each set of k tokens equally likely, weight n / k."""
    n = len(maskable)
    total = 0.0
    for k in range(1, n + 1):
        for places in itertools.combinations(maskable, k):
            scores = nll(hide(ids, places, mask_token_id))
            total += sum(scores[i] for i in places) * (n / k) / math.comb(n, k) / n
    return total


def any_order_loss(ids: Sequence[int], maskable: Sequence[int], mask_token_id: int, nll: Nll) -> float:
    """The mean over all orders of writing the tokens one by one: what eq. 3 and eq. 6 are, said without masks of a size."""
    orders = list(itertools.permutations(maskable))
    total = 0.0
    for order in orders:
        for written, place in enumerate(order):
            total += nll(hide(ids, order[written:], mask_token_id))[place]
    return total / len(orders)


def normalised_loss(
    nll: Sequence[Sequence[float]],
    weight: Sequence[Sequence[float]],
    masked: Sequence[Sequence[bool]],
    maskable: Sequence[Sequence[bool]],
    normalisation: str,
) -> float:
    """The loss of a whole batch, token by token; `nll` has an entry for every position."""
    rows = [
        sum(n * w for n, w, hidden in zip(*row, strict=True) if hidden) for row in zip(nll, weight, masked, strict=True)
    ]
    lengths = [sum(row) for row in maskable]
    answers = sum(1 for length in lengths if length > 0)
    if normalisation == "token":
        return sum(rows) / sum(lengths)
    if normalisation == "sequence":
        return sum(row / length for row, length in zip(rows, lengths, strict=True) if length > 0) / answers
    if normalisation == "batch":
        return sum(rows) / answers
    raise ValueError(normalisation)


def plain_head_loss(
    weight_VD: Tensor, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """(weighted sum, cross-entropies [N]) from all logits at once, by autograd."""
    log_p_NV = (hidden_ND @ weight_VD.T).log_softmax(1)
    nll_N = -log_p_NV[torch.arange(len(targets_N)), targets_N]
    return (nll_N * weights_N).sum(), nll_N
