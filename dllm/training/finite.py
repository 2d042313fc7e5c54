"""A loss or a gradient that is not finite ends the run before the weights see it, and the samples are named.

Shapes: B samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dllm.errors import NonFiniteError

SHOWN = 8
"""Samples that a message names."""


class FiniteGuard:
    """Looks at a step's gradient norm, which all ranks share, and so needs no communication of its own.

    A rank whose loss is not finite turns its gradient into NaN; the engine's own reduction carries that to every rank, and
    all stop at the same step. Under fp16 nothing is looked at: there the scaler skips such steps and lowers its scale.

    Args:
        rank: this process.
        describe: sample -> which row it is, in words.
        go_on: what to do next, in words, asked for when it is needed.
    """

    def __init__(self, rank: int, describe: Callable[[int], str], go_on: Callable[[], str]) -> None:
        self.rank, self.describe, self.go_on = rank, describe, go_on
        self.step: list[
            tuple[Tensor, Tensor]
        ] = []  # of each micro-batch: samples, whether the row's nats are not finite

    def add(self, loss: Tensor, sample_B: Tensor, rows: Tensor) -> Tensor:
        """Notes a micro-batch; gives its loss back, with a gradient of NaN if it is not finite.

        Args:
            loss: scalar.
            sample_B: int64.
            rows: of `dllm.training.metrics.row_sums`.
        """
        self.step.append((sample_B.detach(), ~rows.isfinite().all(1)))
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)  # times 1 changes no bit

    def check(self, norm: Any, steps_done: int, *, overflow: bool = False) -> None:
        """Ends a step before its gradient is applied.

        Args:
            norm: of the gradient, over all ranks; None if the engine does not tell.
            steps_done: before this step.
            overflow: whether the engine has found by itself that the gradient is not finite, and skipped it.

        Raises:
            NonFiniteError: on all ranks, with one text.
        """
        finite = not overflow and (norm is None or math.isfinite(float(norm)))
        if not finite:
            raise NonFiniteError(self._message(steps_done + 1, norm))
        self.step.clear()

    def _message(self, step: int, norm: Any) -> str:
        samples = torch.cat([sample_B for sample_B, _ in self.step]).tolist() if self.step else []
        bad = torch.cat([bad_B for _, bad_B in self.step]).tolist() if self.step else []
        mine = (self.rank, samples, [s for s, b in zip(samples, bad, strict=True) if b])
        ranks = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [mine] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine)
        guilty = [(rank, lost) for rank, _, lost in ranks if lost]
        if guilty:
            where = "; ".join(f"on rank {rank}, {self._name(lost)}" for rank, lost in guilty)
            return f"Step {step}: the loss is not finite {where}. {self.go_on()}"
        where = "; ".join(f"rank {rank} had {self._name(all_)}" for rank, all_, _ in ranks)
        what = "" if norm is None else f" (its norm is {float(norm)})"
        return f"Step {step}: the gradient is not finite{what}, though every sample's loss is: {where}. {self.go_on()}"

    def _name(self, samples: list[int]) -> str:
        shown = ", ".join(f"{sample} ({self.describe(sample)})" for sample in samples[:SHOWN])
        more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
        return f"sample{'s' * (len(samples) > 1)} {shown}{more}"
