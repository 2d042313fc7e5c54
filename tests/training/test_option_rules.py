"""Options that a run would not use are refused by the parser, before data or a model are looked at."""

from __future__ import annotations

import re

import pytest

from dllm.errors import OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada.trainer import prepare
from dllm.training.option_rules import FORMER
from dllm.training.run import parse_arguments

NOWHERE = ["--model_name_or_path", "no/such/model", "--output_dir", "no/such/run"]
STREAM = ["--streaming", "--max_steps", "5"]
MADE = ["--load_preprocessed_data", "no/such/rows"]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("sft", ["--random_length", "0.01"], "--random_length: it is for pretraining: a conversation is not cut to a ra"),
        ("sft", ["--text_column", "body"], "--text_column: it is for pretraining: fine-tuning reads conversations (--mes"),
        ("sft", ["--continue_from_weights"], "--continue_from_weights: it is for pretraining: fine-tuning always goes on"),
        ("sft", ["--document_masks"], "--document_masks: fine-tuning's documents see themselves alone anyway. Leave it out."),
        ("sft", ["--packing", "--pad_to", "global"], "--pad_to: --packing leaves nothing to pad: leave one out."),
        ("sft", ["--packing", "--pad-to=local"], "--pad_to: --packing leaves nothing to pad: leave one out."),
        ("sft", ["--pack_eos", "8"], "--pack_eos: it belongs to --packing: write that too, or leave it out."),
        ("sft", ["--packing", "--pack_eos", "many"], "--pack_eos many: write a number, such as 8, or mirror."),
        ("pretrain", ["--pad_to", "local"], "--pad_to: pretraining's rows are all of one length. Leave it out."),
        ("pretrain", ["--truncation", "left"], "--truncation: it is for fine-tuning: pretraining cuts text into rows and"),
        ("pretrain", [*STREAM, "--num_proc", "2"], "--num_proc: a stream is tokenised while training, by each process fo"),
        ("pretrain", ["--shuffle_buffer", "10"], "--shuffle_buffer: other rows than a stream's are shuffled as a whole."),
        ("pretrain", ["--num_proc", "0"], "--num_proc 0: it is 1 or more."),
        ("pretrain", ["--num_train_epochs", "-1"], "--num_train_epochs -1.0: it is above 0."),
        ("pretrain", ["--num_train_epochs", "0"], "--num_train_epochs 0.0: it is above 0."),
        ("pretrain", ["--max_steps", "0"], "--max_steps 0: it is 1 or more; left out, --num_train_epochs says how long."),
        ("pretrain", ["--max_steps", "-2"], "--max_steps -2: it is 1 or more; left out, --num_train_epochs says how long."),
        ("pretrain", ["--muon_learning_rate", "0.1"], "--muon_learning_rate: it belongs to --optimizer muon: write that t"),
        ("pretrain", ["--sample_length", "9"], "--sample_length: it needs --sample_every K, the steps between two samples"),
        ("pretrain", ["--label_smoothing_factor", "0.1"], "--label_smoothing_factor: the loss of masked diffusion is a bo"),
        ("pretrain", ["--auto_find_batch_size"], "--auto_find_batch_size: masks and times are keyed by the samples of a"),
        ("pretrain", ["--use_liger_kernel"], "--use_liger_kernel: it has no kernels for LLaDA; head and loss are fused"),
        *[
            (task, [*MADE, *more], message)
            for task in ("pretrain", "sft")
            for more, message in (
                (STREAM, "--load_preprocessed_data names rows that lie on the disk, tokenised: there is nothing to stream."),
                (["--dataset_args", "a.jsonl[streaming:true]"], "there is nothing to stream. Leave streaming out."),
                (["--num_proc", "2"], "--num_proc: the rows of --load_preprocessed_data are made already. Leave it out."),
                (["--system_column", "s"], "--system_column: the rows of --load_preprocessed_data are made already."),
            )
        ],
    ],
)  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused(task: str, options: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        getattr(llada, task)([*NOWHERE, *options])


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("sft", ["--packing", "--pack_eos", "mirror"]),
        ("sft", ["--pad_to", "local", "--train_sampling_strategy", "group_by_length", "--num_proc", "2"]),
        ("sft", MADE),
        (
            "pretrain",
            ["--random_length", "0", "--document_masks", "--optimizer", "muon", "--muon_learning_rate", "0.1"],
        ),
        ("pretrain", [*STREAM, "--shuffle_buffer", "10", "--sample_every", "2", "--sample_length", "9"]),
        ("pretrain", ["--num_train_epochs", "0.5", "--max_steps", "-1"]),
    ],
)
def test_one_that_is_used_is_not(task: str, options: list[str]) -> None:
    parse_arguments(task, [*NOWHERE, *options])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--packing"], "--packing: it changes nothing in rows that are prepared: give it to dllm sft."),
        (
            ["--shuffle_buffer", "5"],
            "--shuffle_buffer: it changes nothing in rows that are prepared: give it to dllm sft.",
        ),
        (["--config_overrides", "n_layers=1"], "--config_overrides: no model is made here: give it to dllm sft."),
        (["--random_length", "0.1"], "--random_length: it is for pretraining"),
        (["--num_proc", "-3"], "--num_proc -3: it is 1 or more."),
    ],
)
def test_preparing_refuses_what_only_training_uses(options: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        prepare("sft", [*NOWHERE, *options])


@pytest.mark.parametrize("given", ["--group_by_length", "--group_by_length=true", "--group-by-length"])
def test_a_former_name_says_what_to_write(given: str) -> None:
    message = f"There is no option {given!r}. Write --train_sampling_strategy group_by_length."
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_arguments("sft", [*NOWHERE, given])


def test_what_a_former_name_says_exists() -> None:
    values = {"--eval_strategy": "no", "--warmup_steps": "0.1", "--use_cpu": "true"}
    for former, now in FORMER.items():
        option, *value = now.split(",")[0].split()
        parse_arguments("sft", [*NOWHERE, option, *(value or [values.get(option, "16")])])
        with pytest.raises(OptionError, match=f"There is no option '--{former}'. Write {option}"):
            parse_arguments("sft", [*NOWHERE, f"--{former}", "1"])
