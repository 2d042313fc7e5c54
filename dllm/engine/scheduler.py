"""Continuous batching: requests join and leave between any two steps, and none waits for another to finish.

A request waits in line until the rows and the memory allow it; then it is a row of the batch of its kind (same policy, same
cache, with or without guidance, see `dllm.sampling.batch.alike`). Every round takes one step of every batch. A row moves on
to its next block the moment its block is complete, and gives up its place the moment it is done. Tokens do not depend on
any of this.

Two locks: `_stepping` is held by the one thread that takes a round's steps, `_lock` for moments, by whoever looks at or
changes the line, a ticket or the batches' names. So nobody who submits or cancels waits for a forward.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.errors import DllmError, NonFiniteError, OptionError
from dllm.sampling.batch import Batch, Finished, alike
from dllm.sampling.config import SamplingConfig
from dllm.sampling.network import Network, Reuse
from dllm.sampling.rows import Request, SpecialTokens, check_steps
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
    seconds: float
    """From its submission."""


class Cancelled(DllmError):
    """The request was cancelled before it was done."""


class Ticket:
    """A request on its way. Iterate over it to see it being written; `answer()` waits for the end.

    Iteration gives a `CommittedBlock` for every block that is complete and, with `steps`, a `StepEvent` for every step of
    the row (its row is 0, its step the row's own). It may begin late: what happened before is kept.
    """

    def __init__(self, scheduler: Scheduler, request: Request, steps: bool) -> None:
        self.request, self.wants_steps = request, steps
        self.began = time.monotonic()
        self._scheduler = scheduler
        self._events: deque[StepEvent | CommittedBlock] = deque()
        self._written = 0  # places of complete blocks
        self._answer: Answer | None = None
        self._error: Exception | None = None

    @property
    def done(self) -> bool:
        """Nothing more will happen to it: it is answered, failed or cancelled."""
        return self._answer is not None or self._error is not None

    def cancel(self) -> None:
        """Gives the row up; nothing happens to one that is done."""
        self._scheduler.cancel(self)

    def answer(self) -> Answer:
        """The filled canvas, as soon as there is one.

        Raises:
            Cancelled: the request was cancelled.
            NonFiniteError: the model gave logits that are no numbers.
            RuntimeError: what the forward of its batch raised.
        """
        self._scheduler.wait(lambda: self.done)
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def __iter__(self) -> Iterator[StepEvent | CommittedBlock]:
        while True:
            self._scheduler.wait(lambda: bool(self._events) or self.done)
            while self._events:
                yield self._events.popleft()
            if self.done and not self._events:
                if self._error is not None:
                    raise self._error
                return

    def end(self, answer: Answer | None, error: Exception | None) -> None:
        """For the scheduler: how it ended."""
        if answer is not None:
            position = self.request.masked.nonzero()[self._written :, 0]
            if len(position):  # an early stop completes what it leaves
                self._events.append(CommittedBlock(position, answer.canvas[position]))
        self._answer, self._error = answer, error

    def note(self, event: StepEvent | None, batch: Batch, row: int, start: int) -> None:
        """For the scheduler: a step of its row is done; its blocks up to place `start` are complete."""
        if event is not None and self.wants_steps:
            here = event.row == row
            step = event._replace(row=torch.zeros_like(event.row[here]), position=event.position[here])
            self._events.append(step._replace(token=event.token[here], confidence=event.confidence[here]))
        if start > self._written:
            assert batch.rows is not None
            position = batch.rows.place_RM[row, self._written : start]
            self._events.append(CommittedBlock(position.cpu(), batch.rows.ids_RL[row, position].cpu()))
            self._written = start


class Scheduler:
    """Takes requests and fills them in, many at a time.

    Args:
        network: the mask predictor.
        tokens: the special ids.
        device: where the network lives.
        reuse: makes the cache that settings ask for, one for each kind of request.
        max_rows: rows of a round at most, guidance's counted twice.
        max_bytes: memory that the rows of a round may take.
        bytes_per_position: what a position of a row takes under some settings.
        max_waiting: requests in line at most; None for any number (a waiting one is a few kilobytes).
    """

    def __init__(
        self,
        network: Network,
        tokens: SpecialTokens,
        device: torch.device | str,
        *,
        reuse: Callable[[SamplingConfig], Reuse | None] = lambda _: None,
        max_rows: int = 32,
        max_bytes: float = float("inf"),
        bytes_per_position: Callable[[SamplingConfig], int] = lambda _: 0,
        max_waiting: int | None = None,
    ) -> None:
        if max_rows < 1:
            raise OptionError(f"max_rows={max_rows}: it is at least 1.")
        self._network, self._tokens, self._device, self._reuse = network, tokens, device, reuse
        self.max_rows, self.max_bytes, self.max_waiting = max_rows, max_bytes, max_waiting
        self._bytes_per_position = bytes_per_position
        self._waiting: deque[Ticket] = deque()
        self._batches: dict[SamplingConfig, Batch] = {}
        self._lock, self._stepping = threading.Condition(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.nfe = 0
        """Forwards so far."""
        self.most_rows = 0
        """Rows of the fullest round so far."""

    # --- what users call

    def submit(self, request: Request, *, steps: bool = False) -> Ticket:
        """Puts a request in line.

        Args:
            request: the canvas and its settings.
            steps: whether its ticket gives every denoising step.

        Raises:
            OptionError: fewer steps than blocks, a row larger than the memory, or a line that is full.
        """
        check_steps(request)
        needs = self._bytes(request)
        if self._rows(request) > self.max_rows or needs > self.max_bytes:
            raise OptionError(
                f"A row of {len(request.canvas)} positions needs {needs / 2**20:.0f} MiB, and there are "
                f"{self.max_bytes / 2**20:.0f} (max_rows={self.max_rows}; guidance takes two): shorten it, or give the engine "
                f"more."
            )
        ticket = Ticket(self, request, steps)
        with self._lock:
            if self._closed:
                raise OptionError("This engine is closed.")
            if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
                raise OptionError(
                    f"{len(self._waiting)} requests are waiting, the most that max_waiting allows: try again later."
                )
            if bool(request.masked.any()):
                self._waiting.append(ticket)
            else:
                ticket.end(Answer(request.canvas.clone(), 0, 0.0), None)
            self._lock.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Takes a request out of the line, or its row out of its batch before the next step."""
        with self._lock:
            if ticket.done:
                return
            ticket.end(None, Cancelled("The request was cancelled."))
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._lock.notify_all()
        if self._stepping.acquire(blocking=False):  # otherwise whoever is stepping does it
            try:
                self._let_go()
            finally:
                self._stepping.release()

    def wait(self, until: Callable[[], bool]) -> None:
        """Returns when `until` holds; without a thread of the engine's own, the caller's takes the steps."""
        while True:
            with self._lock:
                if until():
                    return
                if self._thread is not None:
                    self._lock.wait()
                    continue
            self.step()

    def step(self) -> bool:
        """One round: admits, takes one step of every batch, and lets go of the rows that are done.

        Returns:
            Whether there was anything to do.
        """
        with self._stepping:
            self._let_go()
            with self._lock:
                self._admit()
                batches = list(self._batches.items())
            self.most_rows = max(self.most_rows, sum(len(batch) * batch.branches for _, batch in batches))
            for kind, batch in batches:
                self._step(kind, batch)
            with self._lock:
                self._lock.notify_all()
                return bool(self._batches or self._waiting)

    def start(self) -> None:
        """From now on a thread takes the steps whenever there is work."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dllm-engine", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Cancels what is left, and ends the thread."""
        with self._lock:
            self._closed = True
            for ticket in [*self._waiting, *(name for batch in self._batches.values() for name in batch.names)]:
                assert isinstance(ticket, Ticket)
                if not ticket.done:
                    ticket.end(None, Cancelled("The engine was closed."))
            self._waiting.clear()
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._stepping:
            self._let_go()

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are rows of a batch."""
        return sum(map(len, self._batches.values()))

    # --- inside

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._waiting or self._batches or self._closed):
                    self._lock.wait()
                if self._closed:
                    return
            self.step()

    def _let_go(self) -> None:
        """Rows whose request was cancelled leave their batches."""
        for kind, batch in list(self._batches.items()):
            gone = [row for row, ticket in enumerate(batch.names) if isinstance(ticket, Ticket) and ticket.done]
            if gone:
                batch.remove(gone)
            if not len(batch):
                with self._lock:
                    del self._batches[kind]

    def _rows(self, request: Request) -> int:
        return 2 if request.config.cfg_scale > 0 else 1

    def _bytes(self, request: Request) -> int:
        return self._rows(request) * len(request.canvas) * self._bytes_per_position(request.config)

    def _admit(self) -> None:
        """Takes from the head of the line what fits; one that does not fit waits, and those behind it with it."""
        running = [request for batch in self._batches.values() for request in batch.requests]
        rows, used = sum(map(self._rows, running)), sum(map(self._bytes, running))
        chosen: dict[SamplingConfig, list[Ticket]] = {}
        while self._waiting:
            request = self._waiting[0].request
            if rows + self._rows(request) > self.max_rows or used + self._bytes(request) > self.max_bytes:
                break
            rows, used = rows + self._rows(request), used + self._bytes(request)
            chosen.setdefault(alike(request.config), []).append(self._waiting.popleft())
        for kind, tickets in chosen.items():
            if kind not in self._batches:
                self._batches[kind] = Batch(
                    self._network, kind, self._tokens, self._device, reuse=self._reuse(kind), watch=False
                )
            self._batches[kind].watch |= any(ticket.wants_steps for ticket in tickets)
            self._batches[kind].add([ticket.request for ticket in tickets], tickets)

    def _step(self, kind: SamplingConfig, batch: Batch) -> None:
        tickets = list(batch.names)
        before = batch.nfe
        try:
            event = batch.step()
        except (RuntimeError, ValueError) as error:  # out of memory, a broken model: the other kinds go on
            with self._lock:
                del self._batches[kind]
                for ticket in tickets:
                    assert isinstance(ticket, Ticket)
                    ticket.end(None, error)
            return
        self.nfe += batch.nfe - before
        assert batch.rows is not None
        starts = batch.rows.start_R.tolist()
        with self._lock:
            for row, (ticket, start) in enumerate(zip(tickets, starts, strict=True)):
                assert isinstance(ticket, Ticket)
                ticket.note(event, batch, row, start)
            for finished in batch.take_finished():
                self._finish(finished)
            if not len(batch):
                del self._batches[kind]

    def _finish(self, finished: Finished) -> None:
        ticket = finished.name
        assert isinstance(ticket, Ticket)
        if ticket.done:  # cancelled while its last step was taken
            return
        if finished.failed:
            message = (
                f"The model's logits are not numbers (NaN or infinite) at step {finished.steps}: its weights may be damaged, or "
                f"too large for their dtype."
            )
            ticket.end(None, NonFiniteError(message))
        else:
            ticket.end(Answer(finished.canvas, finished.steps, time.monotonic() - ticket.began), None)
