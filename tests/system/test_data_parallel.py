"""One process, two processes and two accumulation steps of one global batch are one training run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from system.workshop import make_workshop, save_tiny_model, several, trained_here

from dllm.pipelines.llada import load_model
from dllm.training.callbacks import read_log

pytestmark = pytest.mark.system

STEPS, GLOBAL_BATCH = 6, 8
LAYOUTS = {"one process": (1, 8, 1), "two processes": (2, 4, 1), "two accumulation steps": (1, 4, 2)}
"""Processes, samples of each, accumulation steps."""
COMMON = (
    f"--max_steps {STEPS} --logging_steps 1 --bf16 false --eval_strategy steps --eval_steps 3 "
    "--per_device_eval_batch_size 3 --learning_rate 3e-3 --warmup_steps 2"
)
TASKS = {
    # 20 rows are 2.5 steps: the runs meet a step that is filled up, and the end of an epoch; half the steps are cut short
    "pt": '--dataset_args "builtin:sudoku6[train:20,test:7]" --max_length 37 --random_length 0.5',
    "sft": '--dataset_args "builtin:addition[train:20,test:7]" --max_length 64',
    "sft-packed": '--dataset_args "builtin:addition[train:70,test:7]" --max_length 100 --packing --pack_eos 3',
}


class Run(NamedTuple):
    shown: str
    log: list[dict[str, Any]]
    weights: torch.Tensor


Runs = dict[str, Run]
KEYS = [
    "loss", "grad_norm", "learning_rate", "nll", "masked_nll", "nll_t50_75", "masked_fraction", "tokens_seen",
    "eval_loss", "eval_nll", "eval_nll_t50_75",
]  # fmt: skip


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in load_model(str(folder)).parameters()])


@pytest.fixture(params=list(TASKS))
def task(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(make_workshop(tmp_path_factory.mktemp("parallel")) / "base")


@pytest.fixture(scope="module")
def all_runs(base: Path) -> dict[str, Runs]:
    """Each task on each layout; the two processes are launched once, and all else is done in this one."""
    done: dict[str, Runs] = {task: {} for task in TASKS}
    for name, (processes, batch, accumulated) in LAYOUTS.items():
        assert processes * batch * accumulated == GLOBAL_BATCH
        layout = f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulated}"
        wanted = {
            f"{task}-{processes}-{accumulated}": [
                "pretrain" if task == "pt" else "sft",
                *shlex.split(f"--model_name_or_path base {data} {COMMON} {layout}"),
            ]
            for task, data in TASKS.items()
        }
        shown = trained_here(base.parent, wanted) if processes == 1 else several(base.parent, "cpu", processes, wanted)
        said = [line for line in shown.splitlines() if "a step is" in line]
        for task, out, line in zip(TASKS, wanted, said, strict=True):
            folder = base.parent / out
            done[task][name] = Run(line, read_log(folder / "log.jsonl"), weights(folder / "checkpoint-final"))
    return done


@pytest.fixture
def runs(task: str, all_runs: dict[str, Runs]) -> Runs:
    return all_runs[task]


def test_the_layouts_are_what_they_say(runs: Runs) -> None:
    for name, (processes, batch, accumulated) in LAYOUTS.items():
        said = f"a step is {processes} process{'es' * (processes > 1)} x {batch} samples x {accumulated} accumulated; "
        assert said + ("MULTI_CPU, fp32 on cpu" if processes > 1 else "fp32 on cpu") in runs[name].shown


@pytest.mark.parametrize("key", KEYS)
def test_the_logs_agree(runs: Runs, key: str) -> None:
    of = "eval_loss" if key.startswith("eval_") else "loss"  # every line has the tokens seen
    first, *others = ([(row["step"], row[key]) for row in run.log if of in row] for run in runs.values())
    steps = [step for step, _ in first]
    assert steps == ([3, 6] if key.startswith("eval_") else list(range(1, STEPS + 1)))
    assert len({value for _, value in first}) > 1
    for other in others:
        assert [step for step, _ in other] == steps
        # fp32 sums in another order: a few units of 6e-8 times the thousand or so terms
        assert [value for _, value in other] == pytest.approx([value for _, value in first], rel=2e-5)


def test_the_weights_agree(runs: Runs, base: Path) -> None:
    first, *others = (run.weights for run in runs.values())
    moved = (first - weights(base)).norm()
    assert moved > 0.05
    for other in others:
        # AdamW divides a gradient by its own size, so where one is near nothing rounding shows
        assert (other - first).norm() < 2e-3 * moved
