"""Continuous batching: requests join and leave between any two steps, and none waits for another to finish.

A request waits in line until the rows and the memory allow it; then it is a row of the batch of its kind (same policy, same
cache, with or without guidance, see `dllm.sampling.batch.alike`). Every round takes one step of every batch. A row moves on
to its next block the moment its block is complete, and gives up its place the moment it is done. Tokens do not depend on
any of this.

Where a step of a batch raises (out of memory, a broken model), each of its requests is tried once more by itself: only
those fail that fail alone.

Two locks: `_stepping` is held by the one thread that takes a round's steps, `_lock` for moments, by whoever looks at or
changes the line, a ticket or the batches' names. So nobody who submits or cancels waits for a forward.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.engine.tickets import Cancelled, Ticket
from dllm.errors import OptionError
from dllm.sampling.batch import Batch
from dllm.sampling.config import SamplingConfig
from dllm.sampling.network import Network, Reuse
from dllm.sampling.rows import Finished, Progress, Request, SpecialTokens, check_steps


class _Room(NamedTuple):
    """What the rows of one batch take up."""

    rows: int
    positions: int
    """Of the longest."""
    bytes: int
    """Of the rectangle: rows times positions."""


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

    Raises:
        OptionError: `max_rows` or `max_waiting` is not a whole number of at least 1.
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
        for name, value in (("max_rows", max_rows), ("max_waiting", 1 if max_waiting is None else max_waiting)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r}: it is a whole number, at least 1.")
        self._network, self.tokens, self._device, self._reuse = network, tokens, device, reuse
        self.max_rows, self.max_bytes, self.max_waiting = max_rows, max_bytes, max_waiting
        self._bytes_per_position = bytes_per_position
        self._waiting: deque[Ticket] = deque()
        self._batches: dict[SamplingConfig, Batch] = {}
        self._rooms: dict[SamplingConfig, _Room] = {}
        self._lock, self._stepping = threading.Condition(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.nfe = 0
        """Forwards so far."""
        self.most_rows = 0
        """Rows of the fullest round so far."""

    # --- what users call

    def submit(
        self, request: Request, *, watch: bool = False, read: Callable[[Request, Tensor], str] | None = None
    ) -> Ticket:
        """Puts a request in line.

        Args:
            request: the canvas and its settings.
            watch: whether its ticket gives every denoising step.
            read: makes the answer's text of its canvas.

        Raises:
            OptionError: fewer steps than blocks, a row larger than the memory, or a line that is full.
        """
        check_steps(request)
        ticket = Ticket(self, request, watch, self._bytes_per_position(request.config), read)
        if ticket.rows > self.max_rows:
            raise OptionError(
                f"cfg_scale={request.config.cfg_scale} takes two rows, and max_rows={self.max_rows}: leave out cfg_scale, or "
                f"give the engine max_rows=2 or more."
            )
        needs = self._room([ticket], None).bytes
        if needs > self.max_bytes:
            raise OptionError(
                f"A row of {request.most_positions} positions needs {needs / 2**20:.2f} MiB, and there are "
                f"{self.max_bytes / 2**20:.2f} MiB for all rows: shorten the prompt or gen_length, or allow more with memory_gb."
            )
        with self._lock:
            if self._closed:
                raise OptionError("This engine is closed: make another one.")
            if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
                raise OptionError(
                    f"{len(self._waiting)} requests are waiting, the most that max_waiting allows: try again later."
                )
            if bool(request.masked.any()):
                self._waiting.append(ticket)
            else:
                ticket.finish(request.canvas.clone(), 0, 0)
            self._lock.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Takes a request out of the line, or its row out of its batch before the next step."""
        with self._lock:
            if ticket.done:
                return
            ticket.fail(Cancelled("The request was cancelled."))
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
            Whether anything is left to do.
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
        """From now on a thread takes the steps whenever there is work.

        Raises:
            OptionError: it is closed.
        """
        with self._lock:
            if self._closed:
                raise OptionError("This engine is closed: make another one.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dllm-engine", daemon=True)
                self._thread.start()
                self._lock.notify_all()

    def close(self) -> None:
        """Cancels what is left, and ends the thread."""
        with self._lock:
            self._give_up(Cancelled("The engine was closed."))
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        with self._stepping:
            self._let_go()

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are rows of a batch."""
        with self._lock:
            return sum(map(len, self._batches.values()))

    # --- inside

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._waiting or self._batches or self._closed):
                    self._lock.wait()
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:  # whoever waits must hear of it: nobody else takes steps
                with self._lock:
                    self._give_up(error)
                raise

    def _give_up(self, error: Exception) -> None:
        """Nothing is taken or done any more."""
        self._closed = True
        for ticket in [*self._waiting, *(ticket for batch in self._batches.values() for ticket in _tickets(batch))]:
            if not ticket.done:
                ticket.fail(error)
        self._waiting.clear()
        self._lock.notify_all()

    def _let_go(self) -> None:
        """Rows whose request was cancelled leave their batches."""
        for kind, batch in list(self._batches.items()):
            batch.remove([row for row, ticket in enumerate(_tickets(batch)) if ticket.done])
            if not len(batch):
                self._drop(kind)

    def _drop(self, kind: SamplingConfig) -> None:
        with self._lock:
            self._batches.pop(kind, None)
            self._rooms.pop(kind, None)

    def _room(self, tickets: Sequence[Ticket], held: _Room | None, spare: float = 0) -> _Room:
        """What these rows take up as one batch; a cache keeps what it holds where they fit in it.

        Args:
            tickets: of the rows.
            held: what their batch takes up now.
            spare: memory up to which a cache may take more than that: rows that join one by one shall not each make it copy
                all that it holds, so it doubles.
        """
        rows = sum(ticket.rows for ticket in tickets)
        positions = max(ticket.length for ticket in tickets) + max(ticket.shadow for ticket in tickets)
        each = tickets[0].bytes_per_position
        if held is not None and tickets[0].kind.cache != "none":
            if rows <= held.rows and positions <= held.positions:
                return held
            longer = held.positions if positions <= held.positions else max(positions, held.positions * 3 // 2)
            most = held.rows if rows <= held.rows else max(rows, min(2 * held.rows, self.max_rows))
            more = int(min(most, spare // max(1, longer * each)))
            if more >= rows:
                return _Room(more, longer, more * longer * each)
        return _Room(rows, positions, rows * positions * each)

    def _admit(self) -> None:
        """Takes from the head of the line what fits; one that does not fit waits, and those behind it with it."""
        running = {kind: _tickets(batch) for kind, batch in self._batches.items()}
        rooms = {kind: self._room(tickets, self._rooms.get(kind)) for kind, tickets in running.items()}
        rows = sum(ticket.rows for tickets in running.values() for ticket in tickets)
        if any(ticket.alone for tickets in running.values() for ticket in tickets):
            return
        joining: dict[SamplingConfig, list[Ticket]] = {}
        while self._waiting:
            ticket = self._waiting.popleft()
            kind = ticket.kind
            left = self.max_bytes - sum(other.bytes for of, other in rooms.items() if of != kind)
            room = self._room([*running.get(kind, []), ticket], rooms.get(kind), left)
            if rows + ticket.rows > self.max_rows or room.bytes > left or (ticket.alone and rows):
                self._waiting.appendleft(ticket)
                break
            rows, rooms[kind] = rows + ticket.rows, room
            running.setdefault(kind, []).append(ticket)
            joining.setdefault(kind, []).append(ticket)
            if ticket.alone:
                break
        self._rooms = rooms
        for kind, tickets in joining.items():
            try:
                self._join(kind, tickets)
            except Exception as error:  # noqa: BLE001 - no memory for what the cache keeps, say
                self._failed(kind, running[kind], error)

    def _join(self, kind: SamplingConfig, tickets: list[Ticket]) -> None:
        if kind not in self._batches:
            self._batches[kind] = Batch(self._network, kind, self.tokens, self._device, reuse=self._reuse(kind))
        for ticket in tickets:
            ticket.admit()
        room = self._rooms[kind]
        self._batches[kind].add([ticket.request for ticket in tickets], tickets, (room.rows, room.positions))

    def _step(self, kind: SamplingConfig, batch: Batch) -> None:
        tickets, before = _tickets(batch), batch.nfe
        batch.watch = any(ticket.watched for ticket in tickets)
        try:
            event = batch.step()
            steps = batch.rows.step_R.tolist() if event is not None and batch.rows is not None else []
            seen = batch.look()
            with self._lock:
                for row, (ticket, taken) in enumerate(zip(tickets, steps, strict=False)):
                    if event is not None and ticket.watched and not ticket.done:
                        ticket.note_step(event, row, taken)
                self._note(batch, seen)
                done = {progress.name for progress in seen if progress.done}
                for finished in batch.remove([row for row, ticket in enumerate(tickets) if ticket in done]):
                    self._finish(finished)
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits
            self._failed(kind, tickets, error)
        except BaseException:  # Ctrl-C in the midst of a step: they begin anew
            self._drop(kind)
            self._back_in_line(tickets, alone=False)
            raise
        self.nfe += batch.nfe - before
        if not len(batch):
            self._drop(kind)

    def _note(self, batch: Batch, seen: Sequence[Progress]) -> None:
        rows = {name: row for row, name in enumerate(batch.names)}
        for progress in seen:
            ticket = progress.name
            if isinstance(ticket, Ticket) and not ticket.done:
                ticket.note_progress(batch, rows[ticket], progress)

    def _failed(self, kind: SamplingConfig, tickets: list[Ticket], error: Exception) -> None:
        """A batch is given up; those of its requests that were not alone get another chance."""
        with self._lock:
            self._drop(kind)
            if (len(tickets) > 1 or self._batches) and not tickets[0].alone:
                self._back_in_line(tickets, alone=True)
                return
            _as_text(error)
            for ticket in tickets:
                if not ticket.done:
                    ticket.fail(error)

    def _back_in_line(self, tickets: list[Ticket], *, alone: bool) -> None:
        """They begin anew, and tell again of nothing that they have told of: their tokens are the same."""
        with self._lock:
            for ticket in reversed(tickets):
                if not ticket.done:
                    ticket.alone = alone
                    self._waiting.appendleft(ticket)

    def _finish(self, finished: Finished) -> None:
        ticket = finished.name
        assert isinstance(ticket, Ticket)
        if ticket.done:  # cancelled while its last step was taken
            return
        if finished.error is not None:
            ticket.fail(finished.error)
        else:
            ticket.finish(finished.canvas, finished.steps, finished.written)


def _tickets(batch: Batch) -> list[Ticket]:
    """Those of a batch's rows, in their order."""
    return [name for name in batch.names if isinstance(name, Ticket)]


def _as_text(error: BaseException) -> None:
    """Puts the traceback into a note: its frames hold what lay on the device, and a ticket may be kept for long."""
    error.add_note("".join(traceback.format_exception(error)))
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__, seen = None, seen.__context__
