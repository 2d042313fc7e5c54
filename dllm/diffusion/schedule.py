"""The masking schedule: how much is masked at time t, what a masked token's loss weighs, how fast masks are removed.

Time t runs over [0, 1]; 0 is clean text, 1 is all masks. LLaDA's schedule is linear: alpha_t = 1 - t is the
probability that a token is still itself.

Sources: MDLM, arXiv:2406.07524, eq. 10; SMDM, arXiv:2410.18514; LLaDA, arXiv:2502.09992, eq. 3 and Algorithms 1, 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-3
"""The smallest probability of a mask, in training: it bounds the weight 1 / p_mask."""


def alpha(t: Tensor) -> Tensor:
    """alpha_t = 1 - t, the share of tokens not masked at time t (any shape, fp)."""
    return 1 - t


def mask_probability(t: Tensor, eps: float = EPS) -> Tensor:
    """p_mask(t) = (1 - eps) t + eps, the probability with which training masks each token (any shape, fp)."""
    return (1 - eps) * t + eps


def time_of(p_mask: Tensor, eps: float = EPS) -> Tensor:
    """t of a mask probability (any shape, fp): the inverse of `mask_probability`."""
    return (p_mask - eps) / (1 - eps)


def elbo_weight(p_mask: Tensor) -> Tensor:
    """The weight of a masked token's cross-entropy in the evidence bound: -alpha'_t / (1 - alpha_t) = 1 / p_mask.

    A token is masked with probability p and weighs 1 / p, so every token counts once in expectation at every t
    (LLaDA eq. 3).
    """
    return 1 / p_mask


def reveal_counts(masked: Tensor, steps: int) -> Tensor:
    """How many masks each step removes when `steps` steps share them evenly, the first ones taking what is left over.

    10 masks in 4 steps: 3, 3, 2, 2.

    Args:
        masked: int64 [R], masks per row.
        steps: at least 1.

    Returns:
        int64 [R, steps]; every row sums to its number of masks.

    Raises:
        ValueError: steps is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    each, left_over = masked // steps, masked % steps
    return each[:, None] + (torch.arange(steps, device=masked.device) < left_over[:, None]).long()
