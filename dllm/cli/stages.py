"""Commands of this package, run one after the other in processes of their own under one progress bar.

A process of its own gives its memory back, and its output goes to a file: on the screen stands one bar that knows the time left
over all stages. A stop is passed on: the command saves what it has, and only then does this end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from dllm.errors import DllmError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

STOPPING = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
"""Signals that end a run -> what the command gets, which saves and stops; a terminal that is closed sends SIGHUP."""
LOCK = "lock"
"""A file of each folder that was worked in."""
TOLD_EVERY = 30.0
"""Seconds between two lines where there is no terminal for a bar."""
_LOOK_EVERY = 0.3


@dataclass
class Overview:
    """How far all stages are, as a bar on a terminal and as lines elsewhere.

    Args:
        console: where to.
        seconds: what each stage is expected to take, in their order.
        lock: of the folder in which they work, see `alone`.
    """

    console: Console
    seconds: dict[str, float]
    lock: IO[str] | None = None
    stage: str = ""
    done: list[str] = field(default_factory=list)
    _began: float = 0.0
    _told: float = 0.0

    def __post_init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=1.0, left="")

    def __enter__(self) -> Overview:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self, stage: str) -> None:
        """A stage begins, and with it its share of the time."""
        self.stage, self._began, self._told = stage, time.monotonic(), time.monotonic()
        self.console.print(f"[bold]{self._number(stage)} {stage}[/bold]")

    def end(self) -> None:
        """The stage is done, or was done before."""
        self.done.append(self.stage)

    def show(self, what: str, left: float | None = None) -> None:
        """Tells where the stage stands.

        Args:
            what: in a few words.
            left: seconds to the stage's end; by default its share less the time since it began.
        """
        if left is None:
            left = max(0.0, self.seconds[self.stage] - (time.monotonic() - self._began))
        passed = sum(self.seconds[stage] for stage in self.done) + time.monotonic() - self._began
        later = sum(seconds for stage, seconds in self.seconds.items() if stage not in (*self.done, self.stage))
        words = f"{self._number(self.stage)} {self.stage}, {what}"
        told = f"{_duration(left + later)} left in all"
        self._bar.update(self._task, completed=passed, total=passed + left + later, description=words, left=told)
        if not self.console.is_terminal and time.monotonic() - self._told > TOLD_EVERY:
            self._told = time.monotonic()
            self.console.print(f"{words}; {told}")

    def _number(self, stage: str) -> str:
        return f"{list(self.seconds).index(stage) + 1}/{len(self.seconds)}"


def _duration(seconds: float) -> str:
    """A time in words; as `dllm.training.callbacks.duration`, which is slow to load."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{round(seconds / 60)} min"


def shown(words: Sequence[str]) -> str:
    """A command as it can be pasted into a shell."""
    return "dllm " + shlex.join(words)


@contextmanager
def alone(folder: Path) -> Iterator[IO[str]]:
    """Holds a folder for one run; also while a command of a run that was killed is still at work there.

    Raises:
        OptionError: another run holds it.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OptionError(
                f"Another run is at work in {folder}: wait for its end, stop it, or name another --output_dir."
            ) from error
        yield lock


def run_command(
    words: Sequence[str], output: Path, look: Callable[[], bool | None], lock: IO[str] | None = None
) -> None:
    """Runs a command of dllm to its end.

    Args:
        words: the command, such as `["pretrain", "--max_steps", "5", ...]`.
        output: a file that gets what it says.
        look: is called a few times a second; True ends the command at once, where nothing is lost by it.
        lock: of `alone`; the command holds it too.

    Raises:
        DllmError: it failed; the error has the last thing that it said.
        KeyboardInterrupt: Ctrl-C, once the command has saved what it had.
        SystemExit: SIGTERM, or a terminal that was closed, likewise.
    """
    with output.open("w", encoding="utf-8") as file, _stops() as stopped:
        process = subprocess.Popen(
            [sys.executable, "-m", "dllm.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes here alone, and is passed on once
            pass_fds=() if lock is None else (lock.fileno(),),
        )
        passed_on = 0
        ended_here = False
        try:
            while process.poll() is None:
                for number in stopped[passed_on:]:
                    process.send_signal(STOPPING[signal.Signals(number)])
                passed_on = len(stopped)
                if not stopped and not ended_here and look():
                    ended_here = True
                    os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_LOOK_EVERY)
        finally:
            if process.poll() is None:  # looking failed
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if stopped:
        if stopped[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + stopped[0])
    if process.returncode != 0 and not ended_here:
        lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it said nothing"
        raise DllmError(
            f"dllm {words[0]} ended with status {process.returncode}: {last}\nAll that it said is in {output}."
        )


@contextmanager
def _stops() -> Iterator[list[int]]:
    """A list of the signals that came, while the body runs; they end nothing by themselves."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            with suppress(OSError):  # the terminal is closed
                print("\nSaving what there is ...", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def losses(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a training run, those with a loss; none where it has logged none."""
    path, rows = folder / "log.jsonl", []
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # a line that is being written
            rows.append(json.loads(line))
    return [row for row in rows if "loss" in row]
