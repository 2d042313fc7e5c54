"""`dllm prepare`: rows of tokens made once, for `--load_preprocessed_data`."""

from __future__ import annotations

from collections.abc import Sequence

from dllm.errors import OptionError, did_you_mean

TASKS = ("pretrain", "sft")
USAGE = """usage: dllm prepare {pretrain,sft} --dataset_args DATA --output_dir FOLDER [options]

Turn data into rows of tokens once, for --load_preprocessed_data of dllm pretrain and dllm sft.

  -h, --help  this; dllm prepare pretrain --help and dllm prepare sft --help name the options"""


def main(argv: Sequence[str]) -> None:
    """Turns data into rows of tokens and writes them to a folder."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)
    task, *rest = argv
    if task not in TASKS:
        raise OptionError(
            f"dllm prepare needs to know what the rows are for, and {task!r} is no task.{did_you_mean(task, TASKS)}"
        )

    from dllm.pipelines.llada.trainer import prepare

    prepare(task, rest)  # type: ignore[arg-type]
