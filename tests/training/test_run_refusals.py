"""Bad input to the two jobs: refused before the first step, with a text that says what to do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from training.commands import PRETRAIN, SFT, Done

from dllm.data.builtin import builtin_rows
from dllm.errors import CheckpointError, DataError, DllmError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada.tokenizer import bpe_tokenizer
from dllm.training.arguments import TrainingArguments
from dllm.training.checkpoints import seal
from dllm.training.output import check_output_dir
from dllm.training.run import parse_arguments


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
        (["--pack_eos", "3"], OptionError, "--pack_eos: pretraining's rows are full already, and not packed. Leave it out."),
        (["--train_sampling_strategy", "group_by_length"], OptionError, "pretraining's rows are all of one length."),
        (["--packing"], OptionError, "--packing: pretraining's rows are full already. To keep their documents apart, write"),
        (["--train_sampling_strategy", "sequential"], OptionError, "the order of the data is a keyed shuffle, random or"),
        (["--max_length", "1"], OptionError, "--max_length 1: a row has at least 2 tokens."),
        (["--eval_strategy", "sometimes"], OptionError, "sometimes"),
        (["--per_device_train_batch_size", "0"], OptionError, "--per_device_train_batch_size 0: it is 1 or more."),
        (["--dataloader_persistent_workers", "true"], OptionError,
         "--dataloader_persistent_workers: workers that live on would keep the first epoch's order of the data; leave"),
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
        (["--streaming", "--max_steps", "-1"], OptionError, "Streaming has no epochs: say with --max_steps how long to train."),
        (["--streaming", "--shuffle_buffer", "0"], OptionError, "--shuffle_buffer 0: it is 1 or more."),
        (["--streaming", "--train_sampling_strategy", "group_by_length"], OptionError, "A stream is neither packed nor grou"),
        (["--turns", "all"], OptionError, "--turns: it is for fine-tuning: pretraining reads conversations whole. Leave it"),
        (["--dataset_args", "builtin:addition[name:x]"], DataError, "builtin:addition has no configurations and no splits"),
        (["--dataset_args", "builtin:addition[train:5,wight:1]"], DataError, "no key 'wight'. Did you mean 'weight'?"),
        (["--load_preprocessed_data", "none"], DataError, "none holds no prepared data (prepared.json is not there)."),
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
        (
            ["--tokenizer_name_or_path", "bpe:300"],
            OptionError,
            "--tokenizer_name_or_path bpe:300: a BPE is trained in pretraining, and fine-tuning uses the tokenizer that the",
        ),
        (["--truncation", "middle"], OptionError, "--truncation 'middle' does not exist: it is right, left or filter."),
        (["--max_length", "15"], DataError, "max_length=15 leaves no answer in any of 12 conversations"),
        (["--dataset_args", "builtin:text"], DataError, "builtin:text has no column 'messages': it has 'text'."),
        (
            ["--messages_column", "turns", "--dataset_args", "FILE"],
            DataError,
            "there is no column 'turns'; it has messages. Name",
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


@pytest.mark.parametrize("name", ["run.json", "log.jsonl"])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path: Path, name: str) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="auto")
    (tmp_path / name).touch()
    assert check_output_dir(args) is None
    damaged = tmp_path / "checkpoint-3"
    damaged.mkdir()
    with pytest.raises(OptionError, match="holds no whole checkpoint to go on from"):
        check_output_dir(args)
    seal(damaged)
    assert check_output_dir(args) == str(damaged)


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


def test_fine_tuning_refuses_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    bpe_tokenizer(["some text"], 300).save_pretrained(tmp_path / "other")
    options = ["--tokenizer_name_or_path", str(tmp_path / "other"), "--max_length", "400"]
    message = f"The tokenizer '{tmp_path}/other' is not that of 'builtin:sudoku9': it has 26"
    refuses("sft", [*SFT, "--output_dir", str(tmp_path / "run"), *options], OptionError, message)
