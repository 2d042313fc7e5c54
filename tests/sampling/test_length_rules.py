"""Blocks, lengths and early answers that the loop finds for itself, against the sampler line by line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.length_options import RULES, length_options
from reference.predictor import HashPredictor, as_network, one_row
from reference.sampler import Written, sample_row
from torch import Tensor

from dllm.sampling.config import POLICY_OPTIONS, POLICY_REMASKING, SCHEDULED, SamplingConfig
from dllm.sampling.loop import Denoised, denoise
from dllm.sampling.rows import Request, SpecialTokens
from dllm.sampling.trace import Trace

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
}


@st.composite
def configs(draw: Any, choosers: Any = None) -> SamplingConfig:
    # wino, whose shadows want a real network: see tests/engine/test_cached_lengths.py
    policy = draw(st.sampled_from([name for name in POLICY_OPTIONS if name != "wino"]))
    lengths = draw(length_options(choosers))
    takes_steps = policy in SCHEDULED and not {"block_policy", "length_policy"} & set(lengths)
    return SamplingConfig(
        **lengths,
        **{name: draw(st.sampled_from(LEVELS[name])) for name in POLICY_OPTIONS[policy]},
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


@pytest.mark.parametrize("choosers", [[name] for name in RULES] + [None], ids=str)
@settings(max_examples=6)
@given(st.data(), prompts, st.integers(0, 1000))
def test_equals_the_sampler_line_by_line(choosers: Any, data: Any, prompts: list[list[int]], network: int) -> None:
    check(prompts, data.draw(configs(choosers)), network)


@settings(max_examples=6)
@given(prompts, configs(), st.randoms())
def test_a_row_has_its_tokens_alone_in_any_batch_and_in_any_order(
    prompts: list[list[int]], config: SamplingConfig, random: Any
) -> None:
    predict, numbers = HashPredictor(V, 2), random.sample(range(100), len(prompts))
    whole = run(predict, prompts, config, numbers)
    order = random.sample(range(len(prompts)), random.randint(1, len(prompts)))
    part = run(predict, [prompts[row] for row in order], config, [numbers[row] for row in order])
    assert lists(part.canvases) == [whole.canvases[row].tolist() for row in order]
    assert part.steps == [whole.steps[row] for row in order]


@settings(max_examples=6)
@given(prompts, configs(["length_policy"]))
def test_a_trace_can_be_told_in_positions_of_the_last_canvas(prompts: list[list[int]], config: SamplingConfig) -> None:
    trace = run(HashPredictor(V, 3), prompts, config, trace=True).trace
    assert trace is not None
    stretched = trace.stretched()
    for row in range(len(prompts)):
        frames, last = list(stretched.frames(row)), list(trace.frames(row))[-1]
        assert torch.equal(frames[-1], last)
        assert {len(frame) for frame in frames} == {len(last)}
        assert torch.equal(stretched.commit_steps(row), trace.commit_steps(row))
    again = Trace.from_json(json.loads(json.dumps(trace.to_json())))
    assert [list(map(Tensor.tolist, again.frames(0)))] == [list(map(Tensor.tolist, trace.frames(0)))]


def said(logits: Callable[[int, int], list[list[float]]]) -> Any:
    """A network whose logits depend on the row's length and on how many masks it has."""

    def predict(ids_RL: Tensor, attention_mask_RL: Tensor | None, wanted_RL: Tensor) -> Tensor:
        found = [logits(len(row), int((row == MASK).sum())) for row in ids_RL]
        return torch.tensor([found[row][position] for row, position in wanted_RL.nonzero().tolist()])

    return predict


def one_hot(token: int, logit: float = 9.0) -> list[float]:
    return [logit if i == token else 0.0 for i in range(V)]


def test_an_answer_grows_until_its_end_is_sure_and_no_further_than_gen_length() -> None:
    text, end = one_hot(1), one_hot(EOS)
    config = SamplingConfig(length_policy="daedal", gen_length=9, initial_length=2, expansion_factor=3, eos_window=2)
    predict = said(lambda length, _: [text, text, *[end] * (length - 2)] if length > 2 else [text] * 2)
    done = run(predict, [[]], config, trace=True)
    assert done.trace is not None
    assert [len(event.token) for event in done.trace.events][:2] == [0, 1]  # the pass that is sure commits too
    assert done.canvases[0].tolist() == [1, 1, EOS, EOS, EOS]
    unsure = said(lambda length, _: [text] * length)
    assert len(run(unsure, [[]], config).canvases[0]) == 9


def test_an_unsure_mask_becomes_several() -> None:
    flat, text = [0.0] * V, one_hot(1)
    config = SamplingConfig(
        length_policy="daedal",
        gen_length=6,
        initial_length=3,
        expansion_factor=3,
        eos_threshold=0.0,
        expand_threshold=0.5,
    )
    predict = said(lambda length, masks: [text, flat, text] if masks == length else [text] * length)
    done = run(predict, [[]], config, trace=True)
    assert done.trace is not None
    frames = lists(list(done.trace.frames(0)))
    assert frames[1] == [1, MASK, MASK, MASK, MASK]  # committed the first; the second became three
    assert frames[-1] == [1] * 5
    assert done.trace.events[0].grown_position.tolist() == [1]


def test_a_block_ends_where_a_line_does() -> None:
    config = SamplingConfig(
        block_policy="adablock", block_length=2, gen_length=8, delimiter_window=0.5, early_stop=False
    )
    line = [one_hot(1), one_hot(1), one_hot(BREAK), *[one_hot(1)] * 5]
    done = run(said(lambda length, _: line), [[]], config, trace=True)
    assert done.trace is not None
    sizes = {
        tuple(sorted(done.trace.commit_steps(0)[block].tolist())) for block in (slice(0, 3), slice(3, 5), slice(5, 7))
    }
    assert sizes == {(0, 1, 2), (3, 4), (5, 6)}


def test_an_answer_that_is_known_is_committed_at_once() -> None:
    sure, unsure = one_hot(1, 9.0), one_hot(1, 6.0)
    config = SamplingConfig(early_answer="prophet", block_length=2, gen_length=6, early_stop=False)
    done = run(said(lambda length, _: [sure] * length), [[]], config)
    assert (done.steps, done.nfe) == ([1], 1)
    done = run(said(lambda length, _: [unsure] * length), [[]], config)
    assert (done.steps, done.nfe) == ([3], 3)  # 6 logits are enough once a third of the masks is committed
