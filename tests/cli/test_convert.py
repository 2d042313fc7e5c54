"""`dllm convert`: its options reach the work, and what is wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from system.workshop import save_tiny_model

from dllm.cli.main import main
from dllm.pipelines.llada import load_model, load_tokenizer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "tiny")
    return tmp_path


def test_another_dtype_and_other_shards(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "tiny", "half", "--dtype", "bfloat16", "--max_shard_size", "50KB"]) == 0
    assert capsys.readouterr().out == "Wrote half\n"
    assert len(list((here / "half").glob("*.safetensors"))) > 1
    assert load_model("half", dtype="auto").dtype == torch.bfloat16
    for one, other in zip(load_model("tiny").parameters(), load_model("half").parameters(), strict=True):
        assert torch.equal(one.bfloat16().float(), other.float())
    assert load_tokenizer("half").get_vocab() == load_tokenizer("tiny").get_vocab()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "dllm convert: There is no model folder 'nowhere'"),
        (["tiny", "tiny"], "dllm convert: tiny is not empty: name a folder that does not exist."),
        (["tiny", "out", "--dtype", "bfloat61"], "dllm convert: dtype 'bfloat61' does not exist. Did you mean 'bfloat16'?"),
        (["tiny", "out", "--max_shard_size", "big"], "dllm convert: max_shard_size 'big': write a number and KB, MB"),
        (["tiny", "out", "--adapter", "none/here"], "dllm convert: The adapter 'none/here' could not be merged into 'tiny'"),
        (["tiny", "out", "--shard_size", "1GB"], "dllm convert: There is no option '--shard_size'. Did you mean '--max_sh"),
        (["tiny"], "dllm convert: the following arguments are required: output_dir"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    before = sorted(here.rglob("*"))
    assert main(["convert", *arguments]) == 2
    printed = capsys.readouterr()
    said = printed.err.splitlines()[-1]  # bars of loading may stand before it
    assert said.startswith(message)
    assert printed.out == ""
    assert sorted(here.rglob("*")) == before
