"""The order in which training sees the data: a keyed permutation of (epoch, position), so its state is one integer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dllm.diffusion.noise import Purpose, keyed_permutation

STRETCH = 64
"""Steps whose rows are sorted together: enough that they differ little within one, few enough that epochs differ."""


class OrderedDataset(Dataset[dict[str, Any]]):
    """Rows in a shuffled order that depends on (seed, epoch) alone; each row says which sample it is.

    `self[position]` is the row at a place of this epoch's order, with `sample` added: the place counted through all
    epochs, each epoch starting at a multiple of `group`, so that a step's samples are one group of the corruption plan.
    The data loader reads positions in sequence (no shuffling sampler), on any number of processes.

    An epoch is a whole number of steps: the last one is filled up with rows from the epoch's beginning, as samples of their
    own. Several processes would otherwise fill it up themselves, with rows that one process does not see there.

    Args:
        rows: indexable by integers, with a length.
        seed: of the shuffle.
        group: samples of one optimiser step, all processes and accumulation steps together.
        shuffle: off for evaluation.
        length_of: (row, sample) -> tokens of the row once it is collated. With it every row says `pad_to`, the longest of
            its step, so that padding does not depend on how a step is split over processes and micro-batches.
        lengths: tokens of every row. With them a step holds rows of about one length, for less padding: the shuffled rows
            are sorted within stretches of `STRETCH` steps, and whole steps are shuffled again.
    """

    def __init__(
        self,
        rows: Any,
        *,
        seed: int,
        group: int,
        shuffle: bool = True,
        length_of: Callable[[dict[str, Any], int], int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.rows = rows
        self.seed = seed
        self.group = group
        self.shuffle = shuffle
        self.length_of = length_of
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self._steps = -(-len(rows) // group)  # of an epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch
        self._order = self._order_of(epoch)
        self._longest = (-1, 0)  # (first position of a step, its longest row)

    def __len__(self) -> int:
        return self._steps * self.group

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < len(self):
            raise IndexError(position)
        row = {**self._row(position), "sample": self._sample(position)}
        if self.length_of is not None:
            first = position - position % self.group
            if self._longest[0] != first:
                step = range(first, first + self.group)
                self._longest = (first, max(self.length_of(self._row(p), self._sample(p)) for p in step))
            row["pad_to"] = self._longest[1]
        return row

    def row_number(self, sample: int) -> int:
        """Which of `rows` a sample is, of any epoch."""
        epoch, position = divmod(sample, len(self))
        order = self._order_of(epoch)
        position %= len(self.rows)
        return position if order is None else int(order[position])

    def _order_of(self, epoch: int) -> Tensor | None:
        """int64 [rows], the rows in the order of an epoch; None for their own."""
        if not self.shuffle:
            return None
        order = keyed_permutation(len(self.rows), self.seed, Purpose.DATA_ORDER, epoch)
        if self.lengths is None:
            return order
        stretches = order.split(STRETCH * self.group)
        order = torch.cat([rows[self.lengths[rows].argsort(descending=True, stable=True)] for rows in stretches])
        full = len(order) // self.group
        steps = order[: full * self.group].view(full, self.group)
        return torch.cat(
            [steps[keyed_permutation(full, self.seed, Purpose.STEP_ORDER, epoch)].flatten(), order[full * self.group :]]
        )

    def _row(self, position: int) -> dict[str, Any]:
        position %= len(self.rows)
        row: dict[str, Any] = self.rows[position if self._order is None else int(self._order[position])]
        return row

    def _sample(self, position: int) -> int:
        return self.epoch * len(self) + position
