"""`dllm demo` as a stranger runs it: from nothing to solved puzzles."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from system.workshop import run

from dllm.training.callbacks import read_log

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(["dllm", "demo"], folder)


def exact_shares(shown: str) -> list[float]:
    """The last column of the table, in per cent."""
    return [float(share) for share in re.findall(r"([\d.]+) % +│\n", shown)]


def test_solves_95_of_100_unseen_puzzles(demo: tuple[Path, str]) -> None:
    shares = exact_shares(demo[1])
    assert len(shares) == 5
    assert shares[0] >= 95
    assert shares[0] > max(shares) - 1, "one token a forward is the surest, up to some puzzles of 500"
    assert shares[-1] < shares[0] - 10


def test_the_loss_falls_on_unseen_rows(demo: tuple[Path, str]) -> None:
    losses = [row["eval_loss"] for row in read_log(demo[0] / "runs/sudoku6/log.jsonl") if "eval_loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_shows_a_puzzle_being_solved(demo: tuple[Path, str]) -> None:
    watched = demo[1].split("3. watch")[1].split("4. picture")[0]
    assert watched.count("┌") == 3  # not a terminal: first, middle, last
    first, last = watched.split("┌")[1], watched.split("┌")[3]
    assert "·" in first
    assert "·" not in last
    assert "solved" in watched


def test_the_picture_shows_curves(demo: tuple[Path, str]) -> None:
    with Image.open(demo[0] / "runs/sudoku6/sudoku6.png") as picture:
        assert picture.size[0] > 1000
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colours, "the colours of two lines"


def test_a_second_run_uses_the_model_of_the_first(demo: tuple[Path, str]) -> None:
    folder, first = demo
    weights = folder / "runs/sudoku6/checkpoint-final/model.safetensors"
    before = weights.stat().st_mtime_ns
    again = run(["dllm", "demo", "--puzzles", "50"], folder)
    assert "nothing to train" in again
    assert "Loading weights" not in again
    assert weights.stat().st_mtime_ns == before
    assert "dllm pretrain --model_name_or_path tiny" in first
    assert "dllm pretrain --model_name_or_path tiny" not in again


def test_what_it_says_to_try_next_works(demo: tuple[Path, str]) -> None:
    folder, shown = demo
    following = shown.split("Next\n")[1].replace("\\\n", " ")
    (sft,) = [line for line in following.splitlines() if line.strip().startswith("dllm sft")]
    done = run([*shlex.split(sft), "--max_steps", "3"], folder)
    assert "Saved the model and its tokenizer to runs/addition/checkpoint-final" in done
