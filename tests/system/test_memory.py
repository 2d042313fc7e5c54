"""Loading a checkpoint in shards takes about as much memory as the weights that it gives.

A file is mapped, not read, so two numbers count. Anonymous memory is what only this process can give back: the weights that
are made, and what is made on the way. Resident memory has the mapped pages of the files too, which the system takes back when
it needs them: dense weights stay in them, and experts leave them behind, merged into one tensor a projection.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from system.workshop import run

from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModelLM

pytestmark = [pytest.mark.system, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

BOUND = 1.3
"""Peak over the size of the weights: besides them, one layer's experts before they lie in one tensor, and the allocator."""
SCRIPT = """
import json, sys, threading, time
import torch
from dllm.pipelines import llada

def status(*fields):
    with open("/proc/self/status") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.endswith("kB\\n")}
    return [sizes[field] for field in fields]

def watch():
    while not done.is_set():
        seen.append(status("RssAnon", "VmRSS"))
        time.sleep(0.001)

llada.load_model("tiny", dtype=sys.argv[1])  # what the libraries set up once
done, seen = threading.Event(), []
before = status("RssAnon", "VmRSS")
watcher = threading.Thread(target=watch)
watcher.start()
model = llada.load_model("large", dtype=sys.argv[1])
with torch.inference_mode():
    for parameter in model.parameters():
        parameter.max()  # looks at every page
done.set()
watcher.join()
peak = [max(column) for column in zip(*seen)]
size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(json.dumps({"anonymous": (peak[0] - before[0]) / size, "resident": (peak[1] - before[1]) / size}))
"""
IDS: dict[str, Any] = dict(mask_token_id=1, eos_token_id=2, pad_token_id=2)
DENSE: dict[str, Any] = dict(d_model=1024, n_layers=5, n_heads=8, mlp_hidden_size=2816)
MOE: dict[str, Any] = dict(
    hidden_size=512,
    num_hidden_layers=12,  # one layer's experts lie beside the merged tensor while it is made: a twelfth of the weights
    num_attention_heads=8,
    num_experts=32,
    num_experts_per_tok=4,
    expert_intermediate_size=110,
    dense_intermediate_size=110,
)


def save(kind: str, folder: Path, vocab_size: int) -> int:
    """A checkpoint in fp32; the size of its weights."""
    if kind == "dense":
        model: Any = LLaDAModelLM(LLaDAConfig(vocab_size=vocab_size, **DENSE, **IDS))
    else:
        model = LLaDAMoEModelLM(LLaDAMoEConfig(vocab_size=vocab_size, **MOE, **IDS))
    model.save_pretrained(folder, max_shard_size="40MB")
    return sum(parameter.numel() * 4 for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "dtype"), [("dense", "float32"), ("dense", "bfloat16"), ("moe", "float32")])
def test_loading_shards_peaks_at_about_the_size_of_the_weights(kind: str, dtype: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "tiny", 64)
    assert save(kind, tmp_path / "large", 4096) > 290e6
    assert len(list((tmp_path / "large").glob("*.safetensors"))) >= 7
    (tmp_path / "load.py").write_text(SCRIPT, encoding="utf-8")
    peak = json.loads(run([sys.executable, "load.py", dtype], tmp_path).splitlines()[-1])
    print(peak)
    assert peak["anonymous"] < BOUND
    # weights in the dtype of the files stay where the files are mapped; others are made from all of their pages
    files = {("dense", "float32"): 0.0, ("dense", "bfloat16"): 2.0, ("moe", "float32"): 1.0}[kind, dtype]
    assert 0.9 < peak["resident"] < files + BOUND
