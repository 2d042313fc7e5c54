"""Two processes: both sample alike, and one process's number that is not finite ends both before the weights see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from system.workshop import make_workshop, run, save_tiny_model

from dllm.training.checkpoints import fault

pytestmark = pytest.mark.system

HERE = Path(__file__).resolve().parent
POISONED = """
import math, sys
from dataclasses import replace
from dllm.errors import NonFiniteError
from dllm.pipelines.llada.trainer import LLADA, LLaDATrainer
from dllm.training.run import run

class Poisoned(LLaDATrainer):
    def score(self, model, inputs, plan, denominator):
        scored = super().score(model, inputs, plan, denominator)
        hit_N = (inputs["sample"] == 23)[scored.noisy.masked_BL.nonzero()[:, 0]]
        if not bool(hit_N.any()):
            return scored
        return scored._replace(nll_N=scored.nll_N.masked_fill(hit_N, math.nan), loss=scored.loss * math.nan)

try:
    run("pretrain", replace(LLADA, trainer=Poisoned), sys.argv[1:])
except NonFiniteError as error:
    sys.exit(f"SAID {error}")
"""


@pytest.mark.parametrize("engine", ["ddp", "deepspeed_zero3", "fsdp"])
def test_all_processes_stop_at_a_loss_that_is_not_finite(tmp_path: Path, engine: str) -> None:
    save_tiny_model(make_workshop(tmp_path) / "base")
    (tmp_path / "poisoned.py").write_text(POISONED)
    options = (
        '--model_name_or_path base --dataset_args "builtin:sudoku6[train:100,test:2]" --max_length 37 --bf16 false '
        "--per_device_train_batch_size 4 --max_steps 5 --logging_steps 1 --save_steps 2 --report_to none "
        "--sample_every 1 --sample_length 5 --output_dir run"
    )
    script = f"{HERE / 'fsdp_on_cpu.py'} poisoned.py" if engine == "fsdp" else "poisoned.py"
    launch = f"accelerate launch --config_file scripts/accelerate_configs/{engine}.yaml --num_processes 2"
    shown = run(f"{launch} {script} {options}", tmp_path, code=1)
    assert {"ddp": "MULTI_CPU", "deepspeed_zero3": "DEEPSPEED stage 3", "fsdp": "FSDP version 2"}[engine] in shown
    # samples 16 to 23 are the third step's; the last of them is the second process's
    said = [line.partition("SAID ")[2] for line in shown.splitlines() if "SAID " in line]
    assert len(said) == 2, shown
    assert said[0] == said[1]
    assert said[0].startswith("Step 3: the loss is not finite on rank 1, sample 23 (row ")
    assert "run/checkpoint-2 is whole: go on from it with --resume_from_checkpoint auto" in said[0]
    assert fault(tmp_path / "run" / "checkpoint-2") is None
    assert not (tmp_path / "run" / "checkpoint-3").exists()
    assert (tmp_path / "run" / "losses.png").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
