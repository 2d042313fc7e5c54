"""The tensor-parallel plan of the models: two processes, each with its part of the weights, give the logits and texts of one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from golden import cases
from safetensors.torch import load_file
from system.workshop import run

from dllm.pipelines import llada

pytestmark = pytest.mark.system

SCRIPT = """
import os
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers.distributed import DistributedConfig
from dllm.pipelines import llada

for checkpoint in sys.argv[1:]:
    model = llada.load_model(checkpoint, distributed_config=DistributedConfig(tp_plan="auto"))
    given = load_file(f"{checkpoint}/forward.safetensors")
    with torch.no_grad():
        found = {
            "logits": model(given["input_ids"]).logits,
            "padded_logits": model(given["padded_input_ids"], attention_mask=given["attention_mask"]).logits,
            "kept": model(given["input_ids"], logits_to_keep=torch.tensor([3, 0])).logits,
        }
    model.config.mask_token_id = model.config.mask_token_id or model.config.vocab_size - 1
    prompts = [given["input_ids"][0, :5], given["input_ids"][0, :9]]
    for cache in ("none", "dual"):
        written = llada.generate(model, None, prompts, gen_length=8, block_length=4, cache=cache, early_stop=False)
        found[cache] = torch.cat(written.sequences)
    held = 0
    for parameter in model.parameters():
        held += (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()
    found = {key: (x.full_tensor() if hasattr(x, "full_tensor") else x).contiguous() for key, x in found.items()}
    save_file({**found, "held": torch.tensor(held)}, f"{os.path.basename(checkpoint)}-{dist.get_rank()}.safetensors")
dist.destroy_process_group()
"""
NAMES = (*cases.DENSE, "llada_moe")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found for each model."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(SCRIPT, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shown = run([*launcher, "rank.py", *(str(cases.folder(name)) for name in NAMES)], folder)
    assert "Warning" not in shown, shown
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_logits_and_the_tokens_of_one(name: str, ranks: Path) -> None:
    golden = cases.forward_case(name)
    real = golden["attention_mask"].bool()
    stored = load_file(cases.folder(name) / "model.safetensors")
    whole = sum(tensor.numel() for tensor in stored.values())
    alone = llada.load_model(str(cases.folder(name)))
    alone.config.mask_token_id = (
        alone.config.mask_token_id or alone.config.vocab_size - 1
    )  # the mixture's tokenizer has it
    prompts = [golden["input_ids"][0, :5], golden["input_ids"][0, :9]]
    options = dict(gen_length=8, block_length=4, early_stop=False)
    written = {cache: llada.generate(alone, None, prompts, cache=cache, **options) for cache in ("none", "dual")}
    for rank in range(2):
        found = load_file(ranks / f"{name}-{rank}.safetensors")
        for key, expected in (("logits", golden["logits"]), ("kept", golden["logits"][:, [3, 0]])):
            torch.testing.assert_close(found[key], expected, rtol=0, atol=cases.TOLERANCE)
        padded = found["padded_logits"][real]
        torch.testing.assert_close(padded, golden["padded_logits"][real], rtol=0, atol=cases.TOLERANCE)
        for cache, one_process in written.items():
            assert found[cache].tolist() == torch.cat(one_process.sequences).tolist()
        # tables and norms are whole on each, of the rest each has half
        assert int(found["held"]) < 0.75 * whole
