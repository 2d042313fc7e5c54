"""`dllm demo`, shortened: the parts, and that a second run trains nothing. The whole of it is a system test."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from dllm.cli import demo
from dllm.cli.main import main
from dllm.training.callbacks import read_log
from dllm.training.run import parse_arguments


def test_shortened_it_goes_through_all_parts_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")  # narrower than the commands that it shows, which have to stay in one piece
    monkeypatch.setitem(demo.RECIPE, "--dataset_args", "builtin:sudoku6[train:600,test:20]")
    monkeypatch.setitem(demo.RECIPE, "--per_device_train_batch_size", "8")
    command = ["demo", "--max_steps", "3", "--puzzles", "4", "--output_dir", "out"]
    assert main(command) == 0
    shown = capfd.readouterr().out
    for part in ("1. train", "2. evaluate", "3. watch", "4. picture", "Next\n"):
        assert part in shown
    (trained,) = re.findall(r"(?m)^  (dllm pretrain --model.*)$", shown)
    _, data, training = parse_arguments("pretrain", shlex.split(trained)[2:])
    assert (data.max_length, training.max_steps, training.output_dir) == (37, 3, "out")
    (following,) = re.findall(r"(?m)^  (dllm sft .*)$", shown.replace("\\\n", " "))
    model, data, _ = parse_arguments("sft", shlex.split(following)[2:])
    assert (model.model_name_or_path, data.max_length) == ("out/checkpoint-final", 64)
    assert '--dataset_args "builtin:sudoku6[train:600,test:20]"' in shown, "what is shown can be copied into a shell"
    assert len(re.findall(r"│ +[\d.]+ +│ +[\d.]+ +│ +[\d.]+ % +│\n", shown)) == len(demo.PER_FORWARD)
    assert "NOT solved: the model erred" in shown, "three steps teach nothing"
    assert [row["step"] for row in read_log(tmp_path / "out/log.jsonl") if "train_loss" in row] == [3]
    with Image.open(tmp_path / "out/sudoku6.png") as picture:
        assert min(picture.size) > 300

    weights = tmp_path / "out/checkpoint-final/model.safetensors"
    before = weights.stat().st_mtime_ns
    (tmp_path / "out/sudoku6.png").unlink()
    assert main(command) == 0
    again = capfd.readouterr().out
    said = "out/checkpoint-final is there already: nothing to train (delete out to start anew)."
    assert said in " ".join(again.split())
    assert "Trained in" in shown
    assert "Trained in" not in again
    assert weights.stat().st_mtime_ns == before
    assert (tmp_path / "out/sudoku6.png").exists()
    assert again.split("2. evaluate")[1].split("4. picture")[0] == shown.split("2. evaluate")[1].split("4. picture")[0]


def test_the_recipe_is_made_of_options_of_pretrain() -> None:
    words = [word for pair in demo.RECIPE.items() for word in pair]
    _, data, training = parse_arguments("pretrain", [*words, "--output_dir", "x"])
    assert data.max_length == 37
    assert training.optimizer == "muon"
