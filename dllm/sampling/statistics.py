"""What a decode policy may know of the places that it decides about.

Shapes: R rows, W places of the widest current block.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """Of the places of each row's current block, in reading order; all [R, W]."""

    position_RW: Tensor
    """int64: the place's position in the row's canvas; meaningless beyond the row's own places."""
    open_RW: Tensor
    """bool: still a mask, may be committed now."""
    committed_RW: Tensor
    """bool: a place of the block that is committed already."""
    token_RW: Tensor
    """int64: the candidate of each open place."""
    confidence_RW: Tensor
    """fp32, larger is surer, -inf where not open: by `remasking` the candidate's probability, the best's less the second
    best's, minus the entropy, or noise. With `eos_last` end tokens are lower than all others, below 0."""
    entropy_RW: Tensor | None = None
    """fp32, nats; for policies that need "entropy"."""
    change_RW: Tensor | None = None
    """fp32, KL(p_t || p_t-1) in nats, +inf at a place's first step; for policies that need "change"."""
    verified_RW: Tensor | None = None
    """fp32, the probability of the committed token where a mask stands in its place, 0 where none is committed; for
    policies that need "verified"."""
