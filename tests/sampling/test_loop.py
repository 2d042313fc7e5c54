"""The denoising loop against the sampler line by line, and what must not matter to it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from reference.predictor import FlatPredictor, HashPredictor, as_network, one_row
from reference.sampler import Written, sample_row, shares
from torch import Tensor

from dllm.errors import OptionError
from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig
from dllm.pipelines.llada.models.modeling_llada import LLaDAModelLM
from dllm.sampling.config import SamplingConfig
from dllm.sampling.loop import Denoised, denoise
from dllm.sampling.rows import Request, SpecialTokens

V, MASK, EOS, EOT = 10, 9, 8, 7
FP32 = 3e-7
"""Two probabilities that are nearer than this may have either order where they are computed in fp32."""
whole = partial(SamplingConfig, early_stop=False)
"""Settings with which every mask is filled."""
ids = {"mask_token_id": MASK, "eos_token_ids": [EOS], "end_token_ids": [EOS, EOT]}
TOKENS = SpecialTokens(MASK, (EOS,), (EOS, EOT))
seeds = st.integers(-(1 << 63), (1 << 63) - 1)

tokens = st.integers(0, V - 1)
infillings = st.lists(tokens | st.just(MASK) | st.just(MASK), max_size=12)
prompts = st.builds(lambda prompt, tail: prompt + [MASK] * tail, st.lists(tokens, max_size=6), st.integers(0, 9))
canvases = st.lists(infillings | prompts, min_size=1, max_size=4)


def config_of(**options: Any) -> SamplingConfig:
    return SamplingConfig(**options if options["cfg_scale"] else {**options, "cfg_keep_tokens": ()})


configs = st.builds(
    config_of,
    steps=st.none() | st.integers(1, 14),
    block_length=st.none() | st.integers(1, 6),
    temperature=st.sampled_from([0.0, 0.0, 0.6, 2.0]),
    remasking=st.sampled_from(["low_confidence", "low_confidence", "random"]),
    cfg_scale=st.sampled_from([0.0, 0.0, 0.5, 2.5]),
    cfg_keep_tokens=st.sampled_from([(), (1, 2), (0, EOS)]),
    suppress_eos=st.booleans(),
    eos_last=st.booleans(),
    seed=seeds,
    early_stop=st.just(False),
)


def blocks_of(rows: list[list[int]], config: SamplingConfig) -> int:
    """The largest number of blocks among the rows."""
    masks = [row.count(MASK) for row in rows]
    return max(-(-count // config.block_length) if config.block_length else 1 for count in masks)


def enough_steps(rows: list[list[int]], config: SamplingConfig) -> SamplingConfig:
    if config.steps is None:
        return config
    return dataclasses.replace(config, steps=max(config.steps, blocks_of(rows, config)))


def run(
    predict: Any,
    rows: list[list[int]],
    config: SamplingConfig,
    masked: list[Tensor] | None = None,
    requests: list[int] | None = None,
    **options: Any,
) -> Denoised:
    network = as_network(predict, 2 if config.cfg_scale > 0 else 1)
    canvases = [torch.tensor(row, dtype=torch.int64) for row in rows]
    masked = [canvas == MASK for canvas in canvases] if masked is None else masked
    numbers = range(len(rows)) if requests is None else requests
    asked = [Request(*row[:2], config, row[2]) for row in zip(canvases, masked, numbers, strict=True)]
    done = denoise(network, asked, config, TOKENS, **options)
    assert all(canvas.dtype == torch.int64 and canvas.dim() == 1 for canvas in done.canvases)
    return done


def slowly(predict: Any, rows: list[list[int]], config: SamplingConfig, requests: list[int]) -> list[Written]:
    return [
        sample_row(one_row(predict), row, config, **ids, request=request)
        for row, request in zip(rows, requests, strict=True)
    ]


def lists(canvases: list[Tensor]) -> list[list[int]]:
    return [canvas.tolist() for canvas in canvases]


runs = given(canvases, configs, st.integers(0, 1000), st.lists(seeds, min_size=4, max_size=4))


@settings(max_examples=70)
@runs
@example([[1] + [MASK] * 9], whole(cfg_scale=2.5), 1, [0])  # at first 4e-7 between the surest two, of large logits
def test_equals_the_sampler_line_by_line(
    rows: list[list[int]], config: SamplingConfig, network: int, requests: list[int]
) -> None:
    assert_equals_the_sampler(rows, config, network, requests)


def test_the_example_of_large_logits_is_not_passed_over() -> None:
    rows, config = [[1] + [MASK] * 9], whole(cfg_scale=2.5)
    (written,) = slowly(HashPredictor(V, 1), rows, config, [0])
    assert FP32 < written.closest < 1e-6


@pytest.mark.slow
@settings(max_examples=400)
@runs
def test_equals_the_sampler_line_by_line_in_many_cases(
    rows: list[list[int]], config: SamplingConfig, network: int, requests: list[int]
) -> None:
    assert_equals_the_sampler(rows, config, network, requests)


def assert_equals_the_sampler(rows: list[list[int]], config: SamplingConfig, network: int, requests: list[int]) -> None:
    config = enough_steps(rows, config)
    requests = requests[: len(rows)]
    predict = HashPredictor(V, network)
    done = run(predict, rows, config, requests=requests, trace=True)
    expected = slowly(predict, rows, config, requests)
    assume(all(row.closest > FP32 for row in expected))
    assert lists(done.canvases) == [row.ids for row in expected]
    assert done.steps == [row.steps for row in expected]
    assert done.nfe == max(row.forwards for row in expected)
    assert done.trace is not None
    for row, written in enumerate(expected):
        for step, commits in enumerate(written.commits):
            event = done.trace.events[step]
            here = event.row == row
            assert event.step == step
            assert event.position[here].tolist() == [position for position, _, _ in commits]
            assert event.token[here].tolist() == [token for _, token, _ in commits]
            assert event.confidence[here].tolist() == pytest.approx([sure for _, _, sure in commits], rel=1e-5)
        assert not any((event.row == row).any() for event in done.trace.events[written.steps :])


@settings(max_examples=60)
@given(canvases, configs)
def test_ties_go_to_the_left_as_in_the_slow_one(rows: list[list[int]], config: SamplingConfig) -> None:
    config = enough_steps(rows, dataclasses.replace(config, cfg_scale=0.0, cfg_keep_tokens=()))
    done = run(FlatPredictor(V), rows, config)
    assert lists(done.canvases) == [row.ids for row in slowly(FlatPredictor(V), rows, config, list(range(len(rows))))]


@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(tokens, st.booleans()), max_size=10), min_size=1, max_size=3), configs)
def test_masks_by_place_leave_a_given_mask_token_alone(
    rows: list[list[tuple[int, bool]]], config: SamplingConfig
) -> None:
    given_rows = [[token for token, _ in row] for row in rows]
    places = [[write for _, write in row] for row in rows]
    config = enough_steps([[MASK if write else 0 for write in row] for row in places], config)
    predict = HashPredictor(V, 5)
    done = run(predict, given_rows, config, masked=[torch.tensor(row, dtype=torch.bool) for row in places])
    for row, canvas in enumerate(lists(done.canvases)):
        expected = sample_row(one_row(predict), given_rows[row], config, **ids, masked=places[row], request=row)
        assume(expected.closest > FP32)
        assert canvas == expected.ids
        assert [t for t, write in zip(canvas, places[row], strict=True) if not write] == [
            t for t, write in rows[row] if not write
        ]


@settings(max_examples=40)
@given(canvases, configs, st.randoms())
def test_a_row_has_its_tokens_alone_in_any_batch_and_in_any_order(
    rows: list[list[int]], config: SamplingConfig, random: Any
) -> None:
    config = enough_steps(rows, config)
    predict = HashPredictor(V, 2)
    requests = random.sample(range(100), len(rows))
    whole = run(predict, rows, config, requests=requests)
    order = random.sample(range(len(rows)), random.randint(1, len(rows)))
    part = run(predict, [rows[row] for row in order], config, requests=[requests[row] for row in order])
    assert lists(part.canvases) == [whole.canvases[row].tolist() for row in order]
    assert part.steps == [whole.steps[row] for row in order]
    for row in range(len(rows)):
        alone = run(predict, [rows[row]], config, requests=[requests[row]])
        assert alone.canvases[0].tolist() == whole.canvases[row].tolist()


@settings(max_examples=60)
@given(canvases, configs)
def test_given_tokens_never_change_and_the_trace_replays_to_the_result(
    rows: list[list[int]], config: SamplingConfig
) -> None:
    config = enough_steps(rows, config)
    seen: list[Any] = []
    done = run(HashPredictor(V, 3), rows, config, trace=True, on_step=seen.append)
    assert done.trace is not None
    assert [event.step for event in seen] == list(range(max(done.steps)))
    assert all(one is other for one, other in zip(seen, done.trace.events, strict=True))
    for row, start in enumerate(rows):
        frames = lists(list(done.trace.frames(row)))
        assert frames[0] == start
        assert frames[-1] == done.canvases[row].tolist()
        when = done.trace.commit_steps(row).tolist()
        for token, final, step in zip(start, frames[-1], when, strict=True):
            assert final == token if token != MASK else (step >= 0) == (final != MASK)


@settings(max_examples=80)
@given(canvases, configs)
def test_no_forward_is_spent_on_a_row_that_is_finished(rows: list[list[int]], config: SamplingConfig) -> None:
    config = enough_steps(rows, config)
    predict = HashPredictor(V, 4)
    done = run(predict, rows, config)
    guided = 2 if config.cfg_scale > 0 else 1
    assert done.nfe == guided * max(done.steps) == guided * len(predict.shown)
    for step, (shown, attention_mask, wanted) in enumerate(predict.shown):
        running = [row for row, steps in enumerate(done.steps) if steps > step]
        lengths = [len(rows[row]) for row in running]
        assert shown.shape == wanted.shape == (guided * len(running), max(lengths))
        assert (shown[: len(running)][wanted[: len(running)]] == MASK).all()
        assert wanted.any(1).all()
        assert torch.equal(wanted[: len(running)], wanted[-len(running) :])
        if len(set(lengths)) == 1:
            assert attention_mask is None
        else:
            assert attention_mask is not None
            assert sorted(attention_mask.sum(1).tolist()) == sorted(lengths * guided)
            assert (attention_mask.long().diff(dim=1) <= 0).all()
        if config.block_length:
            assert (wanted.sum(1) <= config.block_length).all()


@given(st.integers(0, 12), st.integers(1, 20), st.integers(1, 6))
def test_steps_are_shared_over_blocks_and_masks_over_steps(masks: int, steps: int, block_length: int) -> None:
    blocks = [min(block_length, masks - start) for start in range(0, masks, block_length)]
    steps = max(steps, len(blocks))
    predict = HashPredictor(V - 1)  # it cannot propose the mask
    done = run(predict, [[1] + [MASK] * masks], whole(steps=steps, block_length=block_length), trace=True)
    assert done.trace is not None
    expected = []
    for size, share in zip(blocks, shares(steps, len(blocks)) if blocks else [], strict=True):
        expected += [count for count in shares(size, share) if count]
    assert [len(event.token) for event in done.trace.events] == expected
    assert done.nfe == len(expected) == min(masks, done.nfe)
    # from left to right, block by block
    when = [step for step in done.trace.commit_steps(0).tolist() if step >= 0]
    for start in range(block_length, masks, block_length):
        assert max(when[:start]) < min(when[start:])


def test_a_longer_row_without_masks_is_not_in_the_way() -> None:
    predict = HashPredictor(V - 1)
    done = run(predict, [[1, MASK, MASK], [2] * 9, [MASK]], whole())
    assert done.canvases[1].tolist() == [2] * 9
    assert lists(done.canvases)[0] == lists(run(predict, [[1, MASK, MASK]], whole()).canvases)[0]
    assert [shown.shape[1] for shown, _, _ in predict.shown[:2]] == [3, 3]


def test_by_default_every_token_has_a_step() -> None:
    for block_length in (None, 1, 3):
        done = run(HashPredictor(V - 1), [[1] + [MASK] * 7], whole(block_length=block_length))
        assert (done.nfe, done.steps) == (7, [7])


@pytest.mark.parametrize("cfg_keep_tokens", [(), (3,)])
def test_the_unconditional_branch_sees_no_given_token_but_those_that_are_kept(cfg_keep_tokens: tuple[int, ...]) -> None:
    predict = HashPredictor(V - 1)
    rows = [[3, 1, MASK, MASK, 2], [3, MASK]]
    run(predict, rows, whole(cfg_scale=1.0, cfg_keep_tokens=cfg_keep_tokens))
    kept = 3 if cfg_keep_tokens else MASK
    conditional, unconditional = predict.shown[0][0].chunk(2)
    assert conditional[0].tolist() == rows[0]
    assert unconditional[0].tolist() == [kept, MASK, MASK, MASK, MASK]
    assert unconditional[1, :2].tolist() == [kept, MASK]
    conditional, unconditional = predict.shown[1][0].chunk(2)
    written = (conditional != torch.tensor(rows[0])) & (conditional != MASK)
    assert written.sum() == 1
    assert torch.equal(unconditional[written], conditional[written])


def test_suppressed_end_tokens_are_never_written_and_late_ones_come_last() -> None:
    rows = [[1] + [MASK] * 40]
    for network in range(5):
        predict = HashPredictor(V - 1, network)
        free = run(predict, rows, whole(temperature=1.0)).canvases[0]
        assert (free == EOS).any()
        assert not (run(predict, rows, whole(temperature=1.0, suppress_eos=True)).canvases[0] == EOS).any()
        first = run(predict, rows, whole(steps=2, eos_last=True), trace=True)
        assert first.trace is not None
        ends = [int(((event.token == EOS) | (event.token == EOT)).sum()) for event in first.trace.events]
        assert ends[0] == 0


def test_fewer_steps_than_blocks_is_an_error_that_says_what_to_do() -> None:
    message = (
        r"steps=2 is fewer than the 3 blocks of block_length=4: every block needs a step. "
        r"Raise steps to 3 or more, or raise block_length."
    )
    predict = HashPredictor(V)
    with pytest.raises(OptionError, match=message):
        run(predict, [[1, MASK], [MASK] * 9], whole(steps=2, block_length=4))
    assert not predict.shown
    run(predict, [[1, MASK], [MASK] * 9], whole(steps=3, block_length=4))


def test_nothing_to_do_costs_no_forward() -> None:
    for rows in ([], [[1, 2]], [[]], [[], [1]]):
        predict = HashPredictor(V)
        done = run(predict, rows, whole(steps=3, block_length=2), trace=True)
        assert (lists(done.canvases), done.nfe, done.steps) == (rows, 0, [0] * len(rows))
        assert not predict.shown
        assert done.trace is not None
        assert done.trace.events == []
    assert run(HashPredictor(V), [[1]], whole()).trace is None


def test_what_comes_back_can_be_changed_and_trained_on() -> None:
    start = torch.tensor([1, MASK, MASK])
    request = Request(start, start == MASK, whole(), 0)
    done = denoise(as_network(HashPredictor(V)), [request], whole(), TOKENS, trace=True)
    assert start.tolist() == [1, MASK, MASK]
    table = torch.nn.Embedding(V, 2)
    table(done.canvases[0]).sum().backward()
    assert table.weight.grad is not None
    done.canvases[0][0] = 5
    assert done.trace is not None
    assert done.trace.start[0].tolist() == [1, MASK, MASK]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_length": 4, "steps": 5},
        {"cfg_scale": 1.5, "cfg_keep_tokens": (1,)},
        {"temperature": 0.8, "remasking": "random", "suppress_eos": True, "seed": 3},
        {"temperature": 0.4, "eos_last": True, "cfg_scale": 0.5, "steps": 6},
    ],
)
def test_a_real_network_equals_the_slow_sampler_too(options: dict[str, Any]) -> None:
    """Rows of all lengths in one batch against each by itself: padding is hidden from a real attention."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = dict(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, vocab_size=V, init_std=0.3)
        special = dict(mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS)
        # in fp64 what a batch's shape does to rounding decides nothing
        model = LLaDAModelLM(LLaDAConfig(**shape, **special, max_sequence_length=64)).double().eval()

    def predict(ids_RL: Tensor, attention_mask_RL: Tensor | None, wanted_RL: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids_RL, attention_mask=attention_mask_RL, logits_to_keep=wanted_RL).logits.float()

    rows = [
        [1, 2, 3] + [MASK] * 9,
        [4] + [MASK] * 5,
        [MASK] * 7,
        [0, MASK, 2, MASK, MASK, 5, 6, MASK, 1, 1, 1, 1, 1, 2],
    ]
    config = whole(**options)
    done = run(predict, rows, config)
    expected = slowly(predict, rows, config, [0, 1, 2, 3])
    assert lists(done.canvases) == [row.ids for row in expected]
    assert len({token for row in lists(done.canvases) for token in row}) > 4


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.0, "steps": 6}, {"temperature": 0.8, "remasking": "random"}])
def test_a_gpu_writes_the_same_tokens(options: dict[str, Any]) -> None:
    rows = [[1, 2] + [MASK] * 20, [MASK] * 9, [3, MASK, 4, MASK, MASK]]
    config = whole(block_length=5, **options)
    done = run(HashPredictor(V, 6), rows, config, device="cuda", trace=True)
    assert lists(done.canvases) == lists(run(HashPredictor(V, 6), rows, config).canvases)
    assert all(canvas.device.type == "cpu" for canvas in done.canvases)
