"""Trains several times in one launch, for starting the processes takes longer than a few steps: several_runs.py FILE.

The file is a JSON list of command lines: pretrain or sft, then what examples/llada/pt.py or sft.py would get. `poisoned` is a
pretraining that meets a number that is not finite, and has to be the last.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

import dllm.training.run
from dllm.errors import NonFiniteError
from dllm.pipelines import llada
from dllm.pipelines.llada.trainer import LLADA, LLaDATrainer

POISON = 23
"""The sample whose masks have no finite nats."""


class Poisoned(LLaDATrainer):
    def score(self, model: Any, inputs: Any, plan: Any, denominator: Any) -> Any:
        scored = super().score(model, inputs, plan, denominator)
        hit_N = (inputs["sample"] == POISON)[scored.noisy.masked_BL.nonzero()[:, 0]]
        if not bool(hit_N.any()):
            return scored
        return scored._replace(nll_N=scored.nll_N.masked_fill(hit_N, math.nan), loss=scored.loss * math.nan)


def poisoned(argv: Sequence[str]) -> None:
    try:
        dllm.training.run.run("pretrain", replace(LLADA, trainer=Poisoned), argv)
    except NonFiniteError as error:
        sys.exit(f"SAID {error}")


if __name__ == "__main__":
    runs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    leave_group = dllm.training.run.leave_group
    for run in runs:
        task, *argv = run
        last = run is runs[-1]
        dllm.training.run.leave_group = leave_group if last else lambda: None
        poisoned(argv) if task == "poisoned" else getattr(llada, task)(argv)
        if not last:  # what the next process would find
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
