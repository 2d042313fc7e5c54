"""`dllm info`: what it prints, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden import cases
from system.workshop import save_tiny_model

from dllm.cli.main import main
from dllm.pipelines.llada import load_tokenizer
from dllm.pipelines.llada.inspection import inspect


def shown(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["info", *arguments]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    return printed.out


def rows(text: str, *names: str) -> dict[str, str]:
    """The value behind each of these names, at the beginning of a line."""
    found = {name: [line for line in text.splitlines() if line.startswith(name + "  ")] for name in names}
    assert all(len(lines) == 1 for lines in found.values()), text
    return {name: lines[0].removeprefix(name).strip() for name, lines in found.items()}


def test_a_mixture_in_words(capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(cases.folder("llada_moe"))
    info = inspect(folder)
    text = shown(capfd, folder)
    assert rows(text, "architecture", "experts", "experts a token", "parameters", "active a token") == {
        "architecture": "LLaDAMoEModelLM",
        "experts": "8",
        "experts a token": "2",
        "parameters": f"{info.parameters:,}",
        "active a token": f"{info.active_parameters:,}",
    }
    assert rows(text, "stored", "of them embedding and head", "eos token") == {
        "stored": f"float32, {4 * info.parameters / 1e3:.1f} kB",
        "of them embedding and head": f"{2 * 256 * 64:,}",
        "eos token": "251",
    }
    assert "Memory is that of weights, gradients and optimiser state" in text


def test_a_preset_in_words(capfd: pytest.CaptureFixture[str]) -> None:
    text = shown(capfd, "8b")
    named = rows(text, "parameters", "memory for inference, bfloat16", "memory for training, AdamW")
    assert named == {
        "parameters": "8,015,581,184",
        "memory for inference, bfloat16": "16.0 GB",
        "memory for training, AdamW": "128.2 GB",
    }
    for absent in ("stored", "active a token", "mask token"):
        assert absent not in text


def test_special_tokens_are_shown_as_they_are_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    mask = load_tokenizer(folder).mask_token_id
    capfd.readouterr()
    assert rows(shown(capfd, str(folder)), "mask token") == {"mask token": f"{mask}  <|mdm_mask|>"}


@pytest.mark.parametrize("name", ["llada_dense", "llada_moe", "builtin:sudoku9", "moe-7b"])
def test_json_says_the_same(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    name = str(cases.folder(name)) if name.startswith("llada") else name
    told: dict[str, Any] = json.loads(shown(capfd, name, "--json"))
    info = inspect(name)
    assert told.pop("memory_gb") == info.memory()
    assert {key: list(token) for key, token in info.special_tokens.items()} == told.pop("special_tokens")
    assert told == {key: value for key, value in vars(info).items() if key != "special_tokens"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "dllm info: There is no model folder 'nowhere'"),
        (["builtin:sudoku8"], "dllm info: No model 'builtin:sudoku8' ships with dllm. Did you mean 'sudoku9'?"),
        ([], "dllm info: the following arguments are required: model_name_or_path"),
        (["8b", "--jason"], "dllm info: There is no option '--jason'. Did you mean '--json'?"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith(message)
    assert (printed.out, printed.err.count("\n")) == ("", 1)
