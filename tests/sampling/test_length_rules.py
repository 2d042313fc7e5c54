"""Blocks, lengths and early answers that the loop finds for itself, against the sampler line by line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.predictor import HashPredictor, as_network, one_row
from reference.sampler import Written, sample_row
from torch import Tensor

from dllm.sampling.config import POLICY_OPTIONS, POLICY_REMASKING, SCHEDULED, SamplingConfig
from dllm.sampling.loop import Denoised, denoise
from dllm.sampling.rows import Request, SpecialTokens

V, MASK, EOS, EOT, BREAK = 10, 9, 8, 7, 6
TOKENS = SpecialTokens(MASK, (EOS,), (EOS, EOT), (BREAK,))
tokens = st.integers(0, V - 2)
prompts = st.lists(st.lists(tokens, max_size=6), min_size=1, max_size=4)
LEVELS: dict[str, list[Any]] = {  # random logits are seldom as sure as the defaults ask
    "threshold": [0.3, 0.6],
    "low_threshold": [0.1, 0.3],
    "verify_threshold": [0.2, 0.9],
    "factor": [2.0, 4.0],
    "gamma": [0.5, 2.0],
    "kl_threshold": [0.5, 4.0],
    "kl_steps": [1, 2],
    "eta": [0.3, 0.6],
    "delimiter_threshold": [0.05, 0.3, 0.6],
    "delimiter_window": [0.0, 0.3, 1.0],
    "initial_length": [1, 3, 8],
    "expansion_factor": [2, 3, 5],
    "eos_window": [1, 3, 40],
    "eos_threshold": [0.05, 0.15, 0.4],
    "expand_threshold": [0.2, 0.5, 1.0],
    "expand_eos_threshold": [0.2, 0.5, 1.0],
    "early_gap": [1.0, 2.0, 3.0],
    "middle_gap": [1.0, 2.0],
    "late_gap": [0.5, 1.0],
}
BLOCKS, LENGTH, EARLY = (
    {"block_policy": "adablock"},
    {"length_policy": "daedal"},
    {"early_answer": "prophet"},
)
OF: dict[str, list[str]] = {
    "adablock": ["delimiter_threshold", "delimiter_window"],
    "daedal": [
        "initial_length",
        "expansion_factor",
        "eos_window",
        "eos_threshold",
        "expand_threshold",
        "expand_eos_threshold",
    ],
    "prophet": ["early_gap", "middle_gap", "late_gap"],
}


@st.composite
def configs(draw: Any, rules: Any = None) -> SamplingConfig:
    if rules is None:
        rules = draw(st.lists(st.sampled_from([BLOCKS, LENGTH, EARLY]), min_size=1, max_size=3, unique_by=str))
    chosen = {chooser: rule for found in rules for chooser, rule in found.items()}
    # wino, whose shadows want a real network: see tests/engine/test_caching.py
    policy = draw(st.sampled_from([name for name in POLICY_OPTIONS if name != "wino"]))
    names = [*POLICY_OPTIONS[policy], *(name for rule in chosen.values() for name in OF[rule])]
    options = {name: draw(st.sampled_from(LEVELS[name])) for name in names}
    takes_steps = policy in SCHEDULED and set(chosen) == {"early_answer"}
    return SamplingConfig(
        **chosen,
        **options,
        gen_length=draw(st.integers(8, 14)),
        policy=policy,
        block_length=draw(st.none() | st.integers(1, 6)),
        steps=draw(st.none() | st.just(14)) if takes_steps else None,
        remasking=draw(st.sampled_from(POLICY_REMASKING[policy])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7])),
        cfg_scale=draw(st.sampled_from([0.0, 0.0, 0.5])),
        eos_last=draw(st.booleans()),
        early_stop=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def canvas_of(prompt: list[int], config: SamplingConfig) -> Tensor:
    length = int(config.length_options.get("initial_length", config.gen_length))
    return torch.tensor(prompt + [MASK] * length, dtype=torch.int64)


def run(
    predict: Any, prompts: list[list[int]], config: SamplingConfig, numbers: list[int] | None = None, **options: Any
) -> Denoised:
    canvases = [canvas_of(prompt, config) for prompt in prompts]
    numbers = list(range(len(prompts))) if numbers is None else numbers
    asked = [
        Request(canvas, torch.arange(len(canvas)) >= len(prompt), config, number)
        for canvas, prompt, number in zip(canvases, prompts, numbers, strict=True)
    ]
    return denoise(as_network(predict, 2 if config.cfg_scale > 0 else 1), asked, config, TOKENS, **options)


def slowly(predict: Any, prompt: list[int], config: SamplingConfig, number: int) -> Written:
    return sample_row(
        one_row(predict),
        canvas_of(prompt, config).tolist(),
        config,
        mask_token_id=MASK,
        eos_token_ids=TOKENS.eos,
        end_token_ids=TOKENS.ends,
        delimiters=TOKENS.delimiters,
        request=number,
    )


def lists(canvases: list[Tensor]) -> list[list[int]]:
    return [canvas.tolist() for canvas in canvases]


def check(prompts: list[list[int]], config: SamplingConfig, network: int) -> list[Written]:
    """Tokens, steps, forwards and what each step did."""
    predict = HashPredictor(V, network)
    done = run(predict, prompts, config, trace=True)
    expected = [slowly(predict, prompt, config, number) for number, prompt in enumerate(prompts)]
    assert lists(done.canvases) == [row.ids for row in expected]
    assert done.steps == [row.steps for row in expected]
    assert done.nfe == max(row.forwards for row in expected)
    assert done.trace is not None
    for row, written in enumerate(expected):
        for step, (commits, growth) in enumerate(zip(written.commits, written.growth, strict=True)):
            event = done.trace.events[step].of_row(row)
            new = event.token != MASK  # what was taken back is a mask again
            assert event.position[new].tolist() == [position for position, _, _ in commits]
            assert event.token[new].tolist() == [token for _, token, _ in commits]
            grown = list(zip(event.grown_position.tolist(), event.grown_count.tolist(), strict=True))
            assert grown == ([] if growth is None else [growth])
        frames = lists(list(done.trace.frames(row)))
        assert frames[0] == canvas_of(prompts[row], config).tolist()
        left_open = [token if last == MASK else last for token, last in zip(written.ids, frames[-1], strict=True)]
        assert left_open == written.ids
        assert len(done.trace.commit_steps(row)) == len(written.ids)
        assert len(written.ids) <= len(prompts[row]) + config.gen_length
    return expected


@pytest.mark.parametrize("rules", [[BLOCKS], [LENGTH], [EARLY], [BLOCKS, LENGTH, EARLY]], ids=str)
@settings(max_examples=40)
@given(st.data(), prompts, st.integers(0, 1000))
def test_equals_the_sampler_line_by_line(rules: Any, data: Any, prompts: list[list[int]], network: int) -> None:
    check(prompts, data.draw(configs(rules)), network)
