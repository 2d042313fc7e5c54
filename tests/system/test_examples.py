"""Every command in examples/llada/README.md, run as it stands, and what the scripts do with mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from system.workshop import ROOT, Block, blocks, make_workshop, marked, run

from dllm.training.callbacks import read_log

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
    assert line["tokens"] == 5 * 2 * 8 * 37


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("pt.py", [], "Give --output_dir"),
        ("sft.py", ["--output_dir", "new", "--model_name_or_path", "tiny"], "is a shape without weights"),
        ("generate.py", ["--stepz", "4"], "There is no option '--stepz'. Did you mean '--steps'?"),
    ],
)
def test_a_mistake_is_one_line(script: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    shown = run(["python", f"examples/llada/{script}", *arguments], make_workshop(tmp_path), code=1)
    assert message in shown.splitlines()[-1]
    assert "Traceback" not in shown
