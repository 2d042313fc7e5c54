"""What someone at a terminal sees; what goes into a file is tested in tests/cli."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import termios
from pathlib import Path

import pytest
from system.workshop import BIN, environment

pytestmark = pytest.mark.system


def seen(*words: str, cwd: Path) -> list[str]:
    """All that a command writes to a terminal of 100 columns, each redrawn line by itself, without colours."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (40, 100))
    env = {**environment(), "TERM": "xterm"}
    with subprocess.Popen(
        [str(BIN / "dllm"), *words], cwd=cwd, env=env, stdin=there, stdout=there, stderr=there
    ) as run:
        os.close(there)
        written = b""
        try:
            while block := os.read(here, 65536):
                written += block
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(here)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert run.returncode == 0, text
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_training_shows_one_bar_and_a_line_a_logged_step(tmp_path: Path) -> None:
    data = ["--dataset_args", "builtin:sudoku6[train:200,test:20]", "--max_length", "37", "--max_steps", "30"]
    small = ["--config_overrides", "n_layers=1,d_model=32,mlp_hidden_size=64", "--save_steps", "10"]
    lines = seen("pretrain", *data, *small, "--output_dir", "out", cwd=tmp_path)
    assert any(re.search(r"\d+%\|.*\| \d+/30 \[", line) for line in lines)
    said = [line for line in lines if re.match(r"step \d", line)]
    assert [line.split("  ")[0] for line in said] == [
        "step 10/30",
        "step 20/30",
        "step 30/30",
        "step 30/30",
        "step 30/30",
    ]
    assert lines[-1] == "Saved the model and its tokenizer to out/checkpoint-final"
    assert not [line for line in lines if "shards" in line or "{" in line or "Warning" in line]


def test_a_puzzle_fills_up_in_place(tmp_path: Path) -> None:
    lines = seen("generate", "--seed", "1", "--steps", "4", cwd=tmp_path)
    assert [line for line in lines if line.startswith("step")][:5] == [f"step {n} of 4" for n in range(5)]
    assert re.fullmatch(r"[1-9]{81}", lines[-1])
    assert "·" in lines[1]
    assert not [line for line in lines if "%|" in line], "the model inside loads in no time"
