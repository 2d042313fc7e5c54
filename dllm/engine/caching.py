"""A cache at work: its rule, and the buffers that it reads and writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dllm.engine.buffers import KeyValues
from dllm.engine.cached_rows import CachedRows
from dllm.engine.caches import Cache, RowsState, chosen
from dllm.layers.attention import AttentionPlan
from dllm.sampling.config import SamplingConfig
from dllm.sampling.network import Reuse
from dllm.sampling.rows import Rows


class Caching(Reuse):
    """What `dllm.sampling.batch.Batch` takes over from earlier steps.

    Args:
        cache: the rule.
        buffers: of the model, used by this alone.
    """

    def __init__(self, cache: Cache, buffers: KeyValues) -> None:
        self.rule, self.exact, self.buffers = cache.compute, cache.exact, buffers
        self.rows = 0  # those of the buffers that are in use

    def compute(self, rows: Rows, place_RW: Tensor, valid_RW: Tensor) -> Tensor:
        """See `Reuse.compute`."""
        return self.rule(
            RowsState(
                fresh_R=(rows.block_step_R == 0) | rows.moved_R,
                place_RW=place_RW,
                valid_RW=valid_RW,
                open_RL=rows.open_RL,
                just_committed_RL=rows.changed_RL,
                block_step_R=rows.block_step_R,
                length_R=rows.length_R,
            )
        )

    def plan(
        self,
        row_T: Tensor,
        position_T: Tensor,
        tokens_P: list[int],
        lengths_P: list[int],
        visible_TL: Tensor | None = None,
    ) -> AttentionPlan:
        """See `Reuse.plan`."""
        return CachedRows(self.buffers, row_T, position_T, tokens_P, lengths_P, visible_TL)

    def admit(self, rows: int, positions: int, room: tuple[int, int] | None = None) -> None:
        """See `Reuse.admit`."""
        if rows > self.buffers.rows or positions > self.buffers.length:
            self.buffers.reserve(*(room or (rows, positions)), exact=True)
        # a hidden position has weight 0, and 0 times what is no number is none either: nothing is left of who was there before
        self.buffers.erase(range(self.rows, rows))
        self.rows = rows

    def keep(self, index_P: list[int]) -> None:
        """See `Reuse.keep`."""
        self.buffers.keep(index_P)
        self.rows = len(index_P)


def caching(config: SamplingConfig, model: Any) -> Caching | None:
    """The cache that the settings ask for, with empty buffers; None where everything is computed."""
    return None if config.cache == "none" else Caching(chosen(config), KeyValues.of(model))
