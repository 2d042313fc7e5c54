"""How much predictions change from step to step: the distributions of the last step, kept for policy klass.

Shapes: R rows, M places of the row with the most, N places that were asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


class Distributions:
    """What the last step predicted, of the places that it was asked for and of no others, and which row's and place's each is."""

    def __init__(self) -> None:
        self.log_p_NV: Tensor | None = None
        self.slot_RM: Tensor | None = None  # which of the N a place's is, -1 for none; rows are in the batch's order

    def change(
        self, log_p_NV: Tensor, row_N: Tensor, offset_N: Tensor, counts_N: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """KL(p_t || p_t-1) in nats, +inf where nothing is known of the step before; p_t is kept.

        Args:
            log_p_NV: fp32 [N, V], of this step.
            row_N: int64 [N], whose place it is.
            offset_N: int64 [N], its number among the row's places; of those that come more than once one counts at most.
            counts_N: bool [N], whether its block has begun: what is predicted of a later one is no step of it.
            shape: R and M.

        Returns:
            fp32 [N].
        """
        change_N = torch.full_like(log_p_NV[:, 0], torch.inf)
        if self.log_p_NV is not None and self.slot_RM is not None and len(self.log_p_NV):
            slot_N = _with_room(self.slot_RM, shape)[row_N, offset_N]
            p_NV = log_p_NV.exp()
            gap_NV = torch.where(p_NV > 0, p_NV * (log_p_NV - self.log_p_NV[slot_N.clamp(min=0)]), 0)
            change_N = torch.where(slot_N >= 0, gap_NV.sum(1).clamp(min=0), change_N)
        number_N = torch.arange(len(row_N), device=row_N.device)
        slot_C = torch.full((shape[0] * shape[1],), -1, device=row_N.device)
        slot_C.scatter_reduce_(0, row_N * shape[1] + offset_N, torch.where(counts_N, number_N, -1), "amax")
        self.log_p_NV, self.slot_RM = log_p_NV, slot_C.view(*shape)
        return change_N

    def keep(self, index_R: Tensor, shape: Sequence[int], places: int) -> None:
        """Of R rows of M places, `shape`, those of these numbers stay, with so many places."""
        if self.slot_RM is not None:
            self.slot_RM = _with_room(self.slot_RM, shape)[index_R, :places]

    def insert(self, after_R: Tensor, count_R: Tensor, shape: Sequence[int], places: int) -> None:
        """Behind a place of each row so many new ones stand, of which nothing is known; `places` of the row with the most.

        Args:
            after_R: int64 [R], the place by its number among the row's.
            count_R: int64 [R].
            shape: R and M before.
            places: M afterwards.
        """
        if self.slot_RM is None:
            return
        new_M = torch.arange(places, device=after_R.device)
        after_R1, count_R1 = after_R[:, None], count_R[:, None]
        origin_RM = torch.where(new_M <= after_R1, new_M, new_M - count_R1)
        missing_RM = (new_M > after_R1) & (new_M <= after_R1 + count_R1) | (origin_RM >= shape[1])
        origin_RM = origin_RM.clamp(0, shape[1] - 1)
        self.slot_RM = _with_room(self.slot_RM, shape).gather(1, origin_RM).masked_fill(missing_RM, -1)


def _with_room(slot_RM: Tensor, shape: Sequence[int]) -> Tensor:
    """With room for rows that have joined since, of which nothing is known."""
    rows, places = shape[0] - len(slot_RM), shape[1] - slot_RM.shape[1]
    return pad(slot_RM, (0, places, 0, rows), value=-1) if rows or places else slot_RM
