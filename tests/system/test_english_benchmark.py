"""`benchmarks/english.py` from models to tables and picture, and a second run that measures nothing again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from system.workshop import ROOT, run
from transformers import LlamaConfig, LlamaForCausalLM

from dllm.data.text import chapters
from dllm.pipelines.llada.tokenizer import bpe_tokenizer

pytestmark = [pytest.mark.system, pytest.mark.slow]

SMALL = """
    --spans 3 --characters 120 --samples 2 --words 8 --definition_samples 2 --windows 2 --given 6 --blank 8 --puzzles 2
    --sums 4 --addition_steps 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("english")
    tokenizer = bpe_tokenizer(chapters("test")[:20], 400)
    tokenizer.save_pretrained(folder / "source")
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "source")
    pretrain = f"""
        dllm pretrain --model_name_or_path tiny --config_overrides n_layers=1 --tokenizer_name_or_path {folder / "source"}
            --dataset_args builtin:text[train:20,test:2] --max_length 64 --max_steps 4 --save_steps 2 --logging_steps 1
            --output_dir pretrained
    """
    tune = """
        dllm sft --model_name_or_path pretrained/checkpoint-final --dataset_args builtin:addition[train:20,test:2]
            --max_length 64 --max_steps 1 --output_dir tuned
    """
    run(pretrain.split(), folder)
    run(tune.split(), folder)
    return folder


def measure(folder: Path) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks/english.py"), "--source", "source", "--pretrained", "pretrained"]
    command += [
        "--tuned",
        "tuned",
        "--addition",
        "addition",
        "--output",
        "out/english.md",
        "--figure",
        "trade.png",
        *SMALL.split(),
    ]
    run(command, folder)
    return json.loads((folder / "out/english.json").read_text(encoding="utf-8"))


def test_everything_is_measured_once(folder: Path) -> None:
    first = measure(folder)
    assert {"source", "pretrained 2", "pretrained 4", "tuned 1"} == set(first["bits"]["rows"])
    assert first["bits"]["rows"]["pretrained 4"]["minutes"] > first["bits"]["rows"]["pretrained 2"]["minutes"] > 0
    assert {"source", "pretrained 4", "tuned 1"} == set(first["definitions"]["rows"])
    speeds = {name: row.get("tokens_per_forward") for name, row in first["fluency"]["rows"].items()}
    assert speeds["infilling | fixed, 1 | none"] == speeds["continuation | fixed, 1 | dual"] == 1
    assert speeds["infilling | fixed, 8 | none"] == 8
    assert first["trade"]["rows"]["addition | fixed, 5 | none"]["tokens_per_forward"] == 5
    text = (folder / "out/english.md").read_text(encoding="utf-8")
    assert all(f"\n## {part}" in text for part in ("Bits", "Definitions", "Fluency", "Quality"))
    assert "nan" not in text
    with Image.open(folder / "trade.png") as picture:
        assert picture.size[0] > 1000
    again = measure(folder)
    assert [part["rows"] for part in first.values()] == [part["rows"] for part in again.values()]
    assert [part["seconds"] for part in first.values()] == [part["seconds"] for part in again.values()]
