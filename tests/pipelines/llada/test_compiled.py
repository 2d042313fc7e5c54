"""Compiled blocks: the same tokens, and nothing compiled anew while rows come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM

SETTINGS: list[dict[str, Any]] = [{}, {"cache": "dual", "threshold": 0.05}]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_compiled_blocks_write_the_same_tokens_and_are_compiled_once() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    special = dict(mask_token_id=59, eos_token_id=58, pad_token_id=58)
    shape = dict(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, vocab_size=60, init_std=0.4)
    model = LLaDAModelLM(LLaDAConfig(**shape, **special, max_sequence_length=64)).eval()
    prompts = [torch.arange(1, 1 + length) for length in (3, 7, 12)]

    def write(prompts: list[torch.Tensor]) -> list[list[int]]:
        options = dict(gen_length=12, block_length=4, early_stop=False)
        results = [llada.generate(model, None, prompts, **options, **settings) for settings in SETTINGS]
        return [row.tolist() for result in results for row in result.sequences]

    plain = write(prompts)
    assert llada.compile_blocks(model) is model
    counters.clear()
    assert write(prompts) == plain
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 8  # not one a block, a length or a step
    assert write(prompts) == plain
    write([prompts[1], prompts[0][:2]])
    assert counters["stats"]["unique_graphs"] <= graphs + 1
