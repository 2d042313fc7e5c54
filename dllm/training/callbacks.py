"""What happens beside training: a log that plots can be made from, what is shown, and a stop that loses nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from dllm.training.launch import LAUNCHED
from dllm.training.metrics import QUARTERS

PASSED_ON_WITHIN = 2.0
"""Seconds within which a launcher has passed a signal on."""
_LAUNCHERS = {LAUNCHED, "TORCHELASTIC_RUN_ID"}
"""Environment variables that ours and torch's set for their processes."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class JsonLog(TrainerCallback):
    """Writes `log.jsonl` into the output folder: one object a logged step, tokens seen and seconds spent included.

    There is a line at every checkpoint, so that a resumed run goes on where its counts stood, at every evaluation, so that its
    tokens are those up to there, and at the last step. Lines past the step that a run resumes from are dropped, and so is the
    summary with which the stopped run ended. No line is written twice.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.before = 0.0
        """Seconds before this start."""
        self.written: set[tuple[Any, ...]] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.path = Path(str(args.output_dir)) / "log.jsonl"
        kept = []
        if state.global_step and self.path.exists():
            kept = [row for row in read_log(self.path) if row["step"] <= state.global_step]
        self.before = kept[-1]["seconds"] if kept else 0.0
        kept = [row for row in kept if "train_runtime" not in row]
        self.written = {_kind(row) for row in kept}
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log |= control.should_save or control.should_evaluate or control.should_training_stop
        return control

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.path is None or logs is None:
            return
        row = {
            "step": state.global_step,
            "tokens_seen": state.num_input_tokens_seen,
            "seconds": round(self.before + time.monotonic() - self.began, 2),
            **logs,
        }
        if _kind(row) in self.written:  # the evaluation after the last step, where that step was evaluated already
            return
        self.written.add(_kind(row))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _kind(row: dict[str, Any]) -> tuple[Any, ...]:
    """What two rows share that say the same: the step, and which numbers they give."""
    return row["step"], *sorted(row)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a `log.jsonl`; a last line that a killed process left half-written is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Bar(ProgressCallback):
    """transformers' progress bars, with loss and speed behind them, and without the dicts that it prints; see `LogLines`."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:  # the bar itself tells the time to finish
            speed = f", {count(logs['tokens_per_second'])} tokens/s" if "tokens_per_second" in logs else ""
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}{speed}")


class LogLines(TrainerCallback):
    """Prints one short line a logged step, above the progress bar where there is one."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            tqdm.write(log_line(state.global_step, state.max_steps, logs))
            sys.stdout.flush()  # a file that is followed with tail -f shows it now


def log_line(step: int, steps: int, logs: dict[str, Any]) -> str:
    """What a logged step says, in words."""
    if "loss" in logs:
        words = f"loss {logs['loss']:.4f}"
        words += f"  gradient {logs['grad_norm']:.3g}" if "grad_norm" in logs else ""
        words += f"  rate {logs['learning_rate']:.3g}" if "learning_rate" in logs else ""
        words += f"  {count(logs['tokens_per_second'])} tokens/s" if "tokens_per_second" in logs else ""
        words += f"  MFU {100 * logs['mfu']:.0f} %" if "mfu" in logs else ""
        words += f"  {duration(logs['eta_seconds'])} left" if logs.get("eta_seconds") else ""
    elif "eval_loss" in logs:
        words = f"loss {logs['eval_loss']:.4f} on unseen rows"
        if "eval_nll" in logs:
            if not math.isclose(logs["eval_nll"], logs["eval_loss"], rel_tol=1e-9):
                words += f"  {logs['eval_nll']:.4f} nats a token"
            words += f"  perplexity {logs['eval_ppl']:.4g}"
        quarters = [f"{logs[key]:.3f}" for key in (f"eval_nll_{name}" for name in QUARTERS) if key in logs]
        words += f"  by quarter of t {' '.join(quarters)}" if len(quarters) == len(QUARTERS) else ""
    elif "train_loss" in logs:
        words = f"trained in {logs['train_runtime']:.1f} s, mean loss {logs['train_loss']:.4f}"
    else:
        words = "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, int | float))
    return f"step {step}/{steps}  {words}"


def count(number: float) -> str:
    """A number in three digits: 950, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """A time in at most two units: 45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def hide_bars(everywhere: bool) -> None:
    """Hides the progress bars of transformers and datasets; a file would get every redraw of them.

    Args:
        everywhere: also where someone looks, for the bars would break into another one.
    """
    if everywhere or not sys.stderr.isatty():
        logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


class StopOnSignal(TrainerCallback):
    """Ctrl-C, SIGTERM or SIGUSR1 ends the step in hand, saves a checkpoint to resume from, and stops.

    A second Ctrl-C stops at once. Schedulers send their signals more than once (at a warning, and at the end of the time that it
    gave), so that a second SIGTERM or SIGUSR1 changes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal that this process got."""
        self.stopped_by: int | None = None
        """The signal for which all processes stopped together; None where training came to its end."""
        self._first = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that reads data: its process stops it
            return
        if self.received is None:
            self.received, self._first = number, time.monotonic()
            again = " (again: stop at once)" if number == signal.SIGINT else ""
            print(f"\n{signal.Signals(number).name}: saving a checkpoint after this step{again} ...", flush=True)
        # a terminal sends Ctrl-C to the launcher too, which then passes it on: that is one Ctrl-C
        elif number == signal.SIGINT and (
            not _LAUNCHERS & set(os.environ) or time.monotonic() - self._first > PASSED_ON_WITHIN
        ):
            signal.signal(number, self._before[number])
            raise KeyboardInterrupt

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        number = self.received or 0
        if args.world_size > 1:  # every rank must save at the same step
            highest = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            number = int(highest)
        if number:
            self.stopped_by = number
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        while self._before:
            signal.signal(*self._before.popitem())


def end_together() -> None:
    """Waits until every process of a stopped run has come here, and ignores SIGTERM from then on.

    A launcher ends all processes when one has ended with a status other than 0: not while another still seals its files, nor
    so that it ends with another status.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.distributed.barrier()
