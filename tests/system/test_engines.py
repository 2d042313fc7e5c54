"""Every engine trains one model: two processes with the shipped accelerate configurations, against one process without any.

One launch makes several runs: each normalisation of the loss, accumulation, and one that goes on from a checkpoint. Then one
process goes on from a checkpoint of two, and two processes from a checkpoint of that one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from system.workshop import make_workshop, run, save_tiny_model, write_jsonl

from dllm.pipelines.llada import load_model
from dllm.training.callbacks import read_log
from dllm.training.checkpoints import UNFINISHED, fault

pytestmark = pytest.mark.system

HERE = Path(__file__).parent
STEPS, GLOBAL_BATCH = 4, 8
COMMON = (
    f"--model_name_or_path base --dataset_args chats.jsonl[train:20,test:5] --max_length 64 --max_steps {STEPS} "
    "--logging_steps 1 --bf16 false --learning_rate 3e-3 --warmup_steps 1 --per_device_eval_batch_size 3"
).split()
CHECKPOINTS = ["--save_steps", "1", "--save_total_limit", "9"]
NORMALISATIONS = ("token", "sequence", "batch")
TOKEN = ["--loss_normalisation", "token"]
KINDS = {
    "packed": ["sft", "--packing", "--pack_eos", "2"],
    "documents": ["pretrain", "--document_masks", "--continue_from_weights", "--random_length", "0"],
    "tied": ["sft", "--model_name_or_path", "tied"],
}
"""Runs of other kinds, at the two engines that divide what a step makes in ways of their own."""
DIVIDING = ("zero2", "fsdp")


class Engine(NamedTuple):
    config: str
    said: str
    """The run's first line says it, from what accelerate itself says."""


ENGINES = {
    "ddp": Engine("ddp", "MULTI_CPU, fp32 on cpu"),
    "zero1": Engine("deepspeed_zero1", "DEEPSPEED stage 1, fp32 on cpu"),
    "zero2": Engine("deepspeed_zero2", "DEEPSPEED stage 2, fp32 on cpu"),
    "zero3": Engine("deepspeed_zero3", "DEEPSPEED stage 3, fp32 on cpu"),
    "fsdp": Engine("fsdp", "FSDP version 2, fp32 on cpu"),
}


def several(folder: Path, engine: Engine | None, processes: int, runs: dict[str, list[str]]) -> str:
    """Makes the runs, whose output folders bear their names, in one launch; what it printed.

    A run is options of fine-tuning, or the task and options.
    """
    jobs = folder / f"{next(iter(runs))}.json"
    words = [more if more[0] in ("pretrain", "sft") else ["sft", *more] for more in runs.values()]
    named = zip(words, runs, strict=True)
    jobs.write_text(json.dumps([[task, *COMMON, *more, "--output_dir", name] for (task, *more), name in named]))
    script = [str(HERE / "several_runs.py"), str(jobs)]
    if engine is None:
        return run(["python", *script], folder)
    on_cpu = [str(HERE / "fsdp_on_cpu.py")] if engine.config == "fsdp" else []
    options = f"--config_file scripts/accelerate_configs/{engine.config}.yaml --num_processes {processes}"
    return run(["accelerate", "launch", *options.split(), *on_cpu, *script], folder)


def shape(processes: int, accumulated: int = 1) -> list[str]:
    batch = GLOBAL_BATCH // processes // accumulated
    return f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulated}".split()


def first_runs(prefix: str, processes: int) -> dict[str, list[str]]:
    runs = {f"{prefix}-{name}": [*shape(processes), "--loss_normalisation", name] for name in NORMALISATIONS}
    runs[f"{prefix}-token"] += CHECKPOINTS
    runs[f"{prefix}-accumulated"] = shape(processes, 2)
    if prefix in ("one", *DIVIDING):
        runs |= {f"{prefix}-{kind}": [*words, *shape(processes)] for kind, words in KINDS.items()}
    return runs


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in load_model(str(folder)).parameters()])


def values(out: Path, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in read_log(out / "log.jsonl") if key in row}


def assert_agree(one: Path, other: Path) -> None:
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        expected, found = values(one, key), values(other, key)
        assert found
        # fp32 sums in another order: a few units of 6e-8 times the thousand or so terms
        assert found == pytest.approx({step: expected[step] for step in found}, rel=2e-5), key
    # AdamW divides a gradient by its own size, so where one is near nothing rounding shows
    final, base = weights(one / "checkpoint-final"), weights(one.parent / ("tied" if "tied" in one.name else "base"))
    assert (weights(other / "checkpoint-final") - final).norm() < 2e-3 * (final - base).norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workshop(tmp_path_factory.mktemp("engines"))
    save_tiny_model(folder / "base")
    save_tiny_model(folder / "tied", more={"weight_tying": True})
    answers = [f"{i * i:b}" * (1 + i % 5) for i in range(25)]  # 1 to 45 tokens: the normalisations differ
    chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": a}] for i, a in enumerate(answers)]
    write_jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    several(folder, None, 1, first_runs("one", 1))
    return folder


@pytest.fixture(scope="module", params=list(ENGINES))
def name(request: pytest.FixtureRequest) -> str:
    engine: str = request.param
    return engine


@pytest.fixture(scope="module")
def shown(name: str, folder: Path) -> str:
    go_on = [*TOKEN, *shape(2), *CHECKPOINTS, "--resume_from_checkpoint", f"{name}-token/checkpoint-2"]
    return several(folder, ENGINES[name], 2, {**first_runs(name, 2), f"{name}-resumed": go_on})


def test_the_normalisations_differ(folder: Path) -> None:
    first = {values(folder / f"one-{name}", "loss")[1] for name in NORMALISATIONS}
    assert min(abs(a - b) / a for a in first for b in first if a != b) > 1e-3
    assert len(first) == 3


def test_the_engine_is_the_one_that_was_asked_for(name: str, shown: str) -> None:
    lines = [line for line in shown.splitlines() if "a step is" in line]
    assert len(lines) == 5 + len(KINDS) * (name in DIVIDING)
    parameters = ["88,832" if line is lines[-2] and name in DIVIDING else "95,424" for line in lines]
    assert all(f"{n} parameters" in line and "2 processes" in line for n, line in zip(parameters, lines, strict=True))
    assert all(line.endswith("accumulated; " + ENGINES[name].said) for line in lines)


@pytest.mark.parametrize("made", [*NORMALISATIONS, "accumulated"])
def test_losses_gradients_and_weights_are_those_of_one_process(name: str, folder: Path, shown: str, made: str) -> None:
    assert len(values(folder / f"{name}-{made}", "loss")) == STEPS
    assert_agree(folder / f"one-{made}", folder / f"{name}-{made}")


@pytest.mark.parametrize("made", list(KINDS))
def test_packed_rows_masked_documents_and_tied_weights_too(name: str, folder: Path, shown: str, made: str) -> None:
    if name not in DIVIDING:
        pytest.skip("with DDP and ZeRO-1 each process has whole gradients, and ZeRO-3 divides as FSDP2 does")
    assert len(values(folder / f"{name}-{made}", "loss")) == STEPS
    assert_agree(folder / f"one-{made}", folder / f"{name}-{made}")
    config = load_model(str(folder / f"{name}-{made}" / "checkpoint-final")).config
    assert config.weight_tying is (made == "tied")
    if made != "tied":  # what the option changes
        assert values(folder / f"one-{made}", "loss")[1] != values(folder / "one-sequence", "loss")[1]


def test_checkpoints_are_whole_and_can_be_loaded(name: str, folder: Path, shown: str) -> None:
    out = folder / f"{name}-token"
    assert not (out / UNFINISHED).exists()
    for step in range(1, STEPS + 1):
        assert fault(out / f"checkpoint-{step}") is None
    final = out / "checkpoint-final"
    assert torch.equal(weights(out / f"checkpoint-{STEPS}"), weights(final))
    assert not [path.name for path in final.iterdir() if path.suffix in (".bin", ".pt", ".pth")]


def test_a_resumed_run_is_the_same_to_the_last_bit(name: str, folder: Path, shown: str) -> None:
    whole, resumed = folder / f"{name}-token", folder / f"{name}-resumed"
    for key in ("loss", "grad_norm"):
        again = values(resumed, key)
        assert list(again) == [3, 4]
        assert again == {step: value for step, value in values(whole, key).items() if step > 2}
    assert torch.equal(weights(resumed / "checkpoint-final"), weights(whole / "checkpoint-final"))


def test_one_process_goes_on_from_two_and_two_from_one(name: str, folder: Path, shown: str) -> None:
    if name == "zero1":
        pytest.skip("ZeRO-2 shares its code, and runs")
    engine, alone, together = ENGINES[name], f"{name}-alone", f"{name}-together"
    from_two = [*TOKEN, *shape(1, 2), *CHECKPOINTS, "--resume_from_checkpoint", f"{name}-token/checkpoint-2"]
    from_one = [*TOKEN, *shape(2), "--resume_from_checkpoint", f"{alone}/checkpoint-3"]
    several(folder, None if name == "ddp" else engine, 1, {alone: from_two})
    several(folder, engine, 2, {together: from_one})
    assert list(values(folder / alone, "loss")) == [3, 4]
    assert list(values(folder / together, "loss")) == [4]
    for made in (alone, together):
        assert_agree(folder / f"{name}-token", folder / made)
        assert not (folder / made / UNFINISHED).exists()
    shutil.rmtree(folder / alone)
