"""run.json, and where the log goes besides."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from training.commands import PRETRAIN, Done

from dllm import __version__
from dllm.errors import MissingExtraError
from dllm.pipelines import llada
from dllm.training import arguments
from dllm.training.arguments import trackers
from dllm.training.record import read_record


def test_a_run_says_how_it_was_started(pretrained: Done) -> None:
    (start,) = read_record(pretrained.output / "run.json")
    assert start["task"] == "pretrain"
    assert start["resumed_from"] is None
    assert start["arguments"]["learning_rate"] == 0.01
    assert start["arguments"]["dataset_args"] == "builtin:addition[train:60,test:10]"
    assert start["arguments"]["max_steps"] == 4
    assert start["processes"] == 1
    assert start["rows"]["train"] > start["rows"]["test"] > 0
    versions = start["versions"]
    assert (versions["dllm"], versions["torch"]) == (__version__, torch.__version__)
    assert versions["transformers"] == transformers.__version__
    assert len(start["devices"]) >= 1


def test_every_start_is_kept(copied: Path) -> None:
    llada.pretrain([*PRETRAIN, "--output_dir", str(copied), "--resume_from_checkpoint", "auto"])
    first, second = read_record(copied / "run.json")
    assert first["resumed_from"] is None
    assert second["resumed_from"] == str(copied / "checkpoint-4")


def test_a_damaged_record_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"starts": [')
    assert read_record(tmp_path / "run.json") == []
    assert read_record(tmp_path / "none.json") == []


@pytest.mark.parametrize(("there", "where"), [(True, ["tensorboard"]), (False, ["none"])])
def test_tensorboard_is_the_default_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, there: bool, where: list[str]
) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda name: object() if there else None)
    assert trackers([]) == where
    assert trackers("none") == ["none"]
    assert trackers(["none"]) == ["none"]


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "tracking"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_a_tracker_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as missing:
        trackers(name)
    assert str(missing.value) == f"--report_to {name} needs the package '{name}': run  pip install 'dllm[{extra}]'"


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv: list[Any] = [word for word in PRETRAIN if word not in ("--report_to", "none")]
    llada.pretrain([*argv, "--max_steps", "2", "--output_dir", str(tmp_path / "run")])
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = set(events.Tags()["scalars"])
    assert {"train/nll", "train/masked_nll", "train/tokens_per_second", "train/loss", "eval/nll"} <= found
    assert [event.step for event in events.Scalars("train/nll")] == [1, 2]
