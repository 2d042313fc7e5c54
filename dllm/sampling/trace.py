"""What happened in a denoising run, step by step: enough to replay it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class StepEvent(NamedTuple):
    """One denoising step: the tokens it committed, over all rows. All tensors are on the CPU."""

    step: int
    """0 for the first step of the run."""
    row: Tensor
    """int64 [M]: the row of each committed token, by its place among the inputs."""
    position: Tensor
    """int64 [M]: its position in the row's canvas."""
    token: Tensor
    """int64 [M]"""
    confidence: Tensor
    """fp32 [M]: the probability the model gave it."""


@dataclass
class Trace:
    """The canvases before the first step, and every step after."""

    start: list[Tensor]
    """One int64 [length] a row: given tokens, and masks."""
    events: list[StepEvent] = field(default_factory=list)

    def frames(self, row: int) -> Iterator[Tensor]:
        """The canvas of one row before the first step and after each step that changed it: int64 [length] each."""
        canvas = self.start[row].clone()
        yield canvas.clone()
        for event in self.events:
            here = event.row == row
            if bool(here.any()):
                canvas[event.position[here]] = event.token[here]
                yield canvas.clone()

    def commit_steps(self, row: int) -> Tensor:
        """int64 [length]: the step at which each position was committed, -1 where the token was given."""
        steps = torch.full_like(self.start[row], -1)
        for event in self.events:
            steps[event.position[event.row == row]] = event.step
        return steps
