"""Trains several times in one launch, for starting the processes takes longer than a few steps: several_runs.py FILE.

The file is a JSON list of command lines: pretrain or sft, then what examples/llada/pt.py or sft.py would get.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

import dllm.training.run
from dllm.pipelines import llada

if __name__ == "__main__":
    runs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    leave_group = dllm.training.run.leave_group
    for run in runs:
        task, *argv = run
        last = run is runs[-1]
        dllm.training.run.leave_group = leave_group if last else lambda: None
        getattr(llada, task)(argv)
        if not last:  # what the next process would find
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
