"""A run that is stopped, politely or not, goes on as if nothing had been: the same weights, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from system.workshop import (
    BIN,
    CPU_CONFIG,
    ROOT,
    environment,
    make_workshop,
    run,
    several,
    several_command,
    trained_here,
)

from dllm.training.callbacks import read_log
from dllm.training.checkpoints import fault

pytestmark = pytest.mark.system

LONG = 300
"""Seconds after which a process that was told to stop hangs; on a busy machine it imports and saves for a minute."""
STEPS = 300
# 20 steps an epoch: the stop falls in the middle of one. Both optimisers' states have to come back.
COMMAND = [
    *(str(BIN / "dllm"), "pretrain", "--model_name_or_path", "tiny"),
    *("--config_overrides", "n_layers=2,d_model=64,mlp_hidden_size=128", "--optimizer", "muon"),
    *("--dataset_args", "builtin:sudoku6[train:160,test:8]", "--max_length", "37", "--random_length", "0.3"),
    *("--max_steps", str(STEPS), "--logging_steps", "1", "--resume_from_checkpoint", "auto", "--output_dir"),
]


def start(out: Path, *options: str, command: Sequence[str] = COMMAND) -> subprocess.Popen[str]:
    """Starts training; its outputs go to a file, for a full pipe would hold it up."""
    with out.with_suffix(".out").open("w") as shown:
        # a session of its own, as a terminal gives: the signal must not reach this test
        return subprocess.Popen(
            [*command, str(out), *options],
            stdin=subprocess.DEVNULL,
            stdout=shown,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
            text=True,
        )


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    log = out / "log.jsonl"
    while process.poll() is None:
        if log.exists() and any(row["step"] >= step for row in read_log(log)):
            return
        time.sleep(0.02)
    raise AssertionError(f"ended with {process.returncode}\n" + out.with_suffix(".out").read_text())


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*[0-9]"))


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoint-final" / "model.safetensors")


def test_a_run_that_is_stopped_by_two_signals_and_killed_goes_on_bit_by_bit(tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = ("--save_steps", "30")
    wait_for, stops = 25, []
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(out, *options)
        wait_for_step(process, out, wait_for)
        process.send_signal(number)
        assert process.wait(timeout=LONG) == code
        shown = out.with_suffix(".out").read_text()
        stops.append(checkpoints(out)[-1])
        assert wait_for <= stops[-1] < STEPS
        assert f"{number.name}: saving a checkpoint after this step" in shown
        assert f"Stopped at step {stops[-1]}. Go on with the same command and --resume_from_checkpoint auto" in shown
        assert "Traceback" not in shown
        assert not (out / "checkpoint-final").exists()
        wait_for = stops[-1] + 5

    process = start(out, *options)
    wait_for_step(process, out, stops[-1] // 30 * 30 + 70)
    process.kill()
    assert process.wait(timeout=LONG) == -signal.SIGKILL
    assert checkpoints(out)[-1] >= stops[-1] // 30 * 30 + 60
    # what a kill in the middle of saving leaves: the weights are written first, and nothing says that the folder is whole
    torn = out / f"checkpoint-{STEPS - 1}"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half a file")

    shown = run([*COMMAND, str(out), *options], tmp_path)
    assert f"step {stops[-1]}/" not in shown, "it began anew"
    trained_here(tmp_path, {"whole": COMMAND[1:-1]})
    weights, expected = final_weights(out), final_weights(whole)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    logs = [read_log(folder / "log.jsonl") for folder in (out, whole)]
    assert len(logs[1]) > STEPS
    for key in ("step", "tokens_seen", "loss", "eval_loss"):
        mine, theirs = ([row[key] for row in log if key in row and "train_loss" not in row] for log in logs)
        assert mine == theirs, key


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    # steps of many seconds each: the second signal arrives before the first one's step ends
    big = ("--per_device_train_batch_size", "1000", "--gradient_accumulation_steps", "20")
    process = start(out, *big, "--dataset_args", "builtin:sudoku6[train:20_000]")
    shown = out.with_suffix(".out")

    def wait_for(text: str) -> None:
        while process.poll() is None and text not in shown.read_text():
            time.sleep(0.02)

    wait_for("a step is")
    time.sleep(1)  # the handler is installed soon after that line; without it the test would pass as well
    process.send_signal(signal.SIGINT)
    wait_for("SIGINT: saving a checkpoint")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LONG) == 130
    assert "dllm pretrain: stopped." in shown.read_text()
    assert checkpoints(out) == []


def test_ctrl_c_on_two_processes_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """That two processes go on from one is shown below, and in test_launch.py."""
    out, steps = tmp_path / "run", "60"
    script = str(ROOT / "examples" / "llada" / "pt.py")
    launch = [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / CPU_CONFIG), script, *COMMAND[2:-1]]
    process = start(out, command=[*launch, "--max_steps", steps, "--save_strategy", "no", "--output_dir"])
    wait_for_step(process, out, 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher, which passes it on, and to both ranks
    assert process.wait(timeout=LONG) != 0
    shown = out.with_suffix(".out").read_text()
    (stopped,) = checkpoints(out)
    assert 5 <= stopped < int(steps)
    assert fault(out / f"checkpoint-{stopped}") is None
    assert (out / f"checkpoint-{stopped}" / "rng_state_1.pth").exists()
    assert shown.count("SIGINT: saving a checkpoint after this step") == 2
    assert f"Stopped at step {stopped}. Go on with the same command" in shown
    assert "KeyboardInterrupt" not in shown


def test_two_processes_that_are_killed_go_on_to_the_same_bits_under_zero2(tmp_path: Path) -> None:
    """One launch makes the whole run, and then one that is killed."""
    make_workshop(tmp_path)
    steps, out = 120, tmp_path / "run"
    adamw = [word for word in COMMAND[1:-1] if word not in ("--optimizer", "muon")]
    words = [*adamw, "--max_steps", str(steps), "--save_steps", "20"]
    both = several_command(tmp_path, "deepspeed_zero2", 2, {"whole": words, "run": words})
    with out.with_suffix(".out").open("w") as shown:
        process = subprocess.Popen(
            both, cwd=tmp_path, env=environment(), stdout=shown, stderr=subprocess.STDOUT, start_new_session=True, text=True
        )  # fmt: skip
    wait_for_step(process, out, 50)
    os.killpg(process.pid, signal.SIGKILL)  # the launcher and both ranks
    process.wait(timeout=LONG)
    assert not (out / "checkpoint-final").exists()
    resumed = several(tmp_path, "deepspeed_zero2", 2, {"run": words})
    assert "DEEPSPEED stage 2" in resumed
    assert "step 20/" not in resumed, "it began anew"
    expected, found = (
        [(row["loss"], row["grad_norm"]) for row in read_log(folder / "log.jsonl") if "loss" in row]
        for folder in (tmp_path / "whole", out)
    )
    assert len(expected) == steps
    assert found == expected
    for name, tensor in final_weights(tmp_path / "whole").items():
        assert torch.equal(tensor, final_weights(out)[name]), name
