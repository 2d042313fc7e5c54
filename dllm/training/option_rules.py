"""Which options a run can use, and which go together: one that would be accepted and do nothing is an error."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from dllm.data.columns import ColumnNames
from dllm.errors import OptionError
from dllm.training.arguments import DataArguments, TrainingArguments
from dllm.training.rows import is_streamed

if TYPE_CHECKING:
    from dllm.training.run import Task

COLUMNS = tuple(f"{field.name}_column" for field in fields(ColumnNames))

OTHER_TASK: Mapping[str, Mapping[str, str]] = {
    "pretrain": {
        "packing": "pretraining's rows are full already. To keep their documents apart, write --document_masks.",
        "pack_eos": "pretraining's rows are full already, and not packed. Leave it out.",
        "pad_to": "pretraining's rows are all of one length. Leave it out.",
        "truncation": "it is for fine-tuning: pretraining cuts text into rows and goes on in the next one. Leave it out.",
        "turns": "it is for fine-tuning: pretraining reads conversations whole. Leave it out.",
    },
    "sft": {
        "random_length": "it is for pretraining: a conversation is not cut to a random length. Leave it out.",
        "document_masks": "fine-tuning's documents see themselves alone anyway. Leave it out.",
        "text_column": "it is for pretraining: fine-tuning reads conversations (--messages_column, or --prompt_column and "
        "--completion_column).",
        "continue_from_weights": "it is for pretraining: fine-tuning always goes on from the checkpoint's weights. Leave it "
        "out.",
    },
}
"""Options that one task takes and the other would ignore: why, and what to do."""

OF_TRAINING = ("packing", "pack_eos", "document_masks", "shuffle_buffer", "random_length")
"""Of `DataArguments`: they change nothing in rows that are prepared."""

FORMER = {
    "group_by_length": "--train_sampling_strategy group_by_length",
    "warmup_ratio": "--warmup_steps, a share of all steps where it is below 1",
    "evaluation_strategy": "--eval_strategy",
    "no_cuda": "--use_cpu",
    "batch_size": "--per_device_train_batch_size",
    "epochs": "--num_train_epochs",
    "lr": "--learning_rate",
    "max_seq_length": "--max_length",
}
"""Names that older releases of transformers or other programs have -> what to write here."""


def named_options(parser: ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """The options that stand in a command line (`sys.argv` by default), as the fields that they set."""
    words = sys.argv[1:] if argv is None else argv
    actions = parser._option_string_actions
    return {actions[name].dest for name in (word.split("=")[0] for word in words) if name in actions}


def former_name(word: str) -> str:
    """What to write in place of an option of another name; "" where none is known."""
    now = FORMER.get(word.split("=")[0].removeprefix("--").replace("-", "_"))
    return "" if now is None else f" Write {now}."


def check_data_options(task: Task, data_args: DataArguments, named: set[str]) -> None:
    """Whether the options of a task's data belong together and are used.

    Args:
        task: "pretrain" or "sft".
        data_args: their values.
        named: those that were given.

    Raises:
        OptionError: they do not.
    """
    if not 0 <= data_args.random_length <= 1:
        raise OptionError(f"--random_length {data_args.random_length}: it is a share, between 0 and 1.")
    if data_args.max_length is not None and data_args.max_length < 2:
        raise OptionError(f"--max_length {data_args.max_length}: a row has at least 2 tokens.")
    if data_args.num_proc is not None and data_args.num_proc < 1:
        raise OptionError(f"--num_proc {data_args.num_proc}: it is 1 or more.")
    for name, why in OTHER_TASK[task].items():
        if name in named:
            raise OptionError(f"--{name}: {why}")
    if data_args.load_preprocessed_data:
        if is_streamed(data_args):
            raise OptionError(
                "--load_preprocessed_data names rows that lie on the disk, tokenised: there is nothing to stream. Leave "
                "streaming out."
            )
        _refuse(named, ("num_proc", *COLUMNS), "the rows of --load_preprocessed_data are made already. Leave it out.")
    if is_streamed(data_args):
        _refuse(named, ["num_proc"], "a stream is tokenised while training, by each process for itself. Leave it out.")


def check_training_options(task: Task, data_args: DataArguments, args: TrainingArguments, named: set[str]) -> None:
    """The same of a run's options and those of its data.

    Raises:
        OptionError: they do not belong together.
    """
    if is_streamed(data_args) and (data_args.packing or args.groups_by_length):
        raise OptionError(
            "A stream is neither packed nor grouped by length, for which all rows have to be known: leave one out."
        )
    if args.groups_by_length and task == "pretrain":
        raise OptionError(
            "--train_sampling_strategy group_by_length: pretraining's rows are all of one length. Leave it out."
        )
    if not is_streamed(data_args):
        _refuse(named, ["shuffle_buffer"], "other rows than a stream's are shuffled as a whole. Leave it out.")
    if not data_args.packing:
        _refuse(named, ["pack_eos"], "it belongs to --packing: write that too, or leave it out.")
    else:
        if args.groups_by_length:
            raise OptionError(
                "--packing leaves no padding for --train_sampling_strategy group_by_length to save: leave one out."
            )
        _refuse(named, ["pad_to"], "--packing leaves nothing to pad: leave one out.")
        if data_args.pack_eos != "mirror" and not re.fullmatch("[0-9]+", data_args.pack_eos):
            raise OptionError(f"--pack_eos {data_args.pack_eos}: write a number, such as 8, or mirror.")
    if args.optimizer != "muon":
        _refuse(named, ["muon_learning_rate"], "it belongs to --optimizer muon: write that too, or leave it out.")
    if not args.sample_every:
        _refuse(named, ["sample_length"], "it needs --sample_every K, the steps between two samples; or leave it out.")


def check_prepared_options(task: Task, named: set[str]) -> None:
    """The same of `dllm prepare`.

    Raises:
        OptionError: an option that changes nothing in the rows.
    """
    _refuse(named, OF_TRAINING, f"it changes nothing in rows that are prepared: give it to dllm {task}.")
    _refuse(named, ("config_overrides", "continue_from_weights"), f"no model is made here: give it to dllm {task}.")


def _refuse(named: set[str], options: Iterable[str], why: str) -> None:
    for option in options:
        if option in named:
            raise OptionError(f"--{option}: {why}")
