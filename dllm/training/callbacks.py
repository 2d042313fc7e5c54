"""What happens beside training: a log that plots can be made from, and a stop that loses nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class JsonLog(TrainerCallback):
    """Writes `log.jsonl` into the output folder: one object a logged step, tokens seen and seconds spent included.

    A resumed run goes on after the step that it resumes from; lines past it are dropped.
    """

    def __init__(self, tokens_seen: Callable[[], int]) -> None:
        self.tokens_seen = tokens_seen
        self.path: Path | None = None
        self.before = {"seconds": 0.0, "tokens": 0}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.path = Path(str(args.output_dir)) / "log.jsonl"
        kept = []
        if state.global_step and self.path.exists():
            kept = [row for row in read_log(self.path) if row["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.before = {key: kept[-1][key] if kept else 0 for key in self.before}
        self.began = time.monotonic()

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
            "tokens": int(self.before["tokens"]) + self.tokens_seen() * args.world_size,
            "seconds": round(self.before["seconds"] + time.monotonic() - self.began, 2),
            **logs,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a `log.jsonl`; a last line that a killed process left half-written is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM ends the step in hand, saves a checkpoint to resume from, and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, self._before[number])
            raise KeyboardInterrupt
        self.received = number
        print(
            f"\n{signal.Signals(number).name}: saving a checkpoint after this step (again: stop at once) ...",
            flush=True,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        stop = self.received is not None
        if args.world_size > 1:  # every rank must save at the same step
            flag = torch.tensor([float(stop)], device=args.device)
            torch.distributed.all_reduce(flag)
            stop = bool(flag.item())
            self.received = self.received or (signal.SIGTERM if stop else None)
        if stop:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
