"""Where the system tests work: a folder that looks like a checkout, commands in it, and the commands that the READMEs show."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.pipelines import llada
from dllm.pipelines.llada import fresh_model
from dllm.pipelines.llada.tokenizer import bpe_tokenizer, char_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BIN = Path(sys.executable).parent
CPU_CONFIG = "scripts/accelerate_configs/cpu.yaml"
SBATCH = 'sbatch() { while [[ $1 == -* ]]; do shift; done; bash "$@" --dry_run; }\n'
"""Before a bash script: what sbatch does with its command line. Its own options end where the script's name stands."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file."""

    language: str
    marker: str | None
    """What `<!-- test: MARKER -->` on the line above the fence says."""
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    pattern = re.compile(r"(?:^<!-- test: (\w+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = path.read_text(encoding="utf-8")
    found = pattern.finditer(text)
    return [Block(m[2], m[1], m[3], text.count("\n", 0, m.start(3)) + 1) for m in found]


def marked(path: Path, marker: str, language: str = "bash") -> list[Block]:
    return [block for block in blocks(path) if (block.marker, block.language) == (marker, language)]


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a bash block: lines joined where a backslash ends them, quotes undone."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def make_workshop(folder: Path) -> Path:
    """A folder from which the scripts are reachable under the names that the READMEs use."""
    for name in ("examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment() -> dict[str, str]:
    """This environment's commands come first on PATH, as after `source .venv/bin/activate`."""
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def run(command: list[str] | str, cwd: Path, *, code: int = 0) -> str:
    """Runs words, or a bash script, to its end; both of its outputs. It has to end with `code`."""
    words = ["bash", "-euo", "pipefail", "-c", command] if isinstance(command, str) else command
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, f"{command} ended with {done.returncode}\n{done.stdout}"
    return done.stdout


def _take_terminal() -> None:
    """As a shell starts a command: its standard input is its terminal, and Ctrl-C is not ignored, as it is in background jobs."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def typed(*script: tuple[str, str], words: list[str], cwd: Path) -> str:
    """Waits for a pattern in what a command writes, types something, and so on; all that it wrote, with its control codes.

    A Ctrl-C after which nothing comes is typed again: readline misses one between its prompt and its wait for a key.
    """
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (40, 100))
    env = {**environment(), "TERM": "xterm"}
    written, seen_until, left, last, silences = b"", 0, list(script), "", 0
    with subprocess.Popen(
        # a session of its own, whose terminal this is: Ctrl-C comes as a signal
        [str(BIN / "dllm"), *words],
        cwd=cwd,
        env=env,
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
        preexec_fn=_take_terminal,
    ) as run:
        os.close(there)
        try:
            while silences < 30:
                if not select.select([here], [], [], 10)[0]:
                    silences += 1
                    if last == "\x03":
                        os.write(here, last.encode())
                    continue
                written, silences = written + os.read(here, 65536), 0
                while left and (found := re.search(left[0][0].encode(), written[seen_until:])):
                    seen_until += found.end()
                    last = left.pop(0)[1]
                    os.write(here, last.encode())
            run.kill()  # it waits for something that this test does not type
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(here)
    text = written.decode(errors="replace")
    assert not left, f"{left[0]} never came\n{text}"
    assert run.returncode == 0, text
    return text


def several(folder: Path, config: str | None, processes: int, runs: dict[str, list[str]], *, code: int = 0) -> str:
    """Trains several times in one launch, for starting processes takes longer than a few steps; what it printed.

    A run is the task and its options; its name is that of its output folder. Without a configuration it is one `python`.
    """
    return run(several_command(folder, config, processes, runs), folder, code=code)


def several_command(folder: Path, config: str | None, processes: int, runs: dict[str, list[str]]) -> list[str]:
    """The command of such a launch."""
    jobs = folder / f"{next(iter(runs))}.json"
    jobs.write_text(json.dumps([[*words, "--output_dir", name] for name, words in runs.items()]))
    script = [str(HERE / "several_runs.py"), str(jobs)]
    if config is None:
        return [sys.executable, *script]
    on_cpu = [str(HERE / "fsdp_on_cpu.py")] if config == "fsdp" else []
    options = f"--config_file scripts/accelerate_configs/{config}.yaml --num_processes {processes}"
    return [str(BIN / "accelerate"), "launch", *options.split(), *on_cpu, *script]


def trained_here(folder: Path, runs: dict[str, list[str]]) -> str:
    """The same runs in this process, one after another; what they printed."""
    shown = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(shown):
        for name, (task, *words) in runs.items():
            getattr(llada, task)([*words, "--output_dir", name])
    return shown.getvalue()


def save_tiny_model(
    folder: Path, *, texts: list[str] | None = None, context: int = 128, more: dict[str, Any] | None = None
) -> Path:
    """A checkpoint folder as the hub has them, very small: fresh weights, and a tokenizer (BPE where texts are given)."""
    tokenizer = char_tokenizer() if texts is None else bpe_tokenizer(texts, 512)
    shape = {"n_layers": 2, "d_model": 64, "mlp_hidden_size": 128, **(more or {})}
    model = fresh_model("tiny", tokenizer, ",".join(f"{key}={value}" for key, value in shape.items()), context)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
