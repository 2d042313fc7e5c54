"""The tensor-parallel plan of the models: two processes, each with its part of the weights, give the logits and texts of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from golden import cases
from safetensors.torch import load_file, save_file
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
BIASED = "llada_dense_biased"
NAMES = (*cases.DENSE, "llada_moe", BIASED)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The stored models, and one of them with the biases on q, k and v that an adapted Qwen2 has."""
    source, folder = cases.folder("llada_dense_gqa_tied"), tmp_path_factory.mktemp("checkpoints") / BIASED
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = llada.LLaDAModelLM(llada.LLaDAConfig(**settings | {"include_qkv_bias": True})).eval()
    loaded = model.load_state_dict(load_file(source / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys
    torch.manual_seed(0)
    with torch.no_grad():
        biases = [x for name, x in model.named_parameters() if name.endswith("_proj.bias")]
        for bias in biases:
            bias.normal_()
        given = cases.forward_case(source.name)
        plain = given["logits"]
        given["logits"] = model(given["input_ids"]).logits
        padded = model(given["padded_input_ids"], attention_mask=given["attention_mask"])
        given["padded_logits"] = padded.logits
    assert len(biases) == 3 * model.config.n_layers
    assert (given["logits"] - plain).abs().max() > 1
    model.save_pretrained(folder)
    save_file({key: x.contiguous() for key, x in given.items()}, folder / "forward.safetensors")
    return {name: folder if name == BIASED else cases.folder(name) for name in NAMES}


@pytest.fixture(scope="module")
def ranks(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found for each model."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(SCRIPT, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shown = run([*launcher, "rank.py", *map(str, checkpoints.values())], folder)
    assert "Warning" not in shown, shown
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_logits_and_the_tokens_of_one(
    name: str, checkpoints: dict[str, Path], ranks: Path
) -> None:
    golden = load_file(checkpoints[name] / "forward.safetensors")
    real = golden["attention_mask"].bool()
    stored = load_file(checkpoints[name] / "model.safetensors")
    whole = sum(tensor.numel() for tensor in stored.values())
    alone = llada.load_model(str(checkpoints[name]))
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
