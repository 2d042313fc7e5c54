"""Every command in examples/llada/README.md, run as it stands, and what the scripts do with mistakes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from system.workshop import ROOT, Block, blocks, commands, make_workshop, marked, run

from dllm.data.sudoku import is_solution
from dllm.training.callbacks import read_log
from dllm.training.run import parse_arguments

pytestmark = pytest.mark.system

README = ROOT / "examples" / "llada" / "README.md"


def test_every_block_is_run() -> None:
    markers = [(block.language, block.marker) for block in blocks(README)]
    assert markers == [("bash", "run"), ("bash", "system")]


@pytest.mark.parametrize("block", marked(README, "run"), ids=lambda block: f"line {block.line}")
def test_one_process(block: Block, tmp_path: Path) -> None:
    shown = run(block.text, make_workshop(tmp_path))
    assert shown.count("; a step is 1 process x 8 samples") == 2
    assert "Saved the model and its tokenizer to models/sft/checkpoint-final" in shown
    assert shown.count("\n  -> ") == 4
    for name in ("pt", "sft"):
        assert read_log(tmp_path / "models" / name / "log.jsonl")[-1]["step"] == 5


@pytest.mark.parametrize("block", marked(README, "system"), ids=lambda block: f"line {block.line}")
def test_two_processes(block: Block, tmp_path: Path) -> None:
    shown = run(block.text, make_workshop(tmp_path))
    assert "; a step is 2 processes x 8 samples x 1 accumulated; MULTI_CPU, " in shown
    assert shown.count("Saved the model") == 1
    (line,) = [row for row in read_log(tmp_path / "models/two/log.jsonl") if "train_loss" in row]
    assert line["step"] == 5
    assert line["tokens_seen"] == 5 * 2 * 8 * 37


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    shown = run(["python", "examples/llada/generate.py", "--stepz", "4"], make_workshop(tmp_path), code=1)
    assert "There is no option '--stepz'. Did you mean '--steps'?" in shown.splitlines()[-1]
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("pt.py", [], "Give --output_dir"),
        ("sft.py", ["--output_dir", "new", "--model_name_or_path", "tiny"], "is a shape without weights"),
    ],
)
def test_a_mistake_ends_the_scripts_with_one_line(
    script: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_workshop(tmp_path))
    monkeypatch.setattr("sys.argv", [f"examples/llada/{script}", *arguments])
    with pytest.raises(SystemExit, match=message) as stopped:  # Python shows a text, and ends with 1
        runpy.run_path(f"examples/llada/{script}", run_name="__main__")
    assert str(stopped.value).startswith(f"examples/llada/{script}: ")
    assert "\n" not in str(stopped.value)


def test_the_recipe_of_the_model_inside_parses() -> None:
    script = (ROOT / "examples/sudoku/train.sh").read_text(encoding="utf-8")
    (words,) = [words for words in commands(Block("bash", None, script, 1)) if words[:2] == ["dllm", "pretrain"]]
    model, data, training = parse_arguments("pretrain", words[2:])
    assert model.model_name_or_path == "tiny"
    assert data.dataset_args.startswith("builtin:sudoku9[")
    assert training.max_steps > 1000


def test_the_evaluation_of_the_model_inside_prints_a_table(tmp_path: Path) -> None:
    words = "python examples/sudoku/evaluate.py --puzzles 2 --tokens_per_forward 8 inf"
    table = [line for line in run(words, make_workshop(tmp_path)).splitlines() if line.startswith("|")]
    assert table[0] == "| clues | tokens per forward | forwards | exact |"
    assert [row.split(" | ")[0] for row in table[2:]] == ["| 36 to 50"] * 2 + ["| 30 to 35"] * 2
    assert [row.split(" | ")[2] for row in table[3::2]] == ["1.0"] * 2


def test_without_a_model_the_one_inside_ends_grids_and_fills_one(tmp_path: Path) -> None:
    shown = run("python examples/llada/generate.py", make_workshop(tmp_path))
    pairs = re.findall(r"^([\d_]+)\n  -> (\d+)$", shown, flags=re.MULTILINE)
    assert len(pairs) == 3
    for given, written in pairs:
        grid = written if "_" in given else given + written
        puzzle = given.replace("_", ".").ljust(81, ".")
        assert is_solution(puzzle, grid)
