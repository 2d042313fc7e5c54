"""What the loop asks of a model and of a cache.

Shapes: R rows, P rows of a pass (twice R with guidance), L positions of the longest, W places of the widest block, T tokens
of a pass, N positions that are asked for, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from dllm.layers.attention import AttentionPlan
from dllm.sampling.proposals import Proposals
from dllm.sampling.rows import Rows


class Pass(NamedTuple):
    """One forward, over packed tokens."""

    ids_T: Tensor
    """int64 [T]."""
    position_T: Tensor
    """int64 [T]: the position of each in its row."""
    wanted_M: Tensor
    """int64 [M]: which of the tokens' states are read, N or with guidance 2 N."""
    plan: AttentionPlan
    """Who sees whom."""
    tokens_P: list[int]
    """How many of the tokens are each row's."""


class Network(Protocol):
    """The mask predictor: gives what `readout` makes of (head, states [M, D] at `wanted_M`)."""

    def __call__(self, work: Pass, readout: Callable[[nn.Module, Tensor], Proposals], /) -> Proposals: ...


class Reuse(Protocol):
    """What is taken over from earlier steps: see `dllm.engine.caches`."""

    exact: bool
    """Whether tokens are those of computing everything."""

    def compute(self, rows: Rows, place_RW: Tensor, valid_RW: Tensor) -> Tensor:
        """bool [R, L]: the positions that go through the network at this step."""

    def plan(
        self,
        row_T: Tensor,
        position_T: Tensor,
        tokens_P: list[int],
        lengths_P: list[int],
        visible_TL: Tensor | None = None,
    ) -> AttentionPlan:
        """Attention of these tokens with all that is kept of their rows, of which the pass holds so many tokens; or with what
        each token is to see of its row alone.
        """

    def admit(self, rows: int, positions: int, room: tuple[int, int] | None = None) -> None:
        """Makes room for this many rows of this many positions, all that there are; rows that are there stay. Where that takes
        new memory, for as many as `room` says: others are expected.
        """

    def keep(self, index_P: list[int]) -> None:
        """The rows of these numbers stay, in this order."""
