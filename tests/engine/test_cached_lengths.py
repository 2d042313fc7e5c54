"""Blocks, lengths and early answers that are found while sampling goes through caches, against the sampler line by line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tiny
from reference.length_options import length_options
from reference.sampler import Written, sample_row

from dllm.engine.caching import caching
from dllm.pipelines.llada.generate import network_of
from dllm.sampling.config import CACHE_OPTIONS, POLICY_OPTIONS, POLICY_REMASKING, SamplingConfig
from dllm.sampling.loop import Denoised, denoise
from dllm.sampling.rows import Request

BREAKS = (1, 4, 7)
TOKENS = tiny.TOKENS._replace(delimiters=BREAKS)
prompts = st.lists(st.lists(tiny.tokens, max_size=6), min_size=1, max_size=3)


@st.composite
def configs(draw: Any, caches: Any) -> SamplingConfig:
    policy, kept = draw(st.sampled_from([*POLICY_OPTIONS, "wino", "klass"])), draw(st.sampled_from(caches))
    return SamplingConfig(
        **draw(length_options()),
        **{name: draw(st.sampled_from(tiny.LEVELS[name])) for name in POLICY_OPTIONS[policy]},
        **{name: draw(st.none() | st.integers(1, 4)) for name in CACHE_OPTIONS[kept]},
        policy=policy,
        cache=kept,
        block_length=draw(st.none() | st.integers(1, 5)),
        remasking=draw(st.sampled_from(POLICY_REMASKING[policy])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.8])),
        cfg_scale=draw(st.sampled_from([0.0, 0.0, 1.5])),
        early_stop=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def asked(prompt: list[int], config: SamplingConfig, number: int) -> Request:
    length = int(config.length_options.get("initial_length", config.gen_length))
    canvas = torch.tensor(prompt + [tiny.MASK] * length)
    return Request(canvas, torch.arange(len(canvas)) >= len(prompt), config, number)


def run(prompts: list[list[int]], config: SamplingConfig) -> Denoised:
    model = tiny.tiny_model()
    requests = [asked(prompt, config, number) for number, prompt in enumerate(prompts)]
    return denoise(network_of(model), requests, config, TOKENS, reuse=caching(config, model))


def slowly(prompt: list[int], config: SamplingConfig, number: int) -> Written:
    request = asked(prompt, config, number)
    special: dict[str, Any] = dict(mask_token_id=tiny.MASK, eos_token_ids=TOKENS.eos, end_token_ids=TOKENS.ends)
    with torch.no_grad():
        return sample_row(
            None,
            request.canvas.tolist(),
            config,
            **special,
            masked=request.masked.tolist(),
            delimiters=BREAKS,
            request=number,
            cached=tiny.naive(),
        )


@pytest.mark.parametrize("kept", CACHE_OPTIONS)
@settings(max_examples=4)
@given(st.data(), prompts)
def test_equals_the_sampler_with_a_dict_of_positions(kept: str, data: Any, prompts: list[list[int]]) -> None:
    config = data.draw(configs([kept]))
    done = run(prompts, config)
    expected = [slowly(prompt, config, number) for number, prompt in enumerate(prompts)]
    assert [canvas.tolist() for canvas in done.canvases] == [row.ids for row in expected]
    assert done.steps == [row.steps for row in expected]
    assert done.nfe == max(row.forwards for row in expected)
