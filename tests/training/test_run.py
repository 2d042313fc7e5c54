"""The two jobs, from a command line to a model that loads again: stopped, resumed, out of disk, and badly asked."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training.commands import PRETRAIN, SFT, Done, equal, weights
from transformers import TrainerCallback

from dllm.data.builtin import builtin_rows
from dllm.errors import CheckpointError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada.trainer import LLADA, LLaDATrainer
from dllm.training.arguments import TrainingArguments
from dllm.training.callbacks import read_log
from dllm.training.checkpoints import SEAL, UNFINISHED, fault
from dllm.training.output import check_disk, check_output_dir
from dllm.training.run import Family, parse_arguments, run


class AtStep(TrainerCallback):
    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def family_with(callback: TrainerCallback) -> Family:
    class WithCallback(LLaDATrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(callback)

    return replace(LLADA, trainer=WithCallback)


# --- what a run leaves ---


def test_the_final_model_holds_no_pickle_and_loads_again(pretrained: Done) -> None:
    assert pretrained.final == pretrained.output / "checkpoint-final"
    kinds = {path.suffix for path in pretrained.final.rglob("*") if path.is_file()}
    assert ".safetensors" in kinds
    assert kinds <= {".safetensors", ".json", ".jinja", ".txt"}
    model, tokenizer = llada.load_model(str(pretrained.final)), llada.load_tokenizer(str(pretrained.final))
    assert equal(dict(model.state_dict()), weights(pretrained.output / "checkpoint-4"))
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert llada.generate(model, tokenizer, ["1+1="], gen_length=3, steps=3).texts


def test_the_log_has_every_step_once_and_the_evaluation(pretrained: Done) -> None:
    rows = read_log(pretrained.output / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["tokens_seen"] for row in rows if "loss" in row] == [48, 96, 144, 192]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4]


def test_every_line_of_the_log_counts_the_tokens_up_to_its_step(tmp_path: Path) -> None:
    options = ["--logging_steps", "3", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no"]
    llada.pretrain([*PRETRAIN, *options, "--max_steps", "5", "--output_dir", str(tmp_path / "run")])
    rows = read_log(tmp_path / "run" / "log.jsonl")
    kinds = ("loss", "eval_loss", "train_loss")
    found = [(next(kind for kind in kinds if kind in row), row["step"], row["tokens_seen"]) for row in rows]
    assert sorted({(step, tokens) for _, step, tokens in found}) == [(n, 48 * n) for n in (2, 3, 4, 5)]
    assert [step for kind, step, _ in found if kind == "loss"] == [2, 3, 4, 5]
    assert not any("tokens" in row for row in rows), "one counter"


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_no_evaluation_is_logged_twice(tmp_path: Path, strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--eval_strategy", strategy, "--eval_steps", "2", "--save_strategy", "no"]
    llada.pretrain([*PRETRAIN, *options, "--output_dir", str(tmp_path / "run")])
    shown = [line for line in capsys.readouterr().out.splitlines() if "on unseen rows" in line]
    assert len(shown) == len({line.split("  ")[0] for line in shown}), "nor made twice"
    steps = [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl") if "eval_loss" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4


def test_fine_tuning_starts_from_the_weights_and_changes_them(pretrained: Done, tmp_path: Path) -> None:
    argv = [*SFT, "--model_name_or_path", str(pretrained.final), "--output_dir", str(tmp_path / "sft")]
    final = llada.sft([*argv, "--max_steps", "25", "--per_device_train_batch_size", "12"])
    losses = [row["loss"] for row in read_log(tmp_path / "sft" / "log.jsonl") if "loss" in row]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert not equal(weights(final), weights(pretrained.final))


def test_pretraining_goes_on_from_weights_only_when_asked(pretrained: Done, tmp_path: Path) -> None:
    argv = [*PRETRAIN, "--model_name_or_path", str(pretrained.final), "--learning_rate", "0", "--max_steps", "1"]
    without = argv[: argv.index("--config_overrides")] + argv[argv.index("--config_overrides") + 2 :]
    same = llada.pretrain([*without, "--continue_from_weights", "--output_dir", str(tmp_path / "same")])
    assert equal(weights(same), weights(pretrained.final))
    fresh = llada.pretrain([*without, "--output_dir", str(tmp_path / "fresh")])
    assert not equal(weights(fresh), weights(pretrained.final))


def test_files_and_a_trained_tokenizer_work_as_data(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in builtin_rows("addition", "train", 40, column="text")))
    argv = [*PRETRAIN, "--dataset_args", f"{path}[test:5]", "--tokenizer_name_or_path", "bpe:270", "--max_steps", "1"]
    final = llada.pretrain([*argv, "--output_dir", str(tmp_path / "run")])
    assert len(llada.load_tokenizer(str(final))) <= 270


# --- stopping and going on ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    pretrained: Done, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    argv = [*PRETRAIN, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        run("pretrain", family_with(AtStep(2, lambda: os.kill(os.getpid(), number))), argv)
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert "Stopped at step 3. Go on with the same command and --resume_from_checkpoint auto" in capsys.readouterr().out
    assert fault(tmp_path / "run" / "checkpoint-3") is None
    assert not (tmp_path / "run" / "checkpoint-final").exists()
    final = llada.pretrain([*argv, "--resume_from_checkpoint", "auto"])
    assert equal(weights(final), weights(pretrained.final))
    numbers = [
        [
            (row["step"], row["tokens_seen"], row.get("loss"), row.get("eval_loss"), row.get("train_loss"))
            for row in rows
        ][:-2]
        for rows in (read_log(tmp_path / "run" / "log.jsonl"), read_log(pretrained.output / "log.jsonl"))
    ]
    assert numbers[0] == numbers[1]


def test_signals_are_given_back_when_training_fails(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError, match="a bug"):
        run("pretrain", family_with(AtStep(1, fail)), [*PRETRAIN, "--output_dir", str(tmp_path / "run")])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_auto_starts_anew_where_there_is_nothing(pretrained: Done, tmp_path: Path) -> None:
    final = llada.pretrain([*PRETRAIN, "--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint", "auto"])
    assert equal(weights(final), weights(pretrained.final))


def test_a_run_that_had_finished_its_steps_only_saves(copied: Path, pretrained: Done) -> None:
    final = llada.pretrain([*PRETRAIN, "--output_dir", str(copied), "--resume_from_checkpoint", "auto"])
    assert equal(weights(final), weights(pretrained.final))
    rows = read_log(copied / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert len([row for row in rows if "eval_loss" in row]) == 1


def test_a_given_checkpoint_is_resumed_from(copied: Path, pretrained: Done) -> None:
    argv = [*PRETRAIN, "--output_dir", str(copied), "--resume_from_checkpoint", str(copied / "checkpoint-2")]
    assert equal(weights(llada.pretrain(argv)), weights(pretrained.final))


CHECKPOINT_FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", SEAL]


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_half_written_checkpoint_is_passed_over(copied: Path, name: str, damage: str) -> None:
    last = copied / "checkpoint-4"
    if damage == "gone":
        (last / name).unlink()
    else:
        os.truncate(last / name, (last / name).stat().st_size // 2)
    _, _, args = parse_arguments(
        "pretrain", [*PRETRAIN, "--output_dir", str(copied), "--resume_from_checkpoint", "auto"]
    )
    assert check_output_dir(args) == str(copied / "checkpoint-2")


def test_a_run_goes_on_from_the_whole_checkpoint_behind_a_half_written_one(copied: Path, pretrained: Done) -> None:
    os.truncate(copied / "checkpoint-4" / "model.safetensors", 1000)
    (copied / "checkpoint-4" / SEAL).unlink()
    final = llada.pretrain([*PRETRAIN, "--output_dir", str(copied), "--resume_from_checkpoint", "auto"])
    assert equal(weights(final), weights(pretrained.final))
    assert fault(copied / "checkpoint-4") is None


@pytest.mark.system
def test_a_process_killed_in_a_save_leaves_nothing_that_auto_would_take(tmp_path: Path, pretrained: Done) -> None:
    script = """
import os, signal, sys
from dataclasses import replace
from dllm.pipelines.llada.trainer import LLADA, LLaDATrainer
from dllm.training.run import run

class Killed(LLaDATrainer):
    def _save_rng_state(self, output_dir):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)

run("pretrain", replace(LLADA, trainer=Killed), sys.argv[1:])
"""
    argv = [*PRETRAIN, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / UNFINISHED / "checkpoint-4" / "optimizer.pt").exists()
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    final = llada.pretrain([*argv, "--resume_from_checkpoint", "auto"])
    assert equal(weights(final), weights(pretrained.final))
    assert not (tmp_path / "run" / UNFINISHED).exists()


@pytest.mark.parametrize("left", ["log.jsonl", f"{UNFINISHED}/checkpoint-2/model.safetensors"])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    left: str, tmp_path: Path, pretrained: Done
) -> None:
    (tmp_path / "run" / left).parent.mkdir(parents=True)
    (tmp_path / "run" / left).write_text("{half a file")
    final = llada.pretrain([*PRETRAIN, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "auto"])
    assert equal(weights(final), weights(pretrained.final))
    assert not (tmp_path / "run" / UNFINISHED).exists()


# --- no room on the disk ---


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(("size", "fails"), [(12_000, "model.safetensors"), (32_000, "optimizer.pt")])
def test_a_write_without_room_keeps_the_last_whole_checkpoint(
    pretrained: Done, tmp_path: Path, size: int, fails: str
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    assert (pretrained.output / "checkpoint-4" / fails).stat().st_size > size
    argv = [*PRETRAIN, "--output_dir", str(tmp_path / "run")]
    try:
        with pytest.raises(
            CheckpointError, match=r"The disk of .*/run is full \(.*Free some space; then go on from the"
        ):
            run("pretrain", family_with(AtStep(2, lambda: limit_files(size))), argv)
    finally:
        limit_files(before)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "log.jsonl", "run.json"]
    final = llada.pretrain([*argv, "--resume_from_checkpoint", "auto"])
    assert equal(weights(final), weights(pretrained.final))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], object]]:
    folder.mkdir()

    def mount(size: str, *options: str) -> bool:
        what = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(folder)]
        return subprocess.run(what, capture_output=True, check=False).returncode == 0

    if os.geteuid() != 0 or shutil.which("mount") is None or not mount(size):
        pytest.skip("needs the right to mount a small disk")
    try:
        yield lambda size: mount(size, "remount")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["240k", "300k", "360k"])
def test_a_full_disk_keeps_the_last_whole_checkpoint(tmp_path: Path, pretrained: Done, size: str) -> None:
    argv = [*PRETRAIN, "--save_steps", "1", "--save_total_limit", "9", "--output_dir", str(tmp_path / "disk" / "run")]
    with small_disk(tmp_path / "disk", "4m") as resize:

        def shrink() -> None:  # not before training, which would not begin
            assert resize(size)

        with pytest.raises(CheckpointError, match=r"The disk of .*/run is full .*--resume_from_checkpoint auto"):
            run("pretrain", family_with(AtStep(1, shrink)), argv)
        saved = list((tmp_path / "disk" / "run").glob("checkpoint-*"))
        assert saved
        assert [fault(path) for path in saved] == [None] * len(saved)
        resize("4m")
        final = llada.pretrain([*argv, "--resume_from_checkpoint", "auto"])
        assert equal(weights(final), weights(pretrained.final))


def test_a_disk_that_is_too_small_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(
        OptionError,
        match=r"The disk of .*run has 10\.00 kB free, and 2 more checkpoints of about \S+ .B and the final model take \S+ .B:"
        r" free some space, keep fewer \(--save_total_limit\), or name another --output_dir.",
    ):
        llada.pretrain([*PRETRAIN, "--output_dir", str(tmp_path / "run")])
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("options", "there", "checkpoints", "bytes_each"),
    [
        ({}, 0, 3, 12),  # two are kept while the third is written
        ({"save_total_limit": 1}, 0, 2, 12),
        ({"save_total_limit": 5}, 0, 4, 12),  # more than there will ever be
        ({"save_total_limit": None}, 0, 4, 12),
        ({"save_total_limit": 0}, 0, 4, 12),
        ({"save_steps": 0.5}, 0, 2, 12),
        ({"save_strategy": "epoch", "save_total_limit": None, "max_steps": -1, "num_train_epochs": 5}, 0, 5, 12),
        ({"save_only_model": True}, 0, 3, 4),
        ({"save_strategy": "no"}, 0, 0, 0),
        ({}, 2, 1, 12),  # those of a run that goes on have their room already
        ({"save_total_limit": 1}, 3, 0, 0),
    ],
)
def test_room_is_needed_for_what_lies_on_the_disk_at_once(
    tmp_path: Path, model: Any, options: dict[str, Any], there: int, checkpoints: int, bytes_each: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = dict(max_steps=4, save_strategy="steps", save_steps=1, per_device_train_batch_size=2)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", **{**settings, **options})
    for step in range(there):
        (tmp_path / f"checkpoint-{step}").mkdir()
    needed = sum(p.numel() for p in model.parameters()) * (checkpoints * bytes_each + 4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    check_disk(args, model, rows=7)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(OptionError, match=f"{checkpoints} more checkpoints"):
        check_disk(args, model, rows=7)


def test_without_a_length_the_context_or_1024_is_the_length(tmp_path: Path) -> None:
    common = [
        "--dataset_args",
        "builtin:addition[train:4,test:2]",
        "--max_steps",
        "1",
        "--per_device_train_batch_size",
        "2",
    ]
    final = llada.sft([*common, "--output_dir", str(tmp_path / "sft")])  # the model inside, whose context is 512
    assert llada.load_model(str(final)).config.max_position_embeddings == 512
    common[1] = "builtin:text[train:1,test:1]"
    final = llada.pretrain([*common, "--output_dir", str(tmp_path / "pretrain")])
    assert llada.load_model(str(final)).config.max_position_embeddings == 1024
