"""The places that a step looks at: those of the current blocks, or all of the rows'.

Shapes: R rows, W places that are looked at, M places of the row with the most, L positions of the longest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dllm.sampling.rows import Rows


class View(NamedTuple):
    """Of each row places that adjoin, in reading order."""

    first_R: Tensor
    """int64: the number, among the row's places, of the first that is looked at."""
    offset_RW: Tensor
    """int64: the number of each."""
    place_RW: Tensor
    """int64: its position in the canvas; meaningless where there is none."""
    own_RW: Tensor
    """bool: the row has such a place."""
    block_RW: Tensor
    """bool: it belongs to the row's current block."""
    open_RW: Tensor
    """bool: it is a mask."""

    def blocks_of(self, rows: Rows) -> View:
        """The same places, where blocks have got other ends."""
        offset_RW = self.first_R[:, None] + torch.arange(self.own_RW.shape[1], device=self.own_RW.device)
        return self._replace(block_RW=(offset_RW >= rows.start_R[:, None]) & (offset_RW < rows.end_R[:, None]))

    def columns_RW(self, start_R: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Which of the columns are the places from `start` on (int64 [R, width]), and which of those are there (bool)."""
        column_RW = (start_R - self.first_R)[:, None] + torch.arange(width, device=start_R.device)
        inside_RW = column_RW < self.own_RW.shape[1]
        column_RW = column_RW.clamp(max=self.own_RW.shape[1] - 1)
        return column_RW, inside_RW & self.own_RW.gather(1, column_RW)


def look(rows: Rows, width: int | None) -> View:
    """So many places from each block's start on; with None all places of the rows."""
    M = rows.place_RM.shape[1]
    first_R = rows.start_R if width is not None else torch.zeros_like(rows.start_R)
    offset_RW = first_R[:, None] + torch.arange(M if width is None else width, device=first_R.device)
    own_RW = offset_RW < rows.places_R[:, None]
    block_RW = (offset_RW >= rows.start_R[:, None]) & (offset_RW < rows.end_R[:, None])
    offset_RW = offset_RW.clamp(max=M - 1)
    place_RW = rows.place_RM.gather(1, offset_RW)
    return View(first_R, offset_RW, place_RW, own_RW, block_RW, own_RW & rows.open_RL.gather(1, place_RW))
