"""Sequence packing: conversations end to end in rows of one length, so that short ones cost no padding.

A document in a row keeps its own positions, its own time t and masks, its own share of the loss; attention stays within it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dllm.diffusion.noise import Purpose, keyed_bits, keyed_permutation


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Packs documents into as few rows as best-fit decreasing finds: the longest first, each into the fullest row it fits.

    Args:
        lengths: tokens of each document, none more than `capacity`.
        capacity: tokens of a row.

    Returns:
        Rows of indices. Source: histogram packing, arXiv:2107.02027, section 3.1.

    Raises:
        ValueError: a document is longer than a row.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # tokens left -> rows
    rooms: list[int] = []  # the keys that have rows, ascending
    for document in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[document])
        if length > capacity:
            raise ValueError(f"document {document} has {length} tokens, and a row holds {capacity}")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        rows[row].append(document)
        left = room - length
        if left and not with_room[left]:
            rooms.insert(bisect_left(rooms, left), left)
        if left:
            with_room[left].append(row)
    return rows


def ends_of_text(lengths: np.ndarray, capacity: int, *, rule: str, seed: int, group: int) -> np.ndarray:
    """How many end-of-text tokens follow each answer; they are learnt, as the padding of padded rows is.

    Args:
        lengths: tokens of each document without them.
        capacity: tokens of a row; no document grows beyond it.
        rule: a number for all; or "mirror": what padding to the longest of a step would have added, drawn anew for each
            document from the lengths of `group - 1` others.
        seed: of the draw.
        group: samples of a step.

    Returns:
        int64, one a document.
    """
    if rule != "mirror":
        return np.minimum(int(rule), capacity - lengths)
    longest = lengths.copy()
    sizes = torch.from_numpy(lengths)
    for start in range(0, len(lengths), 4096):
        place = torch.arange(start, min(start + 4096, len(lengths)))
        others = keyed_bits(seed, Purpose.TAIL, place[:, None], torch.arange(max(1, group - 1))) % len(lengths)
        longest[start : start + 4096] = np.maximum(lengths[start : start + 4096], sizes[others].amax(1).numpy())
    return longest - lengths


class PackedDataset(Dataset[dict[str, Any]]):
    """Packed rows in a shuffled order that depends on (seed, epoch) alone; the twin of `dllm.data.order.OrderedDataset`.

    What is packed together stays together in all epochs; the order of the rows changes. `self[position]` has `documents`
    (rows, each with its `sample` and its `tail`, the ends of text after it) and where they stand among the documents of the
    step: `step`, `place` of the first, and `of` how many.

    Args:
        rows: indexable by integers, with `input_ids` and `turns`.
        capacity: tokens of a packed row.
        ends: see `ends_of_text`, its rule.
        seed: of the shuffle.
        group: packed rows of one optimiser step, all processes and accumulation steps together.
    """

    def __init__(self, rows: Any, *, capacity: int, ends: str, seed: int, group: int) -> None:
        lengths = np.array([turns[-1] for turns in rows["turns"]], dtype=np.int64)
        self.rows, self.seed, self.group = rows, seed, group
        self.tails = ends_of_text(lengths, capacity, rule=ends, seed=seed, group=group)
        self.packs = pack(lengths + self.tails, capacity)
        self.fill = float((lengths + self.tails).sum() / (len(self.packs) * capacity))
        """The share of positions that hold a document."""
        self._steps = -(-len(self.packs) // group)  # of an epoch
        self._rounds = -(-self._steps * group // len(self.packs))  # how often an epoch may come to one pack
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch
        self._step: tuple[int, list[int]] = (-1, [])  # (first position of a step, documents of its rows)
        self._order = keyed_permutation(len(self.packs), self.seed, Purpose.DATA_ORDER, epoch).tolist()

    def __len__(self) -> int:
        return self._steps * self.group

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < len(self):
            raise IndexError(position)
        first = position - position % self.group
        if self._step[0] != first:
            self._step = (first, [len(self._pack(other)) for other in range(first, first + self.group)])
        sizes = self._step[1]
        base = (self.epoch * self._rounds + position // len(self.packs)) * len(self.rows)
        return {
            "documents": [
                {**self.rows[document], "sample": base + document, "tail": int(self.tails[document])}
                for document in self._pack(position)
            ],
            "step": self.epoch * self._steps + position // self.group,
            "place": sum(sizes[: position - first]),
            "of": sum(sizes),
        }

    def row_number(self, sample: int) -> int:
        """Which of `rows` a sample is, of any epoch."""
        return sample % len(self.rows)

    def _pack(self, position: int) -> list[int]:
        return self.packs[self._order[position % len(self.packs)]]
