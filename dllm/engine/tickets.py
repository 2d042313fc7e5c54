"""What whoever submits a request holds in hand: it waits for the answer, watches it being written, or gives it up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from dllm.errors import DllmError
from dllm.sampling.batch import Batch, alike
from dllm.sampling.policies import POLICIES
from dllm.sampling.rows import Progress, Request, most_in_block
from dllm.sampling.trace import StepEvent


class CommittedBlock(NamedTuple):
    """A block that is complete: its tokens are final."""

    position: Tensor
    """int64 [M]: positions of the canvas, in reading order."""
    token: Tensor
    """int64 [M]."""


class Answer(NamedTuple):
    """What became of a request."""

    canvas: Tensor
    """int64 [length], filled."""
    steps: int
    written: int
    """Masks that were filled; less than it had where an early stop left some open."""
    seconds: float
    """From its submission."""
    text: str | None = None
    """What was written after the prompt, up to its end, or the whole filled text of an infilling; None without a tokenizer."""
    waited: float = 0.0
    """Seconds of those that it stood in line."""


class Cancelled(DllmError):
    """The request was cancelled before it was done."""


class Desk(Protocol):
    """Whoever works on the tickets: see `dllm.engine.scheduler.Scheduler`."""

    def cancel(self, ticket: Ticket) -> None:
        """The ticket's request is given up."""

    def wait(self, until: Callable[[], bool]) -> None:
        """Returns when `until` holds."""


class Ticket:
    """A request on its way. Iterate over it to see it being written; `answer()` waits for the end.

    Iteration gives a `CommittedBlock` for every block that is complete and, if it is watched, a `StepEvent` for every step of
    the row (its row is 0, its step the row's own; what was taken back is a mask again). It may begin late: what happened
    before is kept. Every event is given once, so a ticket has one reader.
    """

    def __init__(
        self,
        desk: Desk,
        request: Request,
        watch: bool,
        bytes_per_position: int,
        read: Callable[[Request, Tensor], str] | None = None,
    ) -> None:
        self.request, self.watched = request, watch
        self.kind = alike(request.config)
        self.rows = request.config.branches
        self.length = request.most_positions
        self.shadow = most_in_block(request) if "verified" in POLICIES[request.config.policy].needs else 0
        self.bytes_per_position = bytes_per_position
        self._read = read
        self.alone = False
        """Whether it has to be tried by itself, because a batch that it was in failed."""
        self.filled = 0
        """Masks that are filled so far, as far as the host knows."""
        self._submitted = self._admitted = time.monotonic()
        self._desk = desk
        self._events: deque[StepEvent | CommittedBlock] = deque()
        self._steps = 0  # that it has told of
        self._written = 0  # places of complete blocks
        self._answer: Answer | None = None
        self._error: Exception | None = None

    @property
    def done(self) -> bool:
        """Nothing more will happen to it: it is answered, failed or cancelled."""
        return self._answer is not None or self._error is not None

    def cancel(self) -> None:
        """Gives the row up; nothing happens to one that is done."""
        self._desk.cancel(self)

    def answer(self) -> Answer:
        """The filled canvas, as soon as there is one.

        Raises:
            Cancelled: the request was cancelled.
            NonFiniteError: the model gave logits that are no numbers.
            Exception: what the forward raised, if it did so for this request alone.
        """
        self._desk.wait(lambda: self.done)
        if self._error is not None:
            raise self._error.with_traceback(None)
        assert self._answer is not None
        if self._read is not None and self._answer.text is None:
            self._answer = self._answer._replace(text=self._read(self.request, self._answer.canvas))
        return self._answer

    def __iter__(self) -> Iterator[StepEvent | CommittedBlock]:
        while True:
            self._desk.wait(lambda: bool(self._events) or self.done)
            while self._events:
                yield self._events.popleft()
            if self.done and not self._events:
                if self._error is not None:
                    raise self._error.with_traceback(None)
                return

    # --- for the scheduler, which holds its lock

    def admit(self) -> None:
        """It is a row of a batch from now on."""
        self._admitted = time.monotonic()

    def finish(self, canvas: Tensor, steps: int, written: int) -> None:
        """It is answered; what an early stop left is its last block."""
        request = self.request.grown(len(canvas) - len(self.request.canvas))
        position = request.masked.nonzero()[self._written :, 0]
        if len(position):
            self._events.append(CommittedBlock(position, canvas[position]))
        self.filled, now = written, time.monotonic()
        waited = self._admitted - self._submitted
        self._answer = Answer(canvas, steps, written, now - self._submitted, waited=waited)

    def fail(self, error: Exception) -> None:
        """It has come to nothing."""
        self._error = error

    def note_step(self, event: StepEvent, row: int, steps: int) -> None:
        """Its row, of this number, has taken so many steps; one that it has told of already is not told again."""
        if steps > self._steps:
            self._steps = steps
            self._events.append(event.of_row(row)._replace(step=steps - 1))

    def note_progress(self, batch: Batch, row: int, progress: Progress) -> None:
        """Its row, of this number, has come so far."""
        self.filled, start = progress.written, progress.start
        if start > self._written:
            assert batch.rows is not None
            position = batch.rows.place_RM[row, self._written : start]
            self._events.append(CommittedBlock(position.cpu(), batch.rows.ids_RL[row, position].cpu()))
            self._written = start
