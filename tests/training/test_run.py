"""The two jobs, from a command line to a model that loads again: stopped, resumed, out of disk, and badly asked."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from dllm.data.builtin import builtin_rows
from dllm.errors import CheckpointError, DataError, DllmError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada.trainer import LLADA, LLaDATrainer
from dllm.training.callbacks import read_log
from dllm.training.checkpoints import SEAL, fault
from dllm.training.run import Family, check_output_dir, parse_arguments, run

SHAPE = "n_layers=1,d_model=16,n_heads=2,mlp_hidden_size=24"
QUIET = ["--bf16", "False", "--report_to", "none", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
PRETRAIN = [
    "--model_name_or_path", "tiny", "--config_overrides", SHAPE, "--max_length", "12",
    "--dataset_args", "builtin:addition[train:60,test:10]", "--max_steps", "4", "--save_steps", "2",
    "--learning_rate", "0.01", *QUIET,
]  # fmt: skip
SFT = [
    "--dataset_args", "builtin:addition[train:12,test:4]", "--max_length", "60", "--max_steps", "4",
    "--learning_rate", "0.01", *QUIET,
]  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Done(NamedTuple):
    output: Path
    final: Path


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run of 4 steps with checkpoints 2 and 4; not to be changed."""
    output = tmp_path_factory.mktemp("pretrained") / "run"
    return Done(output, llada.pretrain([*PRETRAIN, "--output_dir", str(output)]))


@pytest.fixture
def copied(pretrained: Done, tmp_path: Path) -> Path:
    """The output folder of that run as if it had been killed before it saved the final model."""
    shutil.copytree(pretrained.output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-final")
    return tmp_path / "run"


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
    assert [row["tokens"] for row in rows if "loss" in row] == [48, 96, 144, 192]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_no_evaluation_is_logged_twice(tmp_path: Path, strategy: str) -> None:
    options = ["--eval_strategy", strategy, "--eval_steps", "2", "--save_strategy", "no"]
    llada.pretrain([*PRETRAIN, *options, "--output_dir", str(tmp_path / "run")])
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
        [(row["step"], row["tokens"], row.get("loss"), row.get("eval_loss"), row.get("train_loss")) for row in rows][
            :-2
        ]
        for rows in (read_log(tmp_path / "run" / "log.jsonl"), read_log(pretrained.output / "log.jsonl"))
    ]
    assert numbers[0] == numbers[1]


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
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").exists()
    assert fault(tmp_path / "run" / "checkpoint-4") is not None
    final = llada.pretrain([*argv, "--resume_from_checkpoint", "auto"])
    assert equal(weights(final), weights(pretrained.final))


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
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "log.jsonl"]
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
    with small_disk(tmp_path / "disk", size) as resize:
        with pytest.raises(CheckpointError, match=r"The disk of .*/run is full .*--resume_from_checkpoint auto"):
            llada.pretrain(argv)
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
        OptionError, match=r"The disk of .*run has 0.00 GB free and one checkpoint takes about 0.00 GB: f"
    ):
        llada.pretrain([*PRETRAIN, "--output_dir", str(tmp_path / "run")])
    assert not list((tmp_path / "run").iterdir())


# --- bad input: refused before the first step ---


def refuses(task: str, argv: list[str], kind: type[DllmError], message: str) -> None:
    output = Path(argv[argv.index("--output_dir") + 1]) if "--output_dir" in argv else None
    before = sorted(output.rglob("*")) if output and output.is_dir() else []
    with pytest.raises(kind, match=re.escape(message)):
        getattr(llada, task)(argv)
    after = sorted(output.rglob("*")) if output and output.is_dir() else []
    assert after == before  # no log, so no step


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (["--lerning_rate", "1"], OptionError, "There is no option '--lerning_rate'. Did you mean '--learning_rate'?"),
        (["--max_len=5"], OptionError, "There is no option '--max_len=5'. Did you mean '--max_length'?"),
        (["surplus"], OptionError, "There is no option 'surplus'."),
        (["--max_steps", "many"], OptionError, ": invalid int value: 'many'. See  dllm pretrain --help"),
        (["--loss_normalisation", "sequnce"], OptionError, "loss_normalisation='sequnce' does not exist. Did you mean 'se"),
        (["--times", "even"], OptionError, "--times 'even' does not exist: it is stratified or independent."),
        (["--masking", "all"], OptionError, "--masking 'all' does not exist: it is bernoulli or exact."),
        (["--optimizer", "lion"], OptionError, "--optimizer 'lion' does not exist: it is adamw or muon."),
        (["--min_time", "0.9", "--max_time", "0.1"], OptionError, "--min_time 0.9 --max_time 0.1: 0 <= min_time < max_"),
        (["--random_length", "2"], OptionError, "--random_length 2.0: it is a share, between 0 and 1."),
        (["--max_length", "1"], OptionError, "--max_length 1: a row has at least 2 tokens."),
        (["--eval_strategy", "sometimes"], OptionError, "sometimes"),
        (["--model_name_or_path", "tny"], CheckpointError, "There is no model folder 'tny'"),
        (["--model_name_or_path", "builtin:sudoku"], CheckpointError, "Did you mean 'sudoku9'?"),
        (["--config_overrides", "n_layrs=2"], OptionError, "there is no key 'n_layrs'. Did you mean 'n_layers'?"),
        (["--tokenizer_name_or_path", "bpe:many"], OptionError, "write bpe:N with the number of entries, such as bpe:8192."),
        (["--dataset_args", "builtin:adition"], DataError, "there is no built-in data set 'adition'. Did you mean 'addit"),
        (["--dataset_args", "none.jsonl"], DataError, "There is no file none.jsonl."),
        (["--dataset_args", "builtin:addition[train:2,test:1]", "--max_length", "90"], DataError,
         "2 documents hold less than one row of max_length=90 tokens: lower max_length, or bring more text."),
        (["--eval_strategy", "steps", "--dataset_args", "builtin:addition[train:60,test:0]"], DataError,
         "--eval_strategy steps needs test rows: write  NAME[train:N,test:M]."),
        (["--resume_from_checkpoint", "nowhere"], OptionError, "nowhere: that is no checkpoint folder. Say auto for the las"),
    ],
)  # fmt: skip
def test_pretraining_refuses(tmp_path: Path, options: list[str], kind: type[DllmError], message: str) -> None:
    refuses("pretrain", [*PRETRAIN, "--output_dir", str(tmp_path / "run"), *options], kind, message)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (["--model_name_or_path", "tiny"], OptionError, "'tiny' is a shape without weights: pretrain it first, then"),
        (["--max_length", "1000"], OptionError, "--max_length 1000 exceeds the model's context of 512."),
        (
            ["--config_overrides", "n_layers=3"],
            OptionError,
            "--config_overrides only changes a model that starts fresh",
        ),
        (["--max_length", "15"], DataError, "max_length=15 leaves no answer in any of 12 conversations"),
        (["--dataset_args", "builtin:text"], DataError, "builtin:text has no column 'messages': it has 'text'."),
        (
            ["--messages_column", "turns", "--dataset_args", "FILE"],
            DataError,
            "there is no column 'turns'; the row has mes",
        ),
    ],
)
def test_fine_tuning_refuses(
    pretrained: Done, tmp_path: Path, options: list[str], kind: type[DllmError], message: str
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(builtin_rows("addition", "train", 1, column="messages")[0]))
    argv = [*SFT, "--model_name_or_path", str(pretrained.final), "--output_dir", str(tmp_path / "run"), *options]
    refuses("sft", [str(file) if word == "FILE" else word for word in argv], kind, message)


def test_an_output_folder_is_needed() -> None:
    refuses("pretrain", PRETRAIN, OptionError, "Give --output_dir, the folder for checkpoints and the final model.")


def test_an_output_folder_with_something_in_it_is_refused(copied: Path) -> None:
    argv = [*PRETRAIN, "--output_dir", str(copied)]
    refuses(
        "pretrain", argv, OptionError, "run is not empty: name another folder, empty this one, or go on from its last c"
    )


def test_an_output_folder_without_a_whole_checkpoint_cannot_be_resumed(copied: Path) -> None:
    for step in (2, 4):
        (copied / f"checkpoint-{step}" / "optimizer.pt").unlink()
    argv = [*PRETRAIN, "--output_dir", str(copied), "--resume_from_checkpoint", "auto"]
    refuses(
        "pretrain", argv, OptionError, "auto: " + str(copied) + " holds no whole checkpoint to go on from. Name another"
    )


def test_a_damaged_checkpoint_that_is_named_is_refused(copied: Path) -> None:
    os.truncate(copied / "checkpoint-4" / "optimizer.pt", 7)
    argv = [*PRETRAIN, "--output_dir", str(copied), "--resume_from_checkpoint", str(copied / "checkpoint-4")]
    refuses("pretrain", argv, OptionError, "that checkpoint is damaged: optimizer.pt has 7 bytes and was saved with ")


@pytest.mark.parametrize("resume", [[], ["--resume_from_checkpoint", "auto"]])
def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path, resume: list[str]) -> None:
    (tmp_path / "run").write_text("")
    argv = [*PRETRAIN, "--output_dir", str(tmp_path / "run"), *resume]
    refuses("pretrain", argv, OptionError, "run is a file: name a folder.")
    argv = [*PRETRAIN, "--output_dir", str(tmp_path / "run" / "inside"), *resume]
    refuses("pretrain", argv, OptionError, "run/inside cannot be made or read: Not a directory. Name another folder.")


@pytest.fixture
def as_someone_else() -> Iterator[None]:
    """Root may write anywhere, so root becomes an ordinary user for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    yield
    os.setresuid(0, 0, 0)


@pytest.mark.parametrize("resume", [None, "auto"])
def test_an_output_folder_that_cannot_be_written_is_refused(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, resume: str | None
) -> None:
    place = tmp_path_factory.mktemp("place")
    (place / "locked").mkdir(mode=0o555)
    (place / "hidden").mkdir(mode=0o000)
    for folder in (place, *place.parents):
        if folder.stat().st_mode & 0o077 == 0 and folder.stat().st_uid == os.geteuid() and folder.name != "hidden":
            folder.chmod(0o755)
    _, _, args = parse_arguments("pretrain", [*PRETRAIN, "--output_dir", "x"])
    args.resume_from_checkpoint = resume
    request.getfixturevalue("as_someone_else")
    for path, message in (
        (place / "locked", "locked cannot be written to. Name another folder."),
        (place / "locked" / "run", "locked/run cannot be made or read: Permission denied. Name another folder."),
        (place / "hidden" / "run", "hidden/run cannot be made or read: Permission denied. Name another folder."),
    ):
        args.output_dir = str(path)
        with pytest.raises(OptionError, match=re.escape(message)):
            check_output_dir(args)
