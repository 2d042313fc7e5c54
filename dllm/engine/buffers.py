"""Keys and values of every position of every running row, allocated once and written in place.

Shapes: S rows that there is room for, R rows in use, G key/value heads, L positions, K head width, T tokens of one pass.

A row is a place 0 .. R-1. Nothing is ever appended: a pass writes the keys and values of the positions that it computes over
what lay there, and attention reads views. Which positions of a place are real is known by whoever reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dllm.errors import OptionError


def bytes_per_position(layers: int, heads: int, width: int, dtype: torch.dtype) -> int:
    """What one position of one row takes in memory, in bytes: its key and its value in every layer.

    Args:
        layers: of the model.
        heads: G, those of keys and values.
        width: K.
        dtype: of keys and values.
    """
    return 2 * layers * heads * width * dtype.itemsize


class KeyValues:
    """The buffers of one model: `key[layer]` and `value[layer]`, each [S, G, L, K].

    Args:
        layers: of the model.
        heads: G, those of keys and values.
        width: K.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        # zeros and not what lay in memory: a hidden position has weight 0, and 0 * NaN would be NaN
        self.key, self.value = (
            [torch.zeros(0, heads, 0, width, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )

    @classmethod
    def of(cls, model: Any) -> KeyValues:
        """Empty buffers in the sizes, dtype and device of a model."""
        config = model.config
        return cls(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )

    @property
    def rows(self) -> int:
        """S, the rows that there is room for."""
        return self.key[0].shape[0]

    @property
    def length(self) -> int:
        """L, the positions that there is room for in each row."""
        return self.key[0].shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.key[0].dtype

    @property
    def bytes_per_position(self) -> int:
        """What one position of one row takes in memory, in bytes."""
        _, heads, _, width = self.key[0].shape
        return bytes_per_position(len(self.key), heads, width, self.dtype)

    @property
    def bytes(self) -> int:
        """What the buffers take in memory."""
        return self.rows * self.length * self.bytes_per_position

    def reserve(self, rows: int, length: int, exact: bool = False) -> bool:
        """Makes room for `rows` rows of `length` positions; what is there stays.

        Args:
            rows: places asked for.
            length: positions of the longest row.
            exact: where new buffers are needed, of this size, and what is beyond it goes: many short rows before do not make
                a few long ones now take as much room as many long ones.

        Returns:
            Whether the buffers had to be allocated anew: views taken before then show the old ones.
        """
        if rows <= self.rows and length <= self.length:
            return False
        if not exact:
            rows, length = max(rows, self.rows), max(length, self.length)
        for tensors in (self.key, self.value):
            for layer, old in enumerate(tensors):  # one layer after the other: only one of them exists twice at a time
                new = old.new_zeros(rows, old.shape[1], length, old.shape[3])
                new[: len(old), :, : old.shape[2]] = old[:rows, :, :length]
                tensors[layer] = new
        return True

    def write(self, layer: int, row_T: Tensor, position_T: Tensor, key_TGK: Tensor, value_TGK: Tensor) -> None:
        """Puts keys and values at their places; no (row, position) may come twice.

        Under tensor parallelism a process has some of the heads: a layer's buffers take their number from its first write.
        """
        for tensors, new_TGK in ((self.key, key_TGK), (self.value, value_TGK)):
            old = tensors[layer]
            if new_TGK.shape[1] != old.shape[1]:
                tensors[layer] = old = old.new_zeros(len(old), new_TGK.shape[1], *old.shape[2:])
            old[row_T, :, position_T] = new_TGK.to(self.dtype)  # autocast and quantised layers have dtypes of their own

    def read(self, layer: int, rows: slice | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, G, length, K] from position 0: views for a slice of rows, copies for an index."""
        return self.key[layer][rows, :, :length], self.value[layer][rows, :, :length]

    def erase(self, rows: range) -> None:
        """Zeros in these places."""
        for tensor in (*self.key, *self.value):
            tensor[rows.start : rows.stop] = 0

    def keep(self, index_R: Sequence[int], length: int | None = None) -> None:
        """Place i gets what place index_R[i] holds; only rows whose place changes are copied.

        Args:
            index_R: where each row that stays lies now, without repetition; `dllm.sampling.rows.compacted` gives the order
                that moves fewest.
            length: positions of the longest row that stays, where known; nothing beyond it is copied.

        Raises:
            OptionError: a place that does not exist, or one that comes twice.
        """
        if len(set(index_R)) < len(index_R) or not all(0 <= row < self.rows for row in index_R):
            raise OptionError(
                f"keep({list(index_R)}) of {self.rows} rows: each number is a place from 0 to {self.rows - 1}, and comes once."
            )
        moves = [(place, row) for place, row in enumerate(index_R) if place != row]
        if not moves:
            return
        to, origin = torch.tensor(moves, device=self.key[0].device).unbind(1)
        for tensor in (*self.key, *self.value):
            tensor[to, :, :length] = tensor[origin, :, :length]  # the right side is a copy, so places may be exchanged
