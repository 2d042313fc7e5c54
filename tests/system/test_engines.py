"""Every engine trains one model: two processes with the shipped accelerate configurations, against one process without any.

One launch of two processes makes several runs: each normalisation of the loss, accumulation, adapters, one that goes on from a
checkpoint of its own and one from a checkpoint of one process, and last one that meets a number that is not finite. Then one
process goes on from a checkpoint of two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from system.several_runs import POISON
from system.workshop import make_workshop, save_tiny_model, several, trained_here, write_jsonl

from dllm.layers.adapters import TENSORS
from dllm.pipelines.llada import load_model
from dllm.training.callbacks import read_log
from dllm.training.checkpoints import UNFINISHED, fault

pytestmark = pytest.mark.system

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
LORA = (
    "sft --model_name_or_path base --dataset_args builtin:addition[train:40,test:7] --max_length 64 "
    f"--max_steps {STEPS} --save_steps 2 --logging_steps 1 --bf16 false --lora --r 4"
).split()
ADAPTERS = {"ddp": "lora4", "zero3": "lora", "fsdp": "lora"}
"""Adapters at one engine of each sort; 4 bits where the frozen weights are not divided."""
FOUR_BITS = {"lora": [], "lora4": ["--load_in_4bit"]}
POISONED = (
    "poisoned --model_name_or_path base --dataset_args builtin:sudoku6[train:100,test:2] --max_length 37 --bf16 false "
    f"--per_device_train_batch_size 4 --max_steps {STEPS + 1} --logging_steps 1 --save_steps 2 --report_to none "
    "--sample_every 1 --sample_length 5"
).split()


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


def whole(runs: dict[str, list[str]]) -> dict[str, list[str]]:
    """With the task and the common options, where only what differs is given."""
    words = {name: more if more[0] in ("pretrain", "sft") else ["sft", *more] for name, more in runs.items()}
    return {name: [task, *COMMON, *more] for name, (task, *more) in words.items()}


def shape(processes: int, accumulated: int = 1) -> list[str]:
    batch = GLOBAL_BATCH // processes // accumulated
    return f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulated}".split()


def first_runs(prefix: str, processes: int) -> dict[str, list[str]]:
    runs = {f"{prefix}-{name}": [*shape(processes), "--loss_normalisation", name] for name in NORMALISATIONS}
    runs[f"{prefix}-token"] += CHECKPOINTS
    runs[f"{prefix}-accumulated"] = shape(processes, 2)
    if prefix in ("one", *DIVIDING):
        runs |= {f"{prefix}-{kind}": [*words, *shape(processes)] for kind, words in KINDS.items()}
    adapters = FOUR_BITS if prefix == "one" else [ADAPTERS[prefix]] if prefix in ADAPTERS else []
    return whole(runs) | {f"{prefix}-{kind}": [*LORA, *shape(processes), *FOUR_BITS[kind]] for kind in adapters}


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
    save_tiny_model(folder / "tied", more={"weight_tying": True, "include_qkv_bias": True})
    answers = [f"{i * i:b}" * (1 + i % 5) for i in range(25)]  # 1 to 45 tokens: the normalisations differ
    chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": a}] for i, a in enumerate(answers)]
    write_jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    trained_here(folder, first_runs("one", 1))
    return folder


@pytest.fixture(scope="module", params=list(ENGINES))
def name(request: pytest.FixtureRequest) -> str:
    engine: str = request.param
    return engine


def one_process_first(name: str) -> str:
    """The run of one process from which two go on."""
    return "one-token" if name == "ddp" else f"{name}-single"


@pytest.fixture(scope="module")
def shown(name: str, folder: Path) -> str:
    """What two processes printed; after one process of the engine, where it has a format of its own for what is divided."""
    runs = first_runs(name, 2)
    again = [*TOKEN, *shape(2), *CHECKPOINTS, "--resume_from_checkpoint"]
    runs |= whole({f"{name}-resumed": [*again, f"{name}-token/checkpoint-2"]})
    if name != "zero1":
        runs |= whole({f"{name}-together": [*again, f"{one_process_first(name)}/checkpoint-3"]})
    if name not in ("ddp", "zero1"):
        several(folder, ENGINES[name].config, 1, whole({f"{name}-single": [*TOKEN, *shape(1), *CHECKPOINTS]}))
    return several(folder, ENGINES[name].config, 2, {**runs, f"{name}-poisoned": POISONED}, code=1)


def test_the_normalisations_differ(folder: Path) -> None:
    first = {values(folder / f"one-{name}", "loss")[1] for name in NORMALISATIONS}
    assert min(abs(a - b) / a for a in first for b in first if a != b) > 1e-3
    assert len(first) == 3


def test_the_engine_is_the_one_that_was_asked_for(name: str, folder: Path, shown: str) -> None:
    lines = [line for line in shown.splitlines() if "a step is" in line]
    made = {path.parent.name.removeprefix(f"{name}-") for path in folder.glob(f"{name}-*/run.json")}
    assert len(lines) == len(made - {"single", "alone"})
    assert len(lines) == 6 + len(KINDS) * (name in DIVIDING) + (name in ADAPTERS) + (name != "zero1")
    whole_models = [line for line in lines if "of them trained" not in line]
    assert len(lines) - len(whole_models) == (name in ADAPTERS)
    tied = [line for line in whole_models if "89,216 parameters" in line]
    assert len(tied) == (name in DIVIDING)
    assert all("95,424 parameters" in line for line in whole_models if line not in tied)
    assert all("2 processes" in line and line.endswith("accumulated; " + ENGINES[name].said) for line in lines)


@pytest.mark.parametrize("made", [*NORMALISATIONS, "accumulated"])
def test_losses_gradients_and_weights_are_those_of_one_process(name: str, folder: Path, shown: str, made: str) -> None:
    assert len(values(folder / f"{name}-{made}", "loss")) == STEPS
    assert_agree(folder / f"one-{made}", folder / f"{name}-{made}")


@pytest.mark.parametrize("made", list(KINDS))
def test_packed_rows_masked_documents_tied_weights_and_biases_too(
    name: str, folder: Path, shown: str, made: str
) -> None:
    if name not in DIVIDING:
        pytest.skip("with DDP and ZeRO-1 each process has whole gradients, and ZeRO-3 divides as FSDP2 does")
    assert len(values(folder / f"{name}-{made}", "loss")) == STEPS
    assert_agree(folder / f"one-{made}", folder / f"{name}-{made}")
    config = load_model(str(folder / f"{name}-{made}" / "checkpoint-final")).config
    assert config.weight_tying is config.include_qkv_bias is (made == "tied")
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


def test_two_processes_go_on_from_one_and_one_from_two(name: str, folder: Path, shown: str) -> None:
    if name == "zero1":
        pytest.skip("ZeRO-2 shares its code, and runs")
    alone = f"{name}-alone"
    from_two = [*TOKEN, *shape(1, 2), *CHECKPOINTS, "--resume_from_checkpoint", f"{name}-token/checkpoint-2"]
    if name == "ddp":
        trained_here(folder, whole({alone: from_two}))
    else:
        several(folder, ENGINES[name].config, 1, whole({alone: from_two}))
    assert list(values(folder / alone, "loss")) == [3, 4]
    assert list(values(folder / f"{name}-together", "loss")) == [4]
    for made in (alone, f"{name}-together", one_process_first(name)):
        assert_agree(folder / f"{name}-token", folder / made)
        assert not (folder / made / UNFINISHED).exists()


def test_two_processes_save_the_whole_adapter(name: str, folder: Path, shown: str) -> None:
    if name not in ADAPTERS:
        pytest.skip("ZeRO-1 and 2 leave weights whole, as DDP does")
    kind = ADAPTERS[name]
    one, two = folder / f"one-{kind}", folder / f"{name}-{kind}"
    for key in ("loss", "grad_norm"):
        assert list(values(two, key)) == [1, 2, 3, 4]
        assert values(two, key) == pytest.approx(values(one, key), rel=1e-4 if kind == "lora4" else 2e-5)
    first, second = (load_file(made / "checkpoint-final" / TENSORS) for made in (one, two))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert second[key].shape == tensor.shape
        # AdamW divides a gradient by its own size, so where one is near nothing rounding shows
        assert (second[key].float() - tensor).norm() < 2e-3 * tensor.norm() + 1e-5, key
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected, found = (load_model(str(made))(ids).logits for made in (one, two))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 if kind == "lora4" else 1e-3)


def test_all_processes_stop_at_a_loss_that_is_not_finite_and_sample_alike(name: str, folder: Path, shown: str) -> None:
    out = folder / f"{name}-poisoned"
    # samples 16 to 23 are the third step's; the last of them is the second process's
    said = [line.partition("SAID ")[2] for line in shown.splitlines() if "SAID " in line]
    assert len(said) == 2, shown
    assert said[0] == said[1]
    assert said[0].startswith(f"Step 3: the loss is not finite on rank 1, sample {POISON} (row ")
    assert f"{out.name}/checkpoint-2 is whole: go on from it with --resume_from_checkpoint auto" in said[0]
    assert fault(out / "checkpoint-2") is None
    assert not (out / "checkpoint-3").exists()
    assert (out / "losses.png").exists()
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
