"""The forward of a step: which tokens go through the network, one row after the other, and whose states are read.

Shapes: R rows, P rows of the pass (twice R with guidance: row p is branch p % branches of row p // branches), L positions of
the longest, W places of the widest current block, Q = L + W, T tokens of the pass, N positions that are asked for,
M = N * branches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dllm.layers.attention import AttentionPlan, RaggedRows
from dllm.sampling.network import Pass, Reuse
from dllm.sampling.rows import Rows


class Shadows(NamedTuple):
    """Masks behind each row, one for each place of its block."""

    place_RW: Tensor
    """int64: the positions of the places."""
    needed_RW: Tensor
    """bool: those whose place holds a token."""
    shadow_N: Tensor
    """int64: which of them is read for each of the N places that are asked for; -1 for the row itself."""


def pack(
    rows: Rows,
    row_N: Tensor,
    position_N: Tensor,
    lengths_P: list[int],
    compute_RL: Tensor | None,
    *,
    branches: int,
    mask: int,
    reuse: Reuse | None,
    waits: bool,
) -> Pass:
    """The rows one after the other, without padding where the host may wait for the device; of a cache's, what it computes.

    Args:
        rows: their state.
        row_N: int64, the rows of the positions whose states are read.
        position_N: int64, these positions.
        lengths_P: positions of each row of the pass.
        compute_RL: bool, what the cache computes; None without one.
        branches: 2 with guidance, else 1.
        mask: the mask token.
        reuse: the cache, or None.
        waits: whether the host may wait for the device; if not, and without a cache, rows are padded to the longest.
    """
    R, L = rows.ids_RL.shape
    ids_PL = _branches(rows, branches, mask)
    wanted_BN = [row_N * branches + branch for branch in range(branches)]
    if reuse is None and (min(lengths_P) == L or not waits):
        position_T = torch.arange(L, device=ids_PL.device).repeat(R * branches)
        wanted_M = torch.cat([p_N * L + position_N for p_N in wanted_BN])
        visible = None if min(lengths_P) == L else rows.real_RL.repeat_interleave(branches, 0)[:, None, None]
        tokens_P = [L] * R * branches
        return Pass(ids_PL.flatten(), position_T, wanted_M, RaggedRows(tokens_P, ids_PL.device, visible), tokens_P)
    compute_PL = (rows.real_RL if compute_RL is None else compute_RL).repeat_interleave(branches, 0)
    row_T, position_T = compute_PL.nonzero(as_tuple=True)
    order_PL = (compute_PL.flatten().cumsum(0) - 1).view(R * branches, L)
    wanted_M = torch.cat([order_PL[p_N, position_N] for p_N in wanted_BN])
    plan: AttentionPlan
    if reuse is None:
        tokens_P, plan = lengths_P, RaggedRows(lengths_P, ids_PL.device)
    else:
        tokens_P = compute_PL.sum(1).tolist()
        plan = reuse.plan(row_T, position_T, tokens_P, lengths_P)
    return Pass(ids_PL[row_T, position_T], position_T, wanted_M, plan, tokens_P)


def pack_with_shadow(
    rows: Rows,
    row_N: Tensor,
    position_N: Tensor,
    shadows: Shadows,
    compute_RL: Tensor | None,
    *,
    branches: int,
    mask: int,
    reuse: Reuse | None,
    waits: bool,
) -> Pass:
    """Every row, and after it masks for the committed places of its block: shadows that see all but the token in their place.

    The row does not see its shadows. Committed places of the block are read from the shadow, all others from the row. Where
    the host must not wait for the device, and without a cache, every place of the block has one.

    Args:
        rows: see `pack`.
        row_N: see `pack`.
        position_N: see `pack`.
        shadows: the masks.
        compute_RL: see `pack`.
        branches: see `pack`.
        mask: see `pack`.
        reuse: see `pack`.
        waits: see `pack`.

    Source: WINO, arXiv:2507.18578.
    """
    ids_PL = _branches(rows, branches, mask)
    (P, L), W, device = ids_PL.shape, shadows.place_RW.shape[1], ids_PL.device
    Q, shadow_PW = L + W, shadows.place_RW.repeat_interleave(branches, 0)
    ids_PQ = torch.cat([ids_PL, torch.full_like(shadow_PW, mask)], 1)
    position_PQ = torch.cat([torch.arange(L, device=device).expand(P, L), shadow_PW], 1)
    visible_PQQ = torch.zeros(P, Q, Q, dtype=torch.bool, device=device)
    visible_PQQ[:, :, :L] = rows.real_RL.repeat_interleave(branches, 0)[:, None]
    visible_PQQ[:, L:, :L] &= torch.arange(L, device=device) != shadow_PW[:, :, None]
    visible_PQQ[:, L:, L:] = torch.eye(W, dtype=torch.bool, device=device)
    at_N = torch.where(shadows.shadow_N < 0, position_N, L + shadows.shadow_N)
    if reuse is None and not waits:
        wanted_M = torch.cat([(row_N * branches + branch) * Q + at_N for branch in range(branches)])
        tokens_P = [Q] * P
        shadowed = RaggedRows(tokens_P, device, visible_PQQ[:, None])
        return Pass(ids_PQ.flatten(), position_PQ.flatten(), wanted_M, shadowed, tokens_P)
    # with a cache the shadow's keys and values lie behind the row's; only committed places need one
    compute_RQ = torch.cat([rows.real_RL if compute_RL is None else compute_RL, shadows.needed_RW], 1)
    compute_PQ = compute_RQ.repeat_interleave(branches, 0)
    row_T, place_T = compute_PQ.nonzero(as_tuple=True)
    order_PQ = (compute_PQ.flatten().cumsum(0) - 1).view(P, Q)
    wanted_M = torch.cat([order_PQ[row_N * branches + branch, at_N] for branch in range(branches)])
    tokens_P = compute_PQ.sum(1).tolist()
    plan: AttentionPlan
    if reuse is not None:
        plan = reuse.plan(row_T, place_T, tokens_P, [Q] * P, visible_PQQ[row_T, place_T])
    else:
        packed_PQ = (~compute_PQ).long().argsort(dim=1, stable=True)[:, : max(tokens_P)]
        row_P1 = torch.arange(P, device=device)[:, None]
        seen_PQQ = visible_PQQ[row_P1[:, None], packed_PQ[:, :, None], packed_PQ[:, None]]
        plan = RaggedRows(tokens_P, device, seen_PQQ[:, None] if bool(shadows.needed_RW.any()) else None)
    return Pass(ids_PQ[row_T, place_T], position_PQ[row_T, place_T], wanted_M, plan, tokens_P)


def _branches(rows: Rows, branches: int, mask: int) -> Tensor:
    """int64 [P, L]: the canvases, each followed by what guidance's unconditional branch sees of it."""
    if branches == 1:
        return rows.ids_RL
    return torch.stack([rows.ids_RL, rows.ids_RL.masked_fill(rows.given_RL, mask)], 1).flatten(0, 1)
