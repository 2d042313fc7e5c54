"""Each cache rule against the rule in words of sets, one row at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.caches import positions
from torch.utils._python_dispatch import TorchDispatchMode

from dllm.engine.caches import CACHES, RowsState, chosen
from dllm.sampling.config import CACHE_OPTIONS, SamplingConfig


@dataclass
class Row:
    length: int
    block: list[int]
    open_places: set[int]
    just_committed: set[int]
    block_step: int


@st.composite
def rows(draw: Any) -> Row:
    length = draw(st.integers(1, 24))
    block = sorted(draw(st.sets(st.integers(0, length - 1), max_size=7)))
    later = draw(st.sets(st.integers(max(block, default=0), length - 1)))
    still = draw(st.sets(st.sampled_from(block))) if block else set()
    just = draw(st.sets(st.sampled_from(block))) - still if block else set()
    return Row(length, block, still | (later - set(block)), just, draw(st.integers(0, 9)))


def state(batch: list[Row]) -> RowsState:
    """With padding that would show: it points at the last position, which may be a real one."""
    R, L, W = len(batch), max(row.length for row in batch), max(1, *(len(row.block) for row in batch))
    place_RW, valid_RW = torch.full((R, W), L - 1), torch.zeros(R, W, dtype=torch.bool)
    open_RL, just_RL = torch.zeros(2, R, L, dtype=torch.bool)
    for r, row in enumerate(batch):
        place_RW[r, : len(row.block)] = torch.tensor(row.block, dtype=torch.int64)
        valid_RW[r, : len(row.block)] = True
        open_RL[r, list(row.open_places)] = True
        just_RL[r, list(row.just_committed)] = True
    step_R = torch.tensor([row.block_step for row in batch])
    length_R = torch.tensor([row.length for row in batch])
    return RowsState(step_R == 0, place_RW, valid_RW, open_RL, just_RL, step_R, length_R)


@st.composite
def configs(draw: Any) -> SamplingConfig:
    name = draw(st.sampled_from(sorted(CACHES)))
    return SamplingConfig(cache=name, **{option: draw(st.none() | st.integers(1, 5)) for option in CACHE_OPTIONS[name]})


@settings(max_examples=100)
@given(st.lists(rows(), min_size=1, max_size=4), configs())
def test_each_rule_is_its_set(batch: list[Row], config: SamplingConfig) -> None:
    compute_RL = chosen(config).compute(state(batch))
    assert compute_RL.dtype == torch.bool
    options = {option: getattr(config, option) for option in config.cache_options}
    for row, compute_L in zip(batch, compute_RL, strict=True):
        expected = positions(
            config.cache,
            length=row.length,
            block=row.block,
            open_places=row.open_places,
            just_committed=row.just_committed,
            block_step=row.block_step,
            **{option: value for option, value in options.items() if value is not None},
        )
        assert compute_L.nonzero()[:, 0].tolist() == expected


def test_the_rules_are_those_of_the_settings() -> None:
    assert set(CACHES) == set(CACHE_OPTIONS)
    for name, rule in CACHES.items():
        assert set(rule.__annotations__) - {"rows", "return"} == set(CACHE_OPTIONS[name])


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({}, True),
        ({"cache": "prefix"}, False),
        ({"cache": "dual"}, False),
        ({"cache": "dual", "cache_refresh": 2}, False),
        ({"cache": "dual", "cache_refresh": 1}, True),
        ({"cache": "vicinity", "vicinity": 1000}, False),
        ({"cache": "delayed"}, False),
        ({"cache": "delayed", "cache_refresh": 1}, True),
    ],
)
def test_says_whether_it_is_exact(options: dict[str, Any], exact: bool) -> None:
    assert chosen(SamplingConfig(**options)).exact is exact


class RefusesToWait(TorchDispatchMode):
    """Fails where an operation's result has to be known to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(CACHES))
def test_no_rule_waits_for_the_device(name: Any) -> None:
    batch = state([Row(9, [2, 3, 4], {3, 8}, {2}, 1), Row(5, [0, 1], {1}, {0}, 3)])
    with RefusesToWait():
        chosen(SamplingConfig(cache=name)).compute(batch)


def test_the_refusal_sees_a_wait() -> None:
    with RefusesToWait(), pytest.raises(AssertionError, match="nonzero"):
        torch.ones(3).nonzero()
