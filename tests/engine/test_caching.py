"""Sampling through caches against the sampler line by line, whose keys and values lie in dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.caches import CachedModel
from reference.sampler import Written, sample_row
from torch import Tensor
from transformers import PreTrainedModel

from dllm.engine.caches import CACHES
from dllm.engine.caching import caching
from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModelLM
from dllm.pipelines.llada.generate import network_of
from dllm.sampling.batch import Batch
from dllm.sampling.config import CACHE_OPTIONS, POLICY_OPTIONS, POLICY_REMASKING, SCHEDULED, SamplingConfig
from dllm.sampling.loop import Denoised, denoise
from dllm.sampling.network import Pass
from dllm.sampling.packing import Shadows, pack_with_shadow
from dllm.sampling.rows import Request, SpecialTokens, rows_of

V, MASK, EOS = 24, 23, 22
MODELS = ("dense", "moe")
every_model = pytest.mark.parametrize("name", MODELS)
TOKENS = SpecialTokens(MASK, (EOS,), (EOS,))
tokens = st.integers(0, V - 2)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def loaded(name: str) -> PreTrainedModel:
    """Random weights with several query heads to a key head, in fp64: there, no two ways of adding up choose two tokens."""
    torch.manual_seed(1)
    shared: dict[str, Any] = dict(vocab_size=V, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS)
    if name == "dense":
        sizes = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=48, max_sequence_length=64)
        model = LLaDAModelLM(LLaDAConfig(**shared, **sizes, embedding_size=V))
    else:
        model = LLaDAMoEModelLM(
            LLaDAMoEConfig(
                **shared,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_experts=4,
                num_experts_per_tok=2,
                expert_intermediate_size=24,
                dense_intermediate_size=48,
                max_position_embeddings=64,
                experts_implementation="eager",
            )
        )
    for parameter in model.parameters():  # larger than at the start of training: what is kept must matter
        if parameter.dim() > 1:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.get_output_embeddings().weight[MASK] = 0  # seldom the likeliest
    return model.double().eval()


@cache
def naive(name: str) -> CachedModel:
    return CachedModel(loaded(name))


@st.composite
def canvases(draw: Any) -> list[int]:
    if draw(st.booleans()):
        return draw(st.lists(tokens, max_size=6)) + [MASK] * draw(st.integers(0, 8))
    return draw(st.lists(tokens | st.just(MASK), max_size=12))


@st.composite
def configs(draw: Any, caches: Any = tuple(CACHES), policies: Any = tuple(POLICY_OPTIONS)) -> SamplingConfig:
    policy, kept = draw(st.sampled_from(policies)), draw(st.sampled_from(caches))
    options: dict[str, Any] = {}
    for name in POLICY_OPTIONS[policy]:  # random weights are seldom as sure as the defaults ask
        levels = {
            "threshold": [0.3, 0.6],
            "low_threshold": [0.1, 0.3],
            "verify_threshold": [0.2, 0.9],
            "factor": [2.0, 4.0],
            "gamma": [2.0, 8.0],
            "kl_threshold": [0.01, 0.5],
            "kl_steps": [1, 2],
            "eta": [0.3, 0.6],
        }
        options[name] = draw(st.sampled_from(levels[name]))
    for name in CACHE_OPTIONS[kept]:
        options[name] = draw(st.none() | st.integers(1, 4))
    return SamplingConfig(
        policy=policy,
        cache=kept,
        block_length=draw(st.none() | st.integers(1, 5)),
        steps=draw(st.none() | st.integers(12, 14)) if policy in SCHEDULED else None,
        remasking=draw(st.sampled_from(POLICY_REMASKING[policy])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.8])),
        cfg_scale=draw(st.sampled_from([0.0, 0.0, 1.5])),
        suppress_eos=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        early_stop=False,
        **options,
    )


def asked(rows: list[list[int]], config: SamplingConfig, numbers: list[int]) -> list[Request]:
    canvases_ = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return [Request(row, row == MASK, config, number) for row, number in zip(canvases_, numbers, strict=True)]


def run(
    name: str,
    rows: list[list[int]],
    config: SamplingConfig,
    *,
    numbers: list[int] | None = None,
    passes: list[int] | None = None,
) -> Denoised:
    """`passes` is told how many tokens each pass has."""
    network = network_of(loaded(name))

    def counted(work: Pass, readout: Any) -> Any:
        if passes is not None:
            passes.append(len(work.ids_T))
        return network(work, readout)

    requests = asked(rows, config, list(range(len(rows))) if numbers is None else numbers)
    return denoise(counted, requests, config, TOKENS, reuse=caching(config, loaded(name)))


def slowly(name: str, rows: list[list[int]], config: SamplingConfig) -> list[Written]:
    special: dict[str, Any] = {"mask_token_id": MASK, "eos_token_ids": [EOS], "end_token_ids": [EOS]}
    return [
        sample_row(None, row, config, **special, request=request, cached=naive(name))
        for request, row in enumerate(rows)
    ]


def lists(found: list[Tensor]) -> list[list[int]]:
    return [canvas.tolist() for canvas in found]


@every_model
@settings(max_examples=8)
@given(st.lists(canvases(), min_size=1, max_size=3), configs())
def test_equals_the_sampler_with_a_dict_of_positions(name: str, rows: list[list[int]], config: SamplingConfig) -> None:
    done, expected = run(name, rows, config), slowly(name, rows, config)
    assert lists(done.canvases) == [row.ids for row in expected]
    assert done.steps == [row.steps for row in expected]
    assert done.nfe == max(row.forwards for row in expected)


@every_model
@settings(max_examples=12)
@given(st.lists(canvases(), min_size=1, max_size=2), configs(policies=["wino", "remdm"]))
def test_equals_it_where_tokens_are_taken_back(name: str, rows: list[list[int]], config: SamplingConfig) -> None:
    done, expected = run(name, rows, config), slowly(name, rows, config)
    assert lists(done.canvases) == [row.ids for row in expected]
    assert done.steps == [row.steps for row in expected]


@every_model
@pytest.mark.parametrize("kept", ["none", "dual"])
def test_a_shadow_does_not_see_the_token_that_it_verifies(name: str, kept: Any) -> None:
    """Thresholds at which tokens are taken back, so that it matters what the shadow sees."""
    taken_back = 0
    rows = [[3, 1] + [MASK] * 10, [MASK] * 5 + [7, 8] + [MASK] * 6, [5] * 4 + [MASK] * 12]
    for accept, verify in ((0.2, 0.4), (0.3, 0.1), (0.3, 0.7), (0.4, 0.4), (0.4, 0.7)):
        config = SamplingConfig(policy="wino", threshold=accept, verify_threshold=verify, cache=kept, early_stop=False)
        done, expected = run(name, rows, config), slowly(name, rows, config)
        assert lists(done.canvases) == [row.ids for row in expected]
        assert done.steps == [row.steps for row in expected]
        taken_back += sum(sum(map(len, row.commits)) - ids.count(MASK) for row, ids in zip(expected, rows, strict=True))
    assert taken_back > 5


@every_model
@settings(max_examples=6)
@given(st.lists(canvases(), min_size=1, max_size=3), configs(["prefix", "dual", "vicinity", "delayed"]))
def test_refreshed_at_every_step_is_exact(name: str, rows: list[list[int]], config: SamplingConfig) -> None:
    everything = dataclasses.replace(config, cache="none", vicinity=None, cache_refresh=None)
    refreshed = dataclasses.replace(config, cache_refresh=1)
    found, expected = run(name, rows, refreshed), run(name, rows, everything)
    assert lists(found.canvases) == lists(expected.canvases)
    assert (found.steps, found.nfe) == (expected.steps, expected.nfe)
    reuse = caching(refreshed, loaded(name))
    assert reuse is not None
    assert reuse.exact


@every_model
@pytest.mark.parametrize("kept", ["prefix", "dual", "vicinity", "delayed"])
def test_a_row_has_its_tokens_alone_and_in_any_company(name: str, kept: Any) -> None:
    rows = [[3, 1, 4] + [MASK] * 9, [MASK] * 5 + [7, 8], [9] * 12 + [MASK] * 4, [MASK, 2] * 4]
    config = SamplingConfig(
        cache=kept, block_length=4, policy="threshold", threshold=0.1, cfg_scale=0.5, temperature=0.7, early_stop=False
    )
    together = run(name, rows, config, numbers=[0, 1, 2, 3])
    backwards = run(name, rows[::-1], config, numbers=[3, 2, 1, 0])
    assert lists(together.canvases) == lists(backwards.canvases)[::-1]
    for row, request in zip(rows, range(4), strict=True):
        alone = run(name, [row], config, numbers=[request])
        assert alone.canvases[0].tolist() == together.canvases[request].tolist()
        assert alone.steps == [together.steps[request]]


@every_model
@settings(max_examples=8)
@given(
    st.lists(st.tuples(canvases().filter(lambda row: MASK in row), st.integers(0, 6)), min_size=2, max_size=4),
    configs(["prefix", "dual", "vicinity", "delayed"]),
)
def test_rows_join_and_leave_at_any_time(name: str, rows: list[tuple[list[int], int]], config: SamplingConfig) -> None:
    """Each with its block at another step: places in the buffers are given away, moved, and grow."""
    batch = Batch(network_of(loaded(name)), config, TOKENS, "cpu", reuse=caching(config, loaded(name)))
    waiting = sorted(range(len(rows)), key=lambda row: rows[row][1])
    found: dict[Any, Tensor] = {}
    step = 0
    while waiting or len(batch):
        while waiting and rows[waiting[0]][1] <= step:
            row = waiting.pop(0)
            batch.add(asked([rows[row][0]], config, [row]), [row])
        if len(batch):
            batch.step()
            found |= {row.name: row.canvas for row in batch.take_finished()}
        step += 1
    for row, (canvas, _) in enumerate(rows):
        assert found[row].tolist() == run(name, [canvas], config, numbers=[row]).canvases[0].tolist()


@every_model
@pytest.mark.parametrize("waits", [True, False])
def test_what_a_shadow_says_is_the_slow_ones(name: str, waits: bool) -> None:
    """Of every committed place, the first of the row among them."""
    ids, places = torch.tensor([[3, 5, MASK, 7]]), torch.arange(4)
    rows = rows_of(asked([[MASK] * 4], SamplingConfig(policy="wino"), [0]), MASK)
    rows.ids_RL, rows.open_RL = ids, ids == MASK
    shadows = Shadows(places[None], ids != MASK, torch.where(ids[0] == MASK, -1, places))
    options: dict[str, Any] = dict(branches=1, mask=MASK, reuse=None, waits=waits)
    work = pack_with_shadow(rows, torch.zeros_like(places), places, shadows, None, **options)
    found = loaded(name)(
        work.ids_T[None], position_ids=work.position_T[None], attention_mask=work.plan, logits_to_keep=work.wanted_M
    )
    read, verified = naive(name)(ids[0].tolist(), places.tolist(), {}, [0, 1, 3])
    expected = torch.tensor([verified[0], verified[1], read[2], verified[3]])
    torch.testing.assert_close(found.logits[0].float(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [12] * 8),
        ({"cache": "prefix"}, [12, 8, 8, 8, 12, 4, 4, 4]),
        ({"cache": "dual"}, [12, 4, 4, 4, 12, 4, 4, 4]),
        ({"cache": "dual", "cache_refresh": 2}, [12, 4, 12, 4, 12, 4, 12, 4]),
        ({"cache": "vicinity", "vicinity": 2}, [12, 8, 8, 8, 12, 6, 6, 6]),
        ({"cache": "delayed"}, [12, 8, 7, 6, 12, 4, 3, 2]),
        ({"cache": "delayed", "cache_refresh": 3}, [12, 8, 7, 12, 12, 4, 3, 12]),
        # committed places, of which each has one more query for its shadow, are read in their places
        ({"cache": "dual", "policy": "wino", "threshold": 1.0}, [12, 5, 6, 7, 12, 5, 6, 7]),
        ({"cache": "dual", "cfg_scale": 1.0}, [24, 8, 8, 8, 24, 8, 8, 8]),
    ],
)
def test_a_pass_holds_what_the_rule_computes_and_no_more(options: dict[str, Any], expected: list[int]) -> None:
    """A prompt of four, two blocks of four, one token a step; delayed: the masks that are left, and the last token."""
    config = SamplingConfig(block_length=4, early_stop=False, **options)
    passes: list[int] = []
    done = run(MODELS[0], [[5, 6, 7, 8] + [MASK] * 8], config, passes=passes)
    assert passes == expected
    assert done.steps == [8]


def test_buffers_are_allocated_once() -> None:
    config = SamplingConfig(cache="dual", block_length=3, early_stop=False)
    reuse = caching(config, loaded(MODELS[0]))
    assert reuse is not None
    seen: set[tuple[int, ...]] = set()
    network = network_of(loaded(MODELS[0]))

    def noting(work: Pass, readout: Any) -> Any:
        seen.add(tuple(tensor.data_ptr() for tensor in (*reuse.buffers.key, *reuse.buffers.value)))
        return network(work, readout)

    rows = [[1] * 3 + [MASK] * 6, [MASK] * 2, [2] * 5 + [MASK] * 7]
    denoise(noting, asked(rows, config, [0, 1, 2]), config, TOKENS, reuse=reuse)
    assert len(seen) == 1
    assert (reuse.buffers.rows, reuse.buffers.length) == (3, 12)


@every_model
@pytest.mark.parametrize("policy", ["fixed", "wino"])
@pytest.mark.parametrize("kept", ["prefix", "dual", "delayed"])
def test_a_host_that_does_not_wait_gets_the_same_tokens(name: str, policy: str, kept: str) -> None:
    config = SamplingConfig(policy=policy, cache=kept, block_length=3, early_stop=False)
    rows = [[1, 2, MASK, MASK, 3, MASK], [MASK] * 4, [5, MASK]]

    def canvases(waits: bool) -> dict[Any, list[int]]:
        model = loaded(name)
        batch = Batch(network_of(model), config, TOKENS, "cpu", reuse=caching(config, model), waits=waits)
        batch.add(asked(rows, config, [0, 1, 2]), names=[0, 1, 2])
        done: dict[Any, list[int]] = {}
        while len(batch):  # rows stay for some steps after they are done, the last ones alone
            batch.step()
            done |= {one.name: one.canvas.tolist() for one in batch.take_finished()}
        return done

    assert canvases(waits=False) == canvases(waits=True)
