"""The order in which training sees the data: a keyed permutation of (epoch, position), so its state is one integer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from dllm.diffusion.noise import keyed_permutation

_ORDER = 6  # which random numbers these are (1 to 5 are the corruption plan's and the sampler's)


class OrderedDataset(Dataset[dict[str, Any]]):
    """Rows in a shuffled order that depends on (seed, epoch) alone; each row says which sample it is.

    `self[position]` is the row at a place of this epoch's order, with `sample` added: the place counted through all
    epochs, each epoch starting at a multiple of `group`, so that a step's samples are one group of the corruption plan.
    The data loader reads positions in sequence (no shuffling sampler), on any number of processes.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], *, seed: int, group: int, shuffle: bool = True) -> None:
        self.rows = rows
        self.seed = seed
        self.group = group
        self.shuffle = shuffle
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch
        self._order: Tensor | None = keyed_permutation(len(self.rows), self.seed, _ORDER, epoch) if self.shuffle else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = position if self._order is None else int(self._order[position])
        groups_an_epoch = -(-len(self.rows) // self.group)
        return {**self.rows[index], "sample": self.epoch * groups_an_epoch * self.group + position}
