"""What a policy decides from: what is known of the places of the current blocks.

Shapes: R rows, W places of the widest current block.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """The places of each row's current block in reading order, padded on the right; all [R, W]."""

    open_RW: Tensor
    """bool: still a mask, and may be committed now."""
    token_RW: Tensor
    """int64: the candidate."""
    confidence_RW: Tensor
    """fp32: larger is surer; what it measures is `remasking`. -inf where not open; ends are 2 lower where they come last."""
    entropy_RW: Tensor | None
    """fp32, nats: of the prediction. Only for a policy that needs "entropy"."""
    change_RW: Tensor | None
    """fp32, nats: KL(p_t || p_{t-1}), inf at a place's first step in the block. Only for a policy that needs "change"."""
    verified_RW: Tensor | None
    """fp32: the probability that a shadow mask at the same position gives the token now committed there; 0 where none is.
    Only for a policy that needs "verified"."""
    committed_RW: Tensor
    """bool: places of the block that are committed."""
    position_RW: Tensor
    """int64: the place's position in the row's canvas."""
