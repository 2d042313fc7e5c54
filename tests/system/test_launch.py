"""`dllm pretrain` in several processes of this machine: statuses, signals and errors pass through the launcher."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from system.test_interrupt import LONG, checkpoints, start, wait_for_step
from system.workshop import BIN, make_workshop, run

from dllm.training.callbacks import read_log
from dllm.training.checkpoints import fault

pytestmark = pytest.mark.system

STEPS = 400
COMMAND = [
    *(str(BIN / "dllm"), "pretrain", "--num_processes", "2", "--model_name_or_path", "tiny"),
    *("--config_overrides", "n_layers=1,d_model=32,mlp_hidden_size=64", "--dataset_args", "builtin:sudoku6[train:160]"),
    *("--max_length", "37", "--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "no", "--output_dir"),
]


def test_a_signal_to_the_launcher_and_ctrl_c_save_and_stop_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGUSR1, a scheduler's warning, is for test_slurm.py."""
    out = tmp_path / "run"
    # each time the same command: first a signal to the launcher alone, then Ctrl-C, then to the end
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = checkpoints(out)
        process = start(out, "--resume_from_checkpoint", "auto", command=COMMAND)
        wait_for_step(process, out, (before[-1] if before else 0) + 3)
        if number == signal.SIGTERM:
            process.send_signal(number)
        else:  # as a terminal does: to the launcher, which passes it on, and to both ranks
            os.killpg(process.pid, number)
        shown = out.with_suffix(".out")
        assert process.wait(timeout=LONG) == status, shown.read_text()
        stopped = checkpoints(out)[-1]
        assert fault(out / f"checkpoint-{stopped}") is None
        assert f"Stopped at step {stopped}." in shown.read_text()
        for word in ("Traceback", "ended with", "KeyboardInterrupt"):
            assert word not in shown.read_text()
    shown = run([*COMMAND, str(out), "--resume_from_checkpoint", "auto"], tmp_path)
    assert "dllm pretrain: 2 processes through accelerate's cpu (--accelerate_config, --num_processes)\n" in shown
    assert "a step is 2 processes x 8 samples x 1 accumulated; MULTI_CPU" in shown
    assert [row["step"] for row in read_log(out / "log.jsonl") if "loss" in row] == list(range(1, STEPS + 1))
    assert (out / "checkpoint-final").exists()


def test_an_error_of_all_processes_is_shown_once(tmp_path: Path) -> None:
    shown = run([*COMMAND, "run", "--max_lenght", "9"], tmp_path, code=2)
    said = "dllm pretrain: There is no option '--max_lenght'. Did you mean '--max_length'?"
    assert shown.splitlines()[-1] == said
    assert shown.count("--max_lenght") == 1
    assert not list(tmp_path.iterdir())


def test_a_process_that_dies_is_named_and_its_status_passed_on(tmp_path: Path) -> None:
    make_workshop(tmp_path)
    launch = ["python", "-m", "dllm.training.launch", "--config_file", "cpu", "script.py"]
    for ending, status, said in (
        ("sys.exit(7 * rank)", 7, "launch: process 1 ended with status 7; what it said stands above."),
        ("os.kill(os.getpid(), 9 * rank)", 137, "launch: process 1 was ended by SIGKILL."),
    ):
        (tmp_path / "script.py").write_text(f"import os, sys\nrank = int(os.environ['RANK'])\n{ending}\n")
        assert run(launch, tmp_path, code=status).splitlines()[-1] == said
