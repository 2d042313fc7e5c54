"""The log that plots are made from, the lines that are shown, and a stop that loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from dllm.training.callbacks import Bar, JsonLog, StopOnSignal, count, duration, log_line, read_log
from dllm.training.metrics import QUARTERS


def state(step: int, first: bool = True) -> TrainerState:
    """Of a run whose steps are 100 tokens each."""
    return TrainerState(global_step=step, is_world_process_zero=first, num_input_tokens_seen=100 * step)


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


class Run:
    """A run that logs what it is told, without a model."""

    def __init__(self, args: TrainingArguments, begin: int = 0) -> None:
        self.args = args
        self.log = JsonLog()
        self.log.on_train_begin(args, state(begin), TrainerControl())

    def step(self, step: int, **logs: Any) -> None:
        if logs:
            self.log.on_log(self.args, state(step), TrainerControl(), logs=logs)


def steps_and_tokens(args: TrainingArguments) -> list[tuple[int, int]]:
    return [(row["step"], row["tokens_seen"]) for row in read_log(Path(str(args.output_dir)) / "log.jsonl")]


def test_a_line_is_what_was_logged_with_step_tokens_and_seconds(args: TrainingArguments) -> None:
    run = Run(args)
    run.step(1)
    run.step(2, loss=2.5, epoch=0.5)
    (row,) = read_log(Path(str(args.output_dir)) / "log.jsonl")
    assert row.pop("seconds") >= 0
    assert row == {"step": 2, "tokens_seen": 200, "loss": 2.5, "epoch": 0.5}


def test_a_resumed_run_goes_on_counting_and_drops_what_came_after(args: TrainingArguments) -> None:
    before = Run(args)
    for step in range(1, 6):
        before.step(step, loss=1.0 / step)
    resumed = Run(args, begin=3)
    for step in range(4, 6):
        resumed.step(step, loss=1.0 / step)
    assert steps_and_tokens(args) == [(step, 100 * step) for step in range(1, 6)]


def test_seconds_go_on_too(args: TrainingArguments) -> None:
    path = Path(str(args.output_dir)) / "log.jsonl"
    path.write_text(json.dumps({"step": 3, "tokens_seen": 5, "seconds": 1000.0, "loss": 1.0}) + "\n")
    Run(args, begin=3).step(4, loss=0.5)
    assert read_log(path)[1]["seconds"] >= 1000


def test_the_summary_of_a_stopped_run_is_dropped_and_nothing_is_written_twice(args: TrainingArguments) -> None:
    stopped = Run(args)
    stopped.step(1, loss=1.0)
    stopped.log.on_log(args, state(1), TrainerControl(), logs={"eval_loss": 0.5, "eval_runtime": 1.0})
    stopped.log.on_log(args, state(1), TrainerControl(), logs={"train_runtime": 3.0, "train_loss": 1.0})
    resumed = Run(args, begin=1)
    resumed.log.on_log(args, state(1), TrainerControl(), logs={"eval_loss": 0.5, "eval_runtime": 2.0})
    resumed.step(2, loss=0.9)
    rows = read_log(Path(str(args.output_dir)) / "log.jsonl")
    assert [sorted({"loss", "eval_loss", "train_loss"} & set(row))[0] for row in rows] == ["loss", "eval_loss", "loss"]
    assert [row["tokens_seen"] for row in rows] == [100, 100, 200]


def test_a_new_run_starts_a_new_log(args: TrainingArguments) -> None:
    Run(args).step(5, loss=1.0)
    Run(args).step(1, loss=2.0)
    assert steps_and_tokens(args) == [(1, 100)]


def test_a_half_written_last_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": 2.0}]


def test_only_the_first_process_writes(args: TrainingArguments, tmp_path: Path) -> None:
    log = JsonLog()
    log.on_train_begin(args, state(0, first=False), TrainerControl())
    log.on_log(args, state(1, first=False), TrainerControl(), logs={"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["should_save", "should_evaluate", "should_training_stop", None])
def test_there_is_a_line_at_every_checkpoint_and_evaluation_and_at_the_end(
    args: TrainingArguments, what: str | None
) -> None:
    control = TrainerControl(**({what: True} if what else {}))
    JsonLog().on_step_end(args, state(3), control)
    assert control.should_log is (what is not None)


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"loss": 2.0, "grad_norm": 0.5, "learning_rate": 1e-4}, "step 3/9  loss 2.0000  gradient 0.5  rate 0.0001"),
        (
            {"loss": 2.0, "tokens_per_second": 12345.0, "mfu": 0.451, "eta_seconds": 7500.0, "nll": 1.0},
            "step 3/9  loss 2.0000  12.3k tokens/s  MFU 45 %  2 h 05 min left",
        ),
        (
            {"eval_loss": 1.25, "eval_nll": 1.5, "eval_ppl": 4.4817, **{f"eval_nll_{name}": 1.0 for name in QUARTERS}},
            "step 3/9  loss 1.2500 on unseen rows  1.5000 nats a token  perplexity 4.482  by quarter of t"
            + 4 * " 1.000",
        ),
        (
            {"eval_loss": 1.5, "eval_nll": 1.5, "eval_ppl": 4.4817},
            "step 3/9  loss 1.5000 on unseen rows  perplexity 4.482",
        ),
        ({"eval_loss": 1.25, "eval_runtime": 1.0}, "step 3/9  loss 1.2500 on unseen rows"),
        ({"train_loss": 1.5, "train_runtime": 2.0}, "step 3/9  trained in 2.0 s, mean loss 1.5000"),
    ],
)
def test_a_shown_line_says_in_words_what_was_logged(logs: dict[str, float], line: str) -> None:
    assert log_line(3, 9, logs) == line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_and_saves(
    args: TrainingArguments, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    stop = StopOnSignal()
    stop.on_train_begin(args, state(0), TrainerControl())
    try:
        control = stop.on_step_end(args, state(1), TrainerControl())
        assert not control.should_save
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        control = stop.on_step_end(args, state(2), TrainerControl())
        assert control.should_save
        assert control.should_training_stop
        assert stop.received == stop.stopped_by == number
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler sends more than one
        assert stop.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()
    assert signal.getsignal(number) is before
    assert f"{number.name}: saving a checkpoint after this step" in capsys.readouterr().out


def test_a_worker_that_reads_data_leaves_signals_to_its_process(
    args: TrainingArguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = StopOnSignal()
    stop.on_train_begin(args, state(0), TrainerControl())
    try:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        stop._handle(signal.SIGUSR1, None)
        assert stop.received is None
        assert capsys.readouterr().out == ""
    finally:
        stop.restore()


def test_a_launcher_that_passes_a_signal_on_has_not_sent_a_second_one(
    args: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop = StopOnSignal()
    stop.on_train_begin(args, state(0), TrainerControl())
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr("dllm.training.callbacks.PASSED_ON_WITHIN", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()


@pytest.mark.system
def test_being_told_to_stop_is_no_signal(tmp_path: Path) -> None:
    """Two ranks: one gets a signal, both stop for it, and the other's own first signal still is the first."""
    script = """
import os, signal, sys, torch
from types import SimpleNamespace
from transformers import TrainerControl, TrainerState
from dllm.training.callbacks import StopOnSignal

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
args, state, stop = SimpleNamespace(world_size=2, device="cpu"), TrainerState(), StopOnSignal()
stop.on_train_begin(args, state, TrainerControl())
assert not stop.on_step_end(args, state, TrainerControl()).should_save
if rank == 0:
    os.kill(os.getpid(), signal.SIGINT)
control = stop.on_step_end(args, state, TrainerControl())
assert control.should_save and control.should_training_stop and stop.stopped_by == signal.SIGINT
if rank == 1:
    assert stop.received is None
    os.kill(os.getpid(), signal.SIGINT)
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-c", script]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")]) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]


def test_signals_are_given_back_once(args: TrainingArguments) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = StopOnSignal()
    stop.on_train_begin(args, state(0), TrainerControl())
    assert signal.getsignal(signal.SIGINT) is not before
    stop.on_train_end(args, state(1), TrainerControl())
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop.restore()  # nothing is left to give back
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "words"), [(0.5, "0.5"), (950, "950"), (12_345, "12.3k"), (4_560_000, "4.56M"), (7.1e9, "7.1G")]
)
def test_numbers_in_three_digits(number: float, words: str) -> None:
    assert count(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3570, "1 h 00 min"), (11_100, "3 h 05 min"), (187_200, "2 d 4 h")],
)
def test_times_in_two_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_bar_says_loss_and_speed(args: TrainingArguments) -> None:
    bar = Bar()
    begun = TrainerState(max_steps=9, is_world_process_zero=True)
    bar.on_train_begin(args, begun, TrainerControl())
    bar.on_log(args, begun, TrainerControl(), logs={"loss": 2.0, "tokens_per_second": 12345.0})
    assert bar.training_bar.postfix == "loss 2.0000, 12.3k tokens/s"
    bar.on_log(args, begun, TrainerControl(), logs={"eval_loss": 1.0})
    assert bar.training_bar.postfix == "loss 2.0000, 12.3k tokens/s"
    bar.on_train_end(args, begun, TrainerControl())
