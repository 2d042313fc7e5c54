"""Requests on their way through an engine, in a line that is filled up as it moves, and a bar that tells how far they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from dllm.cli.tasks import Prepared
from dllm.errors import DllmError

if TYPE_CHECKING:
    from dllm.engine.tickets import Ticket
    from dllm.pipelines.llada.engine import Engine


class Line:
    """Requests on their way through an engine: it has about as many waiting as it takes at once, and is given the others later.

    Args:
        engine: for these alone.
        submit: puts one in its line.
        left: all of them, in their order.
    """

    def __init__(self, engine: Engine, submit: Callable[[Prepared], Ticket], left: Sequence[Prepared]) -> None:
        self.scheduler, self.submit, self.left = engine.scheduler, submit, deque(left)
        self.tickets: dict[int, Ticket] = {}
        self.refused: dict[int, DllmError] = {}

    @property
    def filled(self) -> int:
        """Masks that are filled of requests whose ticket was not asked for yet, or was the last to be."""
        return sum(ticket.filled for ticket in self.tickets.values()) + self.head.filled

    def ticket(self, one: Prepared) -> Ticket:
        """That of a request; they are asked for in their order, each once.

        Raises:
            DllmError: the engine does not take it.
        """
        self._fill()
        row = one.request.row
        if row in self.refused:
            raise self.refused.pop(row)
        self.head = self.tickets.pop(row)
        return self.head

    def step(self) -> None:
        """A step of all that are running."""
        self._fill()
        self.scheduler.step()

    def _fill(self) -> None:
        while self.left and self.scheduler.waiting < self.scheduler.max_rows:
            one = self.left.popleft()
            try:
                self.tickets[one.request.row] = self.submit(one)
            except DllmError as error:
                self.refused[one.request.row] = error


class Bar:
    """Progress on standard error: tokens as they come, rows as they are answered."""

    def __init__(self, masks: int, rows: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.fields[done]}/{task.fields[rows]} rows"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task("", total=masks, done=0, rows=rows)
        self.before = self.done = 0

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def filled(self, masks: int) -> None:
        """So many masks are filled of rows that are not answered yet."""
        self.progress.update(self.task, completed=self.before + masks)

    def row(self, masks: int) -> None:
        """A row is answered, with so many masks: also those that an early stop left open are done."""
        self.before += masks
        self.done += 1
        self.progress.update(self.task, done=self.done)
