"""What happened in a denoising run, step by step: enough to replay it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dllm.errors import DataError

FORMAT = "dllm.trace/1"


_NONE = torch.empty(0, dtype=torch.int64)


class StepEvent(NamedTuple):
    """One denoising step: the tokens it committed, over all rows, and where rows became longer. All tensors are on the CPU."""

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
    grown_row: Tensor = _NONE
    """int64 [G]: the row of each mask that became several, after the step's tokens were committed (length policy daedal)."""
    grown_position: Tensor = _NONE
    """int64 [G]: where that mask stands."""
    grown_count: Tensor = _NONE
    """int64 [G]: how many masks were put in behind it; what follows has moved by so many positions."""

    def with_rows(self, names: Tensor) -> StepEvent:
        """The event with row i called names[i]; int64 [rows]."""
        return self._replace(row=names[self.row], grown_row=names[self.grown_row])

    def of_row(self, row: int) -> StepEvent:
        """What happened to one row, which is called 0 then."""
        here, grown = self.row == row, self.grown_row == row
        return StepEvent(
            self.step,
            torch.zeros_like(self.row[here]),
            self.position[here],
            self.token[here],
            self.confidence[here],
            torch.zeros_like(self.grown_row[grown]),
            self.grown_position[grown],
            self.grown_count[grown],
        )

    def applied(self, canvas: Tensor, row: int = 0) -> Tensor:
        """The row's canvas after this step, from the one before it: int64 [length], another tensor."""
        here, grown = self.row == row, self.grown_row == row
        canvas = canvas.index_put((self.position[here],), self.token[here])
        return _lengthened(canvas, self.grown_position[grown].tolist(), self.grown_count[grown].tolist())


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
            if bool((event.row == row).any()) or bool((event.grown_row == row).any()):
                canvas = event.applied(canvas, row)
                yield canvas.clone()

    def commit_steps(self, row: int) -> Tensor:
        """int64 [length of the last canvas]: the step at which each position was committed, -1 where the token was given."""
        steps = torch.full_like(self.start[row], -1)
        for event in self.events:
            grown = event.grown_row == row
            steps[event.position[event.row == row]] = event.step
            steps = _lengthened(steps, event.grown_position[grown].tolist(), event.grown_count[grown].tolist())
        return steps

    def stretched(self) -> Trace:
        """The trace as if rows had had their last length from the start: every position is one of the last canvas."""
        start = list(self.start)
        for event in self.events:
            for row, position, count in _growth(event):
                start[row] = _lengthened(start[row], [position], [count])
        later: list[tuple[int, int, int]] = []  # growth after an event, the last first
        events = []
        for event in reversed(self.events):
            later += reversed(_growth(event))
            moved = event.position.clone()
            for row, position, count in reversed(later):
                moved += count * ((event.row == row) & (moved > position))
            events.append(event._replace(position=moved, grown_row=_NONE, grown_position=_NONE, grown_count=_NONE))
        return Trace(start, events[::-1])

    def to_json(self) -> dict[str, Any]:
        """The trace as lists and numbers, for a file; `from_json` reads them."""
        events = [
            {name: value.tolist() if isinstance(value, Tensor) else value for name, value in event._asdict().items()}
            for event in self.events
        ]
        return {"format": FORMAT, "start": [row.tolist() for row in self.start], "events": events}

    @classmethod
    def from_json(cls, found: Any) -> Trace:
        """The trace that `to_json` gave; other keys beside its own are left alone.

        Raises:
            DataError: it is not of that form.
        """
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise DataError(f'This is no trace: a trace is a JSON object with "format": "{FORMAT}".')
        try:
            start = [torch.tensor(row, dtype=torch.int64) for row in found["start"]]
            events = [StepEvent(**{name: _read(name, value) for name, value in e.items()}) for e in found["events"]]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"This trace is damaged: {type(error).__name__}: {error}") from error
        return cls(start, events)

    @classmethod
    def joined(cls, traces: Iterable[Trace]) -> Trace:
        """One trace of several runs, the rows of each after those of the run before; steps of one number are one event."""
        start: list[Tensor] = []
        at_step: dict[int, list[StepEvent]] = {}
        for trace in traces:
            for event in trace.events:
                moved = event._replace(row=event.row + len(start), grown_row=event.grown_row + len(start))
                at_step.setdefault(event.step, []).append(moved)
            start += trace.start
        return cls(
            start,
            [
                StepEvent(step, *map(torch.cat, list(zip(*events, strict=True))[1:]))
                for step, events in sorted(at_step.items())
            ],
        )


def _read(name: str, value: Any) -> Any:
    """A field of a StepEvent from its JSON."""
    if not isinstance(value, list):
        return value
    return torch.tensor(value, dtype=torch.float32 if name == "confidence" else torch.int64)


def _growth(event: StepEvent) -> list[tuple[int, int, int]]:
    """(row, position, count) of each mask that became several."""
    values = (event.grown_row.tolist(), event.grown_position.tolist(), event.grown_count.tolist())
    return list(zip(*values, strict=True))


def _lengthened(values: Tensor, positions: list[int], counts: list[int]) -> Tensor:
    """Behind each of these positions, ascending, as many copies of what stands there."""
    for position, count in reversed(list(zip(positions, counts, strict=True))):
        values = torch.cat([values[: position + 1], values[position].expand(count), values[position + 1 :]])
    return values
