"""Adapters in a real process that is killed. What every engine makes of them stands in test_engines.py."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from system.workshop import environment, make_workshop, save_tiny_model, several_command, trained_here

from dllm.layers.adapters import TENSORS
from dllm.training.callbacks import read_log

pytestmark = pytest.mark.system
pytest.importorskip("peft")

STEPS = 60
SFT = (
    "sft --model_name_or_path base --dataset_args builtin:addition[train:40,test:7] --max_length 64 --logging_steps 1 "
    f"--bf16 false --lora --r 4 --max_steps {STEPS} --save_steps 3 --save_total_limit {STEPS} --per_device_train_batch_size 4"
).split()


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_log(folder / "log.jsonl") if "loss" in row}


def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    folder = make_workshop(tmp_path)
    save_tiny_model(folder / "base")
    trained_here(folder, {"whole": SFT})
    process = subprocess.Popen(
        several_command(folder, None, 1, {"killed": SFT}),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (folder / "killed" / "checkpoint-6" / "files.json").exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "killed" / "checkpoint-final").exists()
    trained_here(folder, {"killed": [*SFT, "--resume_from_checkpoint", "auto"]})
    first, second = (load_file(folder / name / "checkpoint-final" / TENSORS) for name in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert losses(folder / "killed") == losses(folder / "whole")
