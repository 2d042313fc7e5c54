"""A small LLaDA of random weights in fp64: there, no two ways of adding up choose two tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from reference.caches import CachedModel
from reference.sampler import Written, sample_row

from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM
from dllm.sampling.config import CACHE_OPTIONS, POLICY_OPTIONS, POLICY_REMASKING, SCHEDULED, SamplingConfig
from dllm.sampling.rows import Request, SpecialTokens

V, MASK, EOS, EOT, BAD = 24, 23, 22, 21, 20
TOKENS = SpecialTokens(MASK, (EOS,), (EOS, EOT))


@cache
def tiny_model() -> LLaDAModelLM:
    """It writes end tokens now and then, and never proposes MASK or BAD."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        ids: dict[str, Any] = dict(
            vocab_size=V, embedding_size=V, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS
        )
        sizes = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=48, max_sequence_length=64)
        model = LLaDAModelLM(LLaDAConfig(**ids, **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            head = model.get_output_embeddings().weight
            head[[MASK, BAD]] = 0
            head[[EOS, EOT]] *= 1.3
    return model.double().eval()


@cache
def damaged_model() -> LLaDAModelLM:
    """The same, but what has seen the token BAD is no number."""
    model = LLaDAModelLM(tiny_model().config).double().eval()
    model.load_state_dict(tiny_model().state_dict())
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    return model


@cache
def naive() -> CachedModel:
    return CachedModel(tiny_model())


def request_of(canvas: list[int], config: SamplingConfig, number: int = 0) -> Request:
    ids = torch.tensor(canvas, dtype=torch.int64)
    return Request(ids, ids == MASK, config, number)


def slowly(canvas: list[int], config: SamplingConfig, number: int = 0) -> Written:
    special: dict[str, Any] = {"mask_token_id": MASK, "eos_token_ids": [EOS], "end_token_ids": [EOS, EOT]}
    with torch.no_grad():
        return sample_row(None, canvas, config, **special, request=number, cached=naive())


LEVELS: dict[str, list[float]] = {  # random weights are seldom as sure as the defaults ask
    "threshold": [0.3, 0.6],
    "low_threshold": [0.1, 0.3],
    "verify_threshold": [0.2, 0.9],
    "factor": [2.0, 4.0],
    "gamma": [2.0, 8.0],
    "kl_threshold": [0.01, 0.5],
    "kl_steps": [1, 2],
    "eta": [0.3, 0.6],
}


@st.composite
def configs(draw: Any, policies: Any = tuple(POLICY_OPTIONS), caches: Any = tuple(CACHE_OPTIONS)) -> SamplingConfig:
    policy, kept = draw(st.sampled_from(policies)), draw(st.sampled_from(caches))
    options = {name: draw(st.sampled_from(LEVELS[name])) for name in POLICY_OPTIONS[policy]}
    options |= {name: draw(st.none() | st.integers(1, 4)) for name in CACHE_OPTIONS[kept]}
    return SamplingConfig(
        policy=policy,
        cache=kept,
        block_length=draw(st.none() | st.integers(1, 5)),
        steps=draw(st.none() | st.integers(12, 14)) if policy in SCHEDULED else None,
        remasking=draw(st.sampled_from(POLICY_REMASKING[policy])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.8])),
        cfg_scale=draw(st.sampled_from([0.0, 0.0, 1.5])),
        suppress_eos=draw(st.sampled_from([False, False, True])),
        early_stop=draw(st.sampled_from([True, True, False])),
        seed=draw(st.integers(0, 1000)),
        **options,
    )


tokens = st.integers(0, BAD - 1)


@st.composite
def canvases(draw: Any) -> list[int]:
    """Prompts with a tail to write, and texts with gaps; 1 to 12 masks."""
    if draw(st.booleans()):
        return draw(st.lists(tokens, max_size=6)) + [MASK] * draw(st.integers(1, 8))
    return [*draw(st.lists(tokens | st.just(MASK), max_size=11)), MASK]
