"""The commands by name, exit codes, and errors of one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dllm import __version__
from dllm.cli import generate
from dllm.cli.main import COMMANDS, main
from dllm.errors import CheckpointError, DataError, MissingExtraError, OptionError


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for name, what in COMMANDS.items():
        assert f"  {name}" in shown.out
        assert what in shown.out
    assert "dllm COMMAND --help" in shown.out


def test_every_command_has_help_that_says_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert not stop.value.code
        shown = capsys.readouterr().out
        assert f"usage: dllm {name}" in shown
        assert "-h, --help" in shown


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    assert capsys.readouterr().out == f"dllm {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "dllm: there is no command 'generat'. Did you mean 'generate'?"),
        (["x"], f"dllm: there is no command 'x'. It can be one of: {', '.join(sorted(COMMANDS))}."),
        (["--verbose"], "dllm: there is no command '--verbose'."),
        (["generate", "--stepz", "3"], "dllm generate: There is no option '--stepz'. Did you mean '--steps'?"),
        (["generate", "--step=3"], "dllm generate: There is no option '--step=3'. Did you mean '--steps'?"),
        (["demo", "--max-step", "3"], "dllm demo: There is no option '--max-step'. Did you mean '--max_steps'?"),
        (["demo", "now"], "dllm demo: Nothing is known of 'now'. See  dllm demo --help"),
        (["demo", "--max_steps", "few"], "dllm demo: argument --max_steps: invalid int value: 'few'."),
        (["pretrain", "--learning_rat", "1"], "There is no option '--learning_rat'. Did you mean '--learning_rate'?"),
        (["pretrain", "--output_dir", "x", "--max_steps", "few"], "--max-steps: invalid int value: 'few'."),
        (["sft", "--output_dir", "x", "--eval_strategy", "soon"], "invalid choice: 'soon' (choose from 'no', 'steps'"),
        (["sft"], "dllm sft: Give --output_dir"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("dllm")


def raising(error: BaseException) -> Callable[[Sequence[str]], None]:
    def command(argv: Sequence[str]) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OptionError("wrong option"), 2, "dllm generate: wrong option\n"),
        (DataError("wrong row"), 2, "dllm generate: wrong row\n"),
        (CheckpointError("wrong folder"), 2, "dllm generate: wrong folder\n"),
        (MissingExtraError("rare", "extra", "Drawing"), 2, "run  pip install 'dllm[extra]'\n"),
        (KeyboardInterrupt(), 130, "\ndllm generate: stopped.\n"),
    ],
)
def test_what_a_command_raises_becomes_a_status(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate, "main", raising(error))
    assert main(["generate"]) == code
    assert capsys.readouterr().err.endswith(message)


def test_a_fault_of_dllm_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "main", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["generate"])


@pytest.mark.parametrize("length", [10, 100_000])  # less than a buffer, and more
@pytest.mark.parametrize("arguments", [["generate"], ["--help"], ["demo", "--help"]])
def test_a_reader_that_leaves_is_no_error(length: int, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        f"import sys; from dllm.cli import generate, main; generate.main = lambda argv: print('x' * {length}); "
        f"sys.exit(main.main({arguments}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
