"""How much predictions change from step to step: the distributions of each row's last step, kept for policy klass.

Shapes: R rows, M places of the row with the most, N places that were asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


class Distributions:
    """What was predicted of each place when it was last asked for, in the rows' order."""

    def __init__(self) -> None:
        self.log_p_RMV: Tensor | None = None
        self.known_RM: Tensor | None = None

    def change(
        self, log_p_NV: Tensor, row_N: Tensor, offset_N: Tensor, counts_N: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """KL(p_t || p_t-1) in nats, +inf where nothing is known of the step before; p_t is kept.

        Args:
            log_p_NV: fp32 [N, V], of this step.
            row_N: int64 [N], whose place it is.
            offset_N: int64 [N], its number among the row's places; of those that come more than once all are equal.
            counts_N: bool [N], whether its block has begun: what is predicted of a later one is no step of it.
            shape: R and M.

        Returns:
            fp32 [N].
        """
        if self.log_p_RMV is None or self.known_RM is None:
            self.log_p_RMV = log_p_NV.new_zeros(*shape, log_p_NV.shape[1])
            self.known_RM = log_p_NV.new_zeros(shape, dtype=torch.bool)
        log_p_RMV, known_RM = self._with_room(self.log_p_RMV, self.known_RM, shape)
        p_NV = log_p_NV.exp()
        gap_NV = torch.where(p_NV > 0, p_NV * (log_p_NV - log_p_RMV[row_N, offset_N]), 0)
        change_N = torch.where(known_RM[row_N, offset_N], gap_NV.sum(1).clamp(min=0), torch.inf)
        log_p_RMV[row_N, offset_N] = log_p_NV
        seen_RM = torch.zeros_like(known_RM, dtype=torch.int64)
        seen_RM.index_put_((row_N, offset_N), counts_N.long(), accumulate=True)
        self.log_p_RMV, self.known_RM = log_p_RMV, known_RM | (seen_RM > 0)
        return change_N

    def keep(self, index_R: Tensor, shape: Sequence[int], places: int) -> None:
        """Of R rows of M places, `shape`, those of these numbers stay, with so many places."""
        if self.log_p_RMV is not None and self.known_RM is not None:
            log_p_RMV, known_RM = self._with_room(self.log_p_RMV, self.known_RM, shape)
            self.log_p_RMV, self.known_RM = log_p_RMV[index_R, :places], known_RM[index_R, :places]

    def _with_room(self, log_p_RMV: Tensor, known_RM: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """With room for rows that have joined since: copied only if there is none."""
        if known_RM.shape == tuple(shape):
            return log_p_RMV, known_RM
        rows, places = shape[0] - len(known_RM), shape[1] - known_RM.shape[1]
        return pad(log_p_RMV, (0, 0, 0, places, 0, rows)), pad(known_RM, (0, places, 0, rows))

    def insert(self, after_R: Tensor, count_R: Tensor, shape: Sequence[int], places: int) -> None:
        """Behind a place of each row so many new ones stand, of which nothing is known; `places` of the row with the most.

        Args:
            after_R: int64 [R], the place by its number among the row's.
            count_R: int64 [R].
            shape: R and M before.
            places: M afterwards.
        """
        if self.log_p_RMV is None or self.known_RM is None:
            return
        log_p_RMV, known_RM = self._with_room(self.log_p_RMV, self.known_RM, shape)
        new_M = torch.arange(places, device=after_R.device)
        after_R1, count_R1 = after_R[:, None], count_R[:, None]
        origin_RM = torch.where(new_M <= after_R1, new_M, new_M - count_R1)
        missing_RM = (new_M > after_R1) & (new_M <= after_R1 + count_R1) | (origin_RM >= shape[1])
        origin_RM = origin_RM.clamp(0, shape[1] - 1)
        row_R1 = torch.arange(len(after_R), device=after_R.device)[:, None]
        self.log_p_RMV, self.known_RM = log_p_RMV[row_R1, origin_RM], known_RM.gather(1, origin_RM) & ~missing_RM
