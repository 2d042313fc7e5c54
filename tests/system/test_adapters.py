"""Adapters in real processes: one run on every engine, and a run that is killed."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from system.workshop import CPU_CONFIG, ROOT, environment, make_workshop, run, save_tiny_model

from dllm.layers.adapters import TENSORS
from dllm.pipelines import llada
from dllm.training.callbacks import read_log

pytestmark = pytest.mark.system
pytest.importorskip("peft")

CONFIGS = "scripts/accelerate_configs"
SFT = (
    "examples/llada/sft.py --model_name_or_path base --dataset_args builtin:addition[train:40,test:7] --max_length 64 "
    "--logging_steps 1 --bf16 false --lora --r 4"
)
ENGINES = {
    "ddp-4bit": (CPU_CONFIG, "", "MULTI_CPU"),
    "zero3": (f"{CONFIGS}/deepspeed_zero3.yaml", "", "DEEPSPEED"),
    "fsdp": (f"{CONFIGS}/fsdp.yaml", "tests/system/fsdp_on_cpu.py", "FSDP"),
}
"""Configuration, what stands before the script, and what the run says that it uses."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_workshop(tmp_path_factory.mktemp("adapters"))
    (made / "tests").symlink_to(ROOT / "tests")
    save_tiny_model(made / "base")
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    for bits in ("", "-4bit"):
        option = "--load_in_4bit" if bits else ""
        run(
            f"python {SFT} --max_steps 4 --save_steps 2 --per_device_train_batch_size 8 {option} --output_dir one{bits}",
            folder,
        )
    return folder


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_log(folder / "log.jsonl") if "loss" in row}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_one_run_and_save_the_whole_adapter(engine: str, alone: Path) -> None:
    pytest.importorskip("deepspeed" if engine == "zero3" else "bitsandbytes")
    config, before, said = ENGINES[engine]
    bits = "-4bit" if engine.endswith("-4bit") else ""
    shown = run(
        f"accelerate launch --config_file {config} --num_processes 2 {before} {SFT} --max_steps 4 --save_steps 2 "
        f"--per_device_train_batch_size 4 {'--load_in_4bit' if bits else ''} --output_dir {engine}",
        alone,
    )
    assert f"a step is 2 processes x 4 samples x 1 accumulated; {said}" in shown
    one, two = losses(alone / f"one{bits}"), losses(alone / engine)
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    for step, values in one.items():
        assert two[step] == pytest.approx(values, rel=1e-4 if bits else 2e-5)
    first, second = (load_file(alone / name / "checkpoint-final" / TENSORS) for name in (f"one{bits}", engine))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert second[key].shape == tensor.shape
        # AdamW divides a gradient by its own size, so where one is near nothing rounding shows
        assert (second[key].float() - tensor).norm() < 2e-3 * tensor.norm() + 1e-5, key
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected, found = (llada.load_model(alone / name)(ids).logits for name in (f"one{bits}", engine))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 if bits else 1e-3)


def test_a_run_that_is_killed_goes_on_bit_for_bit(folder: Path) -> None:
    words = f"{SFT} --max_steps 60 --save_steps 3 --save_total_limit 60 --per_device_train_batch_size 4 --output_dir"
    run(f"python {words} whole", folder)
    process = subprocess.Popen(
        ["bash", "-c", f"exec python {words} killed"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 60
    while not (folder / "killed" / "checkpoint-6" / "files.json").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "killed" / "checkpoint-final").exists()
    assert "step 60/60" in run(f"python {words} killed --resume_from_checkpoint auto", folder)
    first, second = (load_file(folder / name / "checkpoint-final" / TENSORS) for name in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert losses(folder / "killed").items() <= losses(folder / "whole").items()
