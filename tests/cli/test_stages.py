"""Commands in processes of their own: how they end, and what is told meanwhile."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from dllm import __version__
from dllm.cli.stages import TOLD_EVERY, Overview, alone, losses, run_command, shown
from dllm.errors import DllmError, OptionError


def overview(told_every: bool = False) -> tuple[Overview, io.StringIO]:
    out = io.StringIO()
    made = Overview(Console(file=out, width=200, highlight=False), {"adapt": 60.0, "pretrain": 600.0, "chat": 40.0})
    return made, out


def test_a_command_runs_to_its_end(tmp_path: Path) -> None:
    run_command(["--version"], tmp_path / "out.txt", lambda: None)
    assert (tmp_path / "out.txt").read_text() == f"dllm {__version__}\n"


def test_a_closed_terminal_keeps_nothing_from_being_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    def look() -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr("sys.stderr", Closed())
    ended: list[int] = []
    wait = subprocess.Popen.wait
    monkeypatch.setattr(
        subprocess.Popen, "wait", lambda self, timeout=None: ended.append(wait(self, timeout)) or ended[-1]
    )
    with pytest.raises(SystemExit):
        run_command(WAITING, tmp_path / "out.txt", look)
    assert ended == [-signal.SIGTERM], "it was asked to end, and not killed"


def test_a_command_that_fails_says_its_last_line(tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    with pytest.raises(
        DllmError, match=r"^dllm trian ended with status 2: dllm: there is no command 'trian'.*'train|"
    ) as e:
        run_command(["trian"], output, lambda: None)
    assert str(e.value).endswith(f"\nAll that it said is in {output}.")


WAITING = ["chat", "--model_name_or_path", "nowhere"]  # loads torch for some seconds first


@pytest.mark.parametrize(
    ("number", "ends"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_stop_is_passed_on_and_waited_for(number: int, ends: type[BaseException], tmp_path: Path) -> None:
    sent = False

    def look() -> None:
        nonlocal sent
        if not sent:
            os.kill(os.getpid(), number)
        sent = True

    before = signal.getsignal(number)
    with pytest.raises(ends):
        run_command(WAITING, tmp_path / "out.txt", look)
    assert sent
    assert signal.getsignal(number) is before


def test_whoever_looks_can_end_it(tmp_path: Path) -> None:
    began = time.monotonic()
    run_command(WAITING, tmp_path / "out.txt", lambda: True)
    assert time.monotonic() - began < 30


def test_nothing_is_left_running_where_looking_fails(tmp_path: Path) -> None:
    def look() -> None:
        raise OSError("cannot look")

    with pytest.raises(OSError, match="cannot look"):
        run_command(WAITING, tmp_path / "out.txt", look)
    running = [" ".join(process.cmdline()) for process in psutil.Process().children()]
    assert not [line for line in running if "nowhere" in line]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    message = f"Another run is at work in {tmp_path}: wait for its end, stop it, or name another --output_dir."
    with alone(tmp_path), pytest.raises(OptionError, match=re.escape(message)), alone(tmp_path):
        pass
    with alone(tmp_path) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock.fileno(),))
    with pytest.raises(OptionError, match="Another run"), alone(tmp_path):  # the command of a run that was killed
        pass
    child.kill()
    child.wait()
    with alone(tmp_path):
        pass


def test_time_left_is_that_of_all_stages() -> None:
    made, out = overview()
    with made:
        made.begin("adapt")
        made.end()
        made.begin("pretrain")
        made._told -= TOLD_EVERY + 1
        made.show("step 10 of 100", left=540.0)
        made.show("step 11 of 100", left=530.0)
    assert out.getvalue().splitlines() == [
        "1/3 adapt",
        "2/3 pretrain",
        "2/3 pretrain, step 10 of 100; 10 min left in all",
    ]


def test_a_stage_whose_steps_are_not_known_counts_down() -> None:
    made, out = overview()
    with made:
        made.begin("adapt")
        made._told -= TOLD_EVERY + 1
        made._began -= 30
        made.show("seen from both sides")
    assert out.getvalue().endswith("seen from both sides; 11 min left in all\n")


def test_losses_are_the_logged_steps(tmp_path: Path) -> None:
    assert losses(tmp_path) == []
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo')
    assert losses(tmp_path) == [rows[0], rows[2]]


def test_a_command_is_shown_as_a_shell_takes_it() -> None:
    words = ["pretrain", "--dataset_args", "builtin:text[test:2] | builtin:wordnet"]
    assert shlex.split(shown(words)) == ["dllm", *words]
