"""Attention of one pass over the computed positions of many rows; keys and values of all others come from the buffers.

Shapes: T tokens of the pass, r rows of a group, Q queries of the group's longest, H query heads, G key/value heads,
K head width, L positions.

The pass is packed: token t is position `position_T[t]` of row `row_T[t]`, row after row, without padding. Each layer first
writes the keys and values of all tokens over what lay at their positions, and then lets every token see all positions of
its own row, or those that it is told to. Rows that compute about as many positions as each other form a group, and each group
is one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dllm.engine.buffers import KeyValues
from dllm.layers.attention import AttentionPlan

MOST_GROUPS = 3
"""A group is a launch in every layer; past a few of them padding costs less."""


class _Group(NamedTuple):
    """Rows that attend in one product."""

    rows: slice | Tensor
    """Their places in the buffers: a slice where they are neighbours, so that nothing is copied."""
    token_rQ: Tensor | None
    """int64: where in the pass each query is; a row with fewer repeats its last. None where the group is the whole pass and
    no row is padded."""
    queries: int
    """Q."""
    length: int
    """Positions of the group's longest row."""
    seen_r1qL: Tensor | None
    """bool: which positions each row has, q = 1, or each query sees, q = Q; None where all have the same number."""


def query_groups(counts: Sequence[int]) -> list[list[int]]:
    """Splits rows by how many positions they compute: within a group none computes less than half of what another does,
    except in the last of `MOST_GROUPS`. Rows that compute nothing are in no group.

    Args:
        counts: positions that each row computes.

    Returns:
        Rows of each group, ascending.
    """
    groups: list[list[int]] = []
    for row in sorted((row for row, count in enumerate(counts) if count), key=lambda row: -counts[row]):
        if not groups or (len(groups) < MOST_GROUPS and counts[row] * 2 < counts[groups[-1][0]]):
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]


class CachedRows(AttentionPlan):
    """The attention plan of one pass; see `dllm.layers.attention.AttentionPlan`.

    Args:
        buffers: with room for the rows and their lengths.
        row_T: int64, the place of each token's row in the buffers, ascending.
        position_T: int64, where in the row its key and value go; ascending within a row, none twice.
        counts: tokens of each row 0 .. R-1; known to the host, so that nothing waits for the device.
        lengths: positions of each row; computed or kept, all that are seen have been written once this pass has.
        visible_TL: bool [T, longest of `lengths`]: what each token sees of its row; all of it by default.
    """

    def __init__(
        self,
        buffers: KeyValues,
        row_T: Tensor,
        position_T: Tensor,
        counts: Sequence[int],
        lengths: Sequence[int],
        visible_TL: Tensor | None = None,
    ) -> None:
        buffers.reserve(len(lengths), max(lengths))
        self.buffers, self.row_T, self.position_T = buffers, row_T, position_T
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        chosen = query_groups(counts)
        self.groups = [self._group(rows, starts, counts, lengths, alone=len(chosen) == 1) for rows in chosen]
        if visible_TL is not None:
            self.groups = [self._seeing(group, visible_TL) for group in self.groups]
        self.back_T = (
            None if len(chosen) == 1 and self.groups[0].token_rQ is None else self._back(chosen, starts, counts)
        )

    @classmethod
    def from_mask(cls, buffers: KeyValues, compute_RL: Tensor, lengths: Sequence[int]) -> CachedRows:
        """The plan of a rule's choice; the host reads `compute_RL` once, and waits for it if it is not on the CPU.

        Args:
            buffers: see the class.
            compute_RL: bool [R, L], the positions that go through the network.
            lengths: positions of each row.
        """
        compute_RL = compute_RL.cpu()
        row_T, position_T = compute_RL.nonzero(as_tuple=True)
        device = buffers.key[0].device
        return cls(buffers, row_T.to(device), position_T.to(device), compute_RL.sum(1).tolist(), lengths)

    def _group(
        self, rows: list[int], starts: list[int], counts: Sequence[int], lengths: Sequence[int], alone: bool
    ) -> _Group:
        device = self.row_T.device
        first, last = rows[0], rows[-1]
        neighbours = last - first + 1 == len(rows)
        queries = max(counts[row] for row in rows)
        token_rQ = None
        if not alone or min(counts[row] for row in rows) < queries:
            start_r1 = torch.tensor([starts[row] for row in rows])[:, None]
            count_r1 = torch.tensor([counts[row] for row in rows])[:, None]
            token_rQ = (start_r1 + torch.minimum(torch.arange(queries), count_r1 - 1)).to(device)
        length = max(lengths[row] for row in rows)
        seen_r1qL = None
        if min(lengths[row] for row in rows) < length:
            length_r1 = torch.tensor([lengths[row] for row in rows])[:, None]
            seen_r1qL = (torch.arange(length) < length_r1)[:, None, None].to(device)
        places = slice(first, last + 1) if neighbours else torch.tensor(rows, device=device)
        return _Group(places, token_rQ, queries, length, seen_r1qL)

    def _seeing(self, group: _Group, visible_TL: Tensor) -> _Group:
        """The group with a mask of its own for each query."""
        visible_TL = visible_TL[:, : group.length]
        if group.token_rQ is None:
            return group._replace(seen_r1qL=visible_TL.unflatten(0, (-1, group.queries))[:, None])
        return group._replace(seen_r1qL=visible_TL[group.token_rQ][:, None])

    def _back(self, chosen: list[list[int]], starts: list[int], counts: Sequence[int]) -> Tensor:
        """int64 [T]: where in the groups' outputs, one after the other, each token's own is."""
        back_T = torch.empty(starts[-1], dtype=torch.int64)
        offset = 0
        for rows, group in zip(chosen, self.groups, strict=True):
            for row in rows:
                back_T[starts[row] : starts[row + 1]] = torch.arange(offset, offset + counts[row])
                offset += group.queries
        return back_T.to(self.row_T.device)

    def mix(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Writes the pass's keys and values into their layer, and attends in the dtype of the buffers.

        Args:
            module: gives `layer_idx` and `scaling`.
            query: [1, H, T, K], rotated.
            key: [1, G, T, K], rotated.
            value: [1, G, T, K].

        Returns:
            [1, T, H, K].
        """
        layer = module.layer_idx
        key_TGK, value_TGK = key[0].transpose(0, 1), value[0].transpose(0, 1)
        self.buffers.write(layer, self.row_T, self.position_T, key_TGK, value_TGK)
        query_THK = query[0].transpose(0, 1).to(self.buffers.dtype)
        parts = [self._attend(layer, group, query_THK, module.scaling) for group in self.groups]
        mixed_THK = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (mixed_THK if self.back_T is None else mixed_THK[self.back_T])[None].to(query.dtype)

    def _attend(self, layer: int, group: _Group, query_THK: Tensor, scaling: float) -> Tensor:
        """[r * Q, H, K] of one group.

        Query heads that share a key head are rows of one product, so keys and values are read as they lie.
        """
        key_rGLK, value_rGLK = self.buffers.read(layer, group.rows, group.length)
        r, G, _, K = key_rGLK.shape
        H, Q = query_THK.shape[1], group.queries
        query_rQHK = query_THK.view(r, Q, H, K) if group.token_rQ is None else query_THK[group.token_rQ]
        query_rGQK = query_rQHK.view(r, Q, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(r, G, H // G * Q, K)
        seen = group.seen_r1qL
        if seen is not None and seen.shape[2] > 1:
            seen = seen.repeat(1, 1, H // G, 1)
        mixed = scaled_dot_product_attention(query_rGQK, key_rGLK, value_rGLK, attn_mask=seen, scale=scaling)
        return mixed.view(r, G, H // G, Q, K).permute(0, 3, 1, 2, 4).reshape(r * Q, H, K)
