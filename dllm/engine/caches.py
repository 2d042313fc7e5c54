"""Cache rules: which positions go through the network at a step. All others are read as they were when last computed.

Shapes: R rows, L positions of the longest, W places of the widest current block.

At a block's first step every rule computes everything, and the logits of that pass are the block's first. Afterwards

| rule | computes |
|---|---|
| none | everything |
| prefix | the block's first place and all that follows |
| dual | the block's places |
| vicinity | the block's places and their neighbours |
| delayed | what is still masked, and what the last step committed |

A LLaDA sees in both directions, so keys and values of a position change whenever a token anywhere does: `none` is exact,
the others are not, unless `cache_refresh=1` makes them compute everything too.

Each rule is a pure function of the rows' state that reads nothing back to the host; a row that has no block computes
nothing.

Source: Fast-dLLM, arXiv:2505.22618, 3.2 (prefix, dual); dKV-Cache, arXiv:2505.15781, 3.3 (delayed).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.sampling.config import CacheName, SamplingConfig


class RowsState(NamedTuple):
    """What a rule may look at."""

    fresh_R: Tensor
    """bool: the row's block starts at this step, or nothing lies where it lay before."""
    place_RW: Tensor
    """int64: canvas positions of the places of the row's current block."""
    valid_RW: Tensor
    """bool: which of them are places, and not padding; none in a row that is finished."""
    open_RL: Tensor
    """bool: still masked, and to be written at some time."""
    just_committed_RL: Tensor
    """bool: committed at the last step."""
    block_step_R: Tensor
    """int64: steps that the row has taken in this block."""
    length_R: Tensor
    """int64: positions of the row."""


class Cache(NamedTuple):
    """A rule with its settings."""

    compute: Callable[[RowsState], Tensor]
    """compute_RL, bool [R, L]: what goes through the network."""
    exact: bool
    """Whether every step computes everything."""


def _real(rows: RowsState) -> Tensor:
    """bool [R, L]: the positions of rows that have a block."""
    position_L = torch.arange(rows.open_RL.shape[1], device=rows.open_RL.device)
    return (position_L < rows.length_R[:, None]) & rows.valid_RW.any(1, keepdim=True)


def _block(rows: RowsState) -> Tensor:
    """bool [R, L]: the places of each row's block."""
    places_RL = torch.zeros_like(rows.open_RL, dtype=torch.int64)
    return places_RL.scatter_add_(1, rows.place_RW, rows.valid_RW.long()) > 0


def _full_where_due(rows: RowsState, part_RL: Tensor, cache_refresh: int | None) -> Tensor:
    """Everything at a block's first step and at every `cache_refresh`-th after it, `part_RL` at the others."""
    due_R = rows.fresh_R
    if cache_refresh is not None:
        due_R = due_R | (rows.block_step_R % cache_refresh == 0)
    return _real(rows) & (part_RL | due_R[:, None])


def none(rows: RowsState) -> Tensor:
    """Everything, at every step."""
    return _real(rows)


def prefix(rows: RowsState, *, cache_refresh: int | None) -> Tensor:
    """The block and all that follows its first place; what lies before is kept.

    Args:
        rows: their state.
        cache_refresh: also everything at every n-th step of a block; None for its first step alone.

    Source: Fast-dLLM, arXiv:2505.22618, 3.2.
    """
    position_L = torch.arange(rows.open_RL.shape[1], device=rows.open_RL.device)
    first_R = rows.place_RW.masked_fill(~rows.valid_RW, rows.open_RL.shape[1]).amin(1)
    return _full_where_due(rows, position_L >= first_R[:, None], cache_refresh)


def dual(rows: RowsState, *, cache_refresh: int | None) -> Tensor:
    """The block alone; what lies on both sides is kept.

    Args:
        rows: their state.
        cache_refresh: as in `prefix`.

    Source: Fast-dLLM, arXiv:2505.22618, 3.2 (DualCache).
    """
    return _full_where_due(rows, _block(rows), cache_refresh)


def vicinity(rows: RowsState, *, vicinity: int, cache_refresh: int | None) -> Tensor:
    """The block and the positions near one of its places.

    Args:
        rows: their state.
        vicinity: how many positions on either side of a place.
        cache_refresh: as in `prefix`.
    """
    count_RL = torch.nn.functional.pad(_block(rows).long().cumsum(1), (1, 0))  # at i: places before position i
    position_L = torch.arange(rows.open_RL.shape[1], device=rows.open_RL.device)
    start_L, end_L = (position_L - vicinity).clamp(min=0), (position_L + vicinity + 1).clamp(max=len(position_L))
    return _full_where_due(rows, count_RL[:, end_L] > count_RL[:, start_L], cache_refresh)


def delayed(rows: RowsState, *, cache_refresh: int | None) -> Tensor:
    """All masks, those of later blocks too, and what was committed at the last step: a token's own keys and values are
    kept from the step after its commit on, when they have been computed from the token and no longer from a mask.

    Args:
        rows: their state.
        cache_refresh: as in `prefix`.

    Source: dKV-Cache, arXiv:2505.15781, 3.2 and 3.3 (dKV-Cache-Decode).
    """
    return _full_where_due(rows, rows.open_RL | rows.just_committed_RL, cache_refresh)


CACHES: dict[CacheName, Callable[..., Tensor]] = {
    "none": none,
    "prefix": prefix,
    "dual": dual,
    "vicinity": vicinity,
    "delayed": delayed,
}
"""By the name that `--cache` takes; their options and defaults stand in `dllm.sampling.config.CACHE_OPTIONS`."""


def chosen(config: SamplingConfig) -> Cache:
    """The rule that the settings ask for; they are already checked."""
    return Cache(partial(CACHES[config.cache], **config.cache_options), exact=config.exact)
