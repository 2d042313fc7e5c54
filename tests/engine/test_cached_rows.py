"""A pass over some positions of many rows against one row, one position and one dict at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from golden import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.caches import CachedModel, Kept
from torch import Tensor
from transformers import PreTrainedModel

from dllm.engine.buffers import KeyValues
from dllm.engine.cached_rows import MOST_GROUPS, CachedRows, query_groups
from dllm.pipelines import llada
from dllm.sampling.rows import compacted

MODELS = (*cases.DENSE, "llada_moe")
every_model = pytest.mark.parametrize("name", MODELS)
BOUND = 1e-10
"""In fp64; the states' size is about 1."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def loaded(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    options = {"experts_implementation": "eager"} if "moe" in name else {}
    model = llada.load_model(cases.folder(name), dtype=dtype, **options)
    model.config.mask_token_id = 250
    return model


@cache
def naive(name: str) -> CachedModel:
    return CachedModel(loaded(name))


def states(model: PreTrainedModel, plan: CachedRows, ids: list[Tensor]) -> Tensor:
    """[T, D] of the pass."""
    ids_T = torch.stack([ids[row][position] for row, position in zip(plan.row_T, plan.position_T, strict=True)])
    output = model.model(input_ids=ids_T[None], attention_mask=plan, position_ids=plan.position_T[None])
    return output.last_hidden_state[0]


def mask_of(computed: list[list[int]], lengths: list[int]) -> Tensor:
    compute_RL = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, positions in enumerate(computed):
        compute_RL[row, positions] = True
    return compute_RL


@st.composite
def subsets(draw: Any, length: int) -> list[int]:
    """Nothing, one, a run, or any."""
    kind = draw(st.sampled_from(["none", "run", "run", "any", "all"]))
    if kind == "any":
        return sorted(draw(st.sets(st.integers(0, length - 1))))
    start, end = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    return {"none": [], "run": list(range(start, end)), "all": list(range(length))}[kind]


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(st.data(), st.lists(st.integers(1, 13), min_size=1, max_size=5), st.integers(0, 1000))
def test_equals_a_dict_of_positions(name: str, data: st.DataObject, lengths: list[int], seed: int) -> None:
    """Over several passes whose tokens change, through rows that leave and places that get new ones."""
    model, kept = loaded(name), KeyValues.of(loaded(name))
    generator = torch.Generator().manual_seed(seed)
    dicts: list[Kept] = [{} for _ in lengths]

    def run(computed: list[list[int]]) -> None:
        ids = [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in lengths]
        plan = CachedRows.from_mask(kept, mask_of(computed, lengths), lengths)
        found = iter(states(model, plan, ids))
        for row, positions in enumerate(computed):
            if positions:
                for state in naive(name).states(ids[row].tolist(), positions, dicts[row]):
                    torch.testing.assert_close(next(found), state, rtol=0, atol=BOUND)
        assert next(found, None) is None

    def some() -> list[list[int]]:
        computed = [data.draw(subsets(length)) for length in lengths]
        return computed if any(computed) else [list(range(length)) for length in lengths]

    run([list(range(length)) for length in lengths])
    for _ in range(2):
        run(some())
    stay = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    if any(stay):
        leaving = [row for row, goes_on in enumerate(stay) if not goes_on]
        in_order = [row for row, goes_on in enumerate(stay) if goes_on]
        index = compacted(len(stay), leaving) if data.draw(st.booleans()) else in_order
        lengths[:] = [lengths[row] for row in index]
        dicts[:] = [dicts[row] for row in index]
        kept.keep(index, max(lengths))
        run(some())
    newcomer = data.draw(st.integers(1, 16))  # may be longer than all before
    lengths.append(newcomer)
    dicts.append({})
    run([*some()[:-1], list(range(newcomer))])
    run(some())


@every_model
def test_everything_computed_is_the_model_itself(name: str) -> None:
    model, lengths = loaded(name), [7, 3, 11]
    ids = [torch.randint(model.config.vocab_size, (length,)) for length in lengths]
    plan = CachedRows.from_mask(KeyValues.of(model), mask_of([list(range(n)) for n in lengths], lengths), lengths)
    found = states(model, plan, ids).split(lengths)
    for row, states_LD in zip(ids, found, strict=True):
        alone = model.model(input_ids=row[None]).last_hidden_state[0]
        torch.testing.assert_close(states_LD, alone, rtol=0, atol=BOUND)


@every_model
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_other_dtypes_are_near(name: str, dtype: torch.dtype, bound: float) -> None:
    """Their own rounding apart: the states' size is about 1."""
    model, lengths, computed = loaded(name, dtype), [9, 6], [[2, 3, 4], [0, 5]]
    kept, ids = KeyValues.of(model), [torch.arange(length) for length in lengths]
    exact, dicts = naive(name).states, ({}, {})
    for step, positions in enumerate(([list(range(n)) for n in lengths], computed)):
        ids = [row + step for row in ids]
        plan = CachedRows.from_mask(kept, mask_of(positions, lengths), lengths)
        found = states(model, plan, ids)
        assert found.dtype == kept.key[0].dtype == dtype
        expected = [exact(row.tolist(), places, seen) for row, places, seen in zip(ids, positions, dicts, strict=True)]
        difference = (found.double() - torch.cat(expected)).pow(2).mean().sqrt()
        assert difference < bound
        assert difference > 0


def test_one_kind_of_row_copies_neither_queries_nor_keys() -> None:
    model, lengths = loaded(MODELS[0]), [8, 8, 8]
    plan = CachedRows.from_mask(KeyValues.of(model), mask_of([[0, 1], [4, 5], [2, 7]], lengths), lengths)
    (group,) = plan.groups
    assert group.rows == slice(0, 3)
    assert (group.token_rQ, group.seen_r1qL, plan.back_T) == (None, None, None)


def test_refreshing_rows_and_block_rows_are_two_products() -> None:
    model, lengths = loaded(MODELS[0]), [8, 9, 8, 8]
    computed = [[0, 1], list(range(9)), [3, 4], [2]]
    plan = CachedRows.from_mask(KeyValues.of(model), mask_of(computed, lengths), lengths)
    whole, blocks = plan.groups
    assert (whole.rows, whole.queries, whole.length, whole.seen_r1qL) == (slice(1, 2), 9, 9, None)
    assert isinstance(blocks.rows, Tensor)
    assert blocks.rows.tolist() == [0, 2, 3]
    assert (blocks.queries, blocks.length, blocks.seen_r1qL) == (2, 8, None)


@given(st.lists(st.integers(0, 40), max_size=12))
def test_groups_hold_rows_of_like_counts(counts: list[int]) -> None:
    groups = query_groups(counts)
    assert sorted(row for group in groups for row in group) == [row for row, count in enumerate(counts) if count]
    assert len(groups) <= MOST_GROUPS
    for group in groups:
        assert group == sorted(group)
    for group in groups[: MOST_GROUPS - 1]:
        assert 2 * min(counts[row] for row in group) >= max(counts[row] for row in group)
    longest = [max(counts[row] for row in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


@every_model
def test_tokens_that_nobody_else_sees_lie_behind_the_row(name: str) -> None:
    """A shadow sees its row with itself in one place, and leaves no trace in what others see."""
    model, lengths, kept = loaded(name), [5, 8, 6], KeyValues.of(loaded(name))
    L, shadows = max(lengths), [[1, 3], [], [0, 2, 5]]
    ids, dicts = [torch.arange(length) for length in lengths], ({}, {}, {})
    for computed in ([list(range(length)) for length in lengths], [[1, 2, 3], list(range(8)), [0]]):
        rows = [(row, place, place) for row, places in enumerate(computed) for place in places]
        rows += [(row, L + i, place) for row, places in enumerate(shadows) for i, place in enumerate(places)]
        row_T, slot_T, position_T = torch.tensor(sorted(rows)).unbind(1)
        visible_TL = torch.zeros(len(rows), L + 3, dtype=torch.bool)
        for t, (row, slot, place) in enumerate(sorted(rows)):
            visible_TL[t, : lengths[row]] = True
            if slot >= L:
                visible_TL[t, place], visible_TL[t, slot] = False, True
        counts = [len(computed[row]) + len(shadows[row]) for row in range(3)]
        plan = CachedRows(kept, row_T, slot_T, counts, [L + 3] * 3, visible_TL)
        ids_T = torch.tensor([250 if slot >= L else int(ids[row][place]) for row, slot, place in sorted(rows)])
        output = model.model(input_ids=ids_T[None], attention_mask=plan, position_ids=position_T[None])
        found = output.last_hidden_state[0].split(counts)
        for row, state_PD in enumerate(found):
            expected = naive(name).states(ids[row].tolist(), computed[row], dicts[row], shadows[row])
            torch.testing.assert_close(state_PD, expected, rtol=0, atol=BOUND)


def test_autocast_writes_in_the_dtype_of_the_buffers() -> None:
    model, lengths, computed = loaded(MODELS[1], torch.float32), [9, 6], [[2, 3, 4], [0, 5]]
    kept, ids = KeyValues.of(model), [torch.arange(length) for length in lengths]
    found = []
    for enabled in (False, True):
        for positions in ([list(range(length)) for length in lengths], computed):
            plan = CachedRows.from_mask(kept, mask_of(positions, lengths), lengths)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                last = states(model, plan, ids)
        found.append(last.float())
    assert 0 < (found[1] - found[0]).pow(2).mean().sqrt() < 0.06
