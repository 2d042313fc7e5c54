"""Where the answers of the sampling commands go: JSON lines with their statistics, and a file that a later run goes on with."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from dllm.cli.requests import ANSWER_KEYS, Request
from dllm.disk import written_beside
from dllm.errors import OptionError

if TYPE_CHECKING:
    from dllm.engine.tickets import Answer
    from dllm.sampling.config import SamplingConfig


def statistics(answer: Answer, config: SamplingConfig) -> dict[str, Any]:
    """What a row cost.

    Args:
        answer: the row's.
        config: its settings.

    Returns:
        steps; nfe, the forwards that the row took part in (guidance takes two a step); new_tokens, masks filled;
        tokens_per_forward, new_tokens / nfe; seconds, from the row's first step to its last, others' work in between
        included; exact, False where a cache approximates.
    """
    nfe = answer.steps * config.branches
    return {
        "steps": answer.steps,
        "nfe": nfe,
        "new_tokens": answer.written,
        "tokens_per_forward": round(answer.written / nfe, 4) if nfe else 0.0,
        "seconds": round(answer.seconds - answer.waited, 4),
        "exact": config.exact,
    }


class AnswerFile:
    """A file of JSON lines that grows as rows finish. Use it as a context manager.

    What is there already is kept: its rows are in `done`. A half line at its end, left by a run that was killed, is dropped, and
    so are rows that hold an error: they are tried again, and come where they belong once the run is through.
    Beside it lies FILE.settings.json, with what the answers depend on.

    Args:
        path: of the file.
        settings: what the answers depend on, beside the prompts.
        requests: all of them, also those answered already.

    Raises:
        OptionError: the file cannot be written, another run writes to it, it is not of this command, or its answers are of
            other settings or other prompts.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], requests: Sequence[Request]) -> None:
        self.path, self.beside = path, path.with_name(path.name + ".settings.json")
        self.settings = json.loads(json.dumps(settings))
        try:
            self.file = self._locked()
            try:
                self.done = self._read(requests)
            except BaseException:
                self.file.close()
                raise
        except BlockingIOError as error:
            raise OptionError(f"--output {path}: another run is writing to it.") from error
        except OSError as error:
            raise OptionError(f"--output {path} cannot be written: {error.strerror}.") from error
        self.rows, self.errors, self.full = len(self.done), 0, False

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            print(f"\n{self.path}: {self.rows} rows. The same command goes on.", end="", file=sys.stderr)
        elif not self.full:
            self._sort()
        with suppress(OSError):  # what a full disk did not take was told when it was written
            self.file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a row.

        Raises:
            OptionError: it cannot be written, such as for want of room; what was written before stays.
        """
        try:
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            self.full = True
            raise OptionError(
                f"--output {self.path} cannot be written any more: {error.strerror}. What it holds is kept: free some space, and "
                f"the same command goes on."
            ) from error
        self.errors += "error" in record
        self.rows += "error" not in record

    def _locked(self) -> BinaryIO:
        """The file, opened to append and not anew (nothing is lost where what follows refuses), and held against other runs."""
        while True:
            file = self.path.open("a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                file.close()
                raise
            file.close()  # another run has put a file in its place meanwhile

    def _replace(self, lines: Iterable[bytes]) -> None:
        """Writes the file anew beside it, and gives that its name: a run that is killed leaves the one or the other."""
        file: BinaryIO | None = None
        try:
            with written_beside(self.path) as place:
                file = place.open("w+b")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.fchmod(file.fileno(), os.fstat(self.file.fileno()).st_mode & 0o777)
                file.writelines(lines)
                file.flush()
        except BaseException:
            if file is not None:
                with suppress(OSError):
                    file.close()
            raise
        self.file.close()  # only now: until the new one has its name, this one holds other runs off
        self.file = file

    def _sort(self) -> None:
        """Puts rows that were tried again where they belong; for want of room they stay behind the others."""
        with suppress(OSError):
            self.file.seek(0)
            rows = [(int(json.loads(line)["row"]), line) for line in self.file]
            if rows != (ordered := sorted(rows, key=lambda row: row[0])):
                self._replace(line for _, line in ordered)

    def _read(self, requests: Sequence[Request]) -> set[int]:
        """The rows that are answered; a half line, and rows with an error, are taken out of the file."""
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole or self.beside.exists():
            self._compare_settings()
        done, kept = set[int](), []
        for number, line in enumerate(whole.splitlines(keepends=True), start=1):
            try:
                record = json.loads(line)
                row = int(record["row"])
            except (ValueError, TypeError, KeyError):  # not JSON, not an object, or of no row
                raise OptionError(
                    f"--output {self.path}: line {number} is no answer. Delete that line, or name another file."
                ) from None
            if "error" in record:
                continue
            if not 0 <= row < len(requests):
                raise OptionError(
                    f"--output {self.path}: line {number} answers row {row}, and there are {len(requests)} prompts: these are "
                    f"other prompts. Name another file."
                )
            given = {key: value for key, value in record.items() if key not in ANSWER_KEYS}
            # as texts: NaN, which some files hold, does not equal itself
            if json.dumps(given, sort_keys=True) != json.dumps(requests[row].given, sort_keys=True):
                raise OptionError(
                    f"--output {self.path}: line {number} answers another prompt than row {row} is now. Give the prompts as they "
                    f"were (more may follow), or name another file."
                )
            done.add(row)
            kept.append(line)
        if not self.beside.exists():
            with written_beside(self.beside) as place:
                place.write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
        if sum(map(len, kept)) < len(whole):
            self._replace(kept)
        elif len(whole) < len(content):
            self.file.truncate(len(whole))
        return done

    def _compare_settings(self) -> None:
        try:
            there = json.loads(self.beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if not isinstance(there, dict):
            raise OptionError(
                f"--output {self.path} is not empty, and {self.beside.name} that tells its settings is missing or damaged: "
                f"name another file."
            )
        for name in sorted({*there, *self.settings}):
            if there.get(name) != self.settings.get(name):
                raise OptionError(
                    f"--output {self.path} holds answers of {name}={there.get(name)!r}, and now it is "
                    f"{self.settings.get(name)!r}: give the same, or name another file."
                )
