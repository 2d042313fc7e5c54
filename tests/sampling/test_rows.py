"""The state of rows: what it starts as, how rows join and leave, and the fixed schedule of each."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.sampler import shares

from dllm.errors import OptionError
from dllm.sampling.config import SamplingConfig
from dllm.sampling.rows import Request, Rows, check_steps, rows_of, scheduled, size_of

MASK = 9
PLAIN = SamplingConfig()
tokens = st.integers(0, 8)
canvases = st.lists(tokens | st.just(MASK) | st.just(MASK), min_size=1, max_size=9)


def request(canvas: list[int], config: SamplingConfig = PLAIN, number: int = 0) -> Request:
    ids = torch.tensor(canvas, dtype=torch.int64)
    return Request(ids, ids == MASK, config, number)


def own(rows: Rows, row: int) -> dict[str, object]:
    """A row's state without its padding."""
    sizes = {"RL": int(rows.length_R[row]), "RM": int(rows.places_R[row])}
    return {
        name: value[row].tolist() if name.endswith("_R") else value[row, : sizes[name[-2:]]].tolist()
        for name, value in vars(rows).items()
    }


@settings(max_examples=30)
@given(st.lists(canvases, min_size=1, max_size=4), st.integers(1, 5))
def test_a_row_starts_with_its_canvas_its_places_and_its_first_block(rows: list[list[int]], block_length: int) -> None:
    config = SamplingConfig(block_length=block_length, cfg_scale=1.0, cfg_keep_tokens=(3,))
    state = rows_of([request(row, config) for row in rows], MASK)
    assert len(state) == len(rows)
    for r, row in enumerate(rows):
        places = [i for i, token in enumerate(row) if token == MASK]
        found = own(state, r)
        assert found["ids_RL"] == row
        assert found["open_RL"] == [token == MASK for token in row]
        assert found["given_RL"] == [token not in (MASK, 3) for token in row]
        assert found["place_RM"] == places
        assert (found["start_R"], found["end_R"]) == (0, min(block_length, len(places)))
        assert state.real_RL[r].tolist() == [i < len(row) for i in range(state.ids_RL.shape[1])]
        assert bool(state.done_R[r]) == (not places)
        assert size_of(request(row, config)) == (
            len(row),
            max(1, len(places)),
            min(block_length, max(1, len(places))),
            0,
        )


@settings(max_examples=30)
@given(st.lists(canvases, min_size=2, max_size=5), st.data())
def test_joining_and_leaving_changes_no_row(rows: list[list[int]], data: st.DataObject) -> None:
    asked = [request(row, SamplingConfig(seed=number), number) for number, row in enumerate(rows)]
    cut = data.draw(st.integers(1, len(rows) - 1))
    joined = rows_of(asked[:cut], MASK).joined(rows_of(asked[cut:], MASK))
    alone = [own(rows_of([one], MASK), 0) for one in asked]
    assert [own(joined, row) for row in range(len(rows))] == alone
    stay = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    sizes = [size_of(asked[row]) for row in stay]
    kept = joined.kept(torch.tensor(stay), max(size.length for size in sizes), max(size.places for size in sizes))
    assert [own(kept, i) for i in range(len(stay))] == [alone[row] for row in stay]
    assert kept.ids_RL.shape[1] == max(len(rows[row]) for row in stay)  # what only the others needed is gone


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5), st.none() | st.integers(1, 15)), min_size=1, max_size=4)
)
def test_the_schedule_of_each_row_is_its_own(shapes: list[tuple[int, int, int | None]]) -> None:
    """Counts of one step after the other, and which of them are their block's last."""
    asked, expected = [], []
    for masks, width, steps in shapes:
        blocks = [min(width, masks - start) for start in range(0, masks, width)]
        steps = None if steps is None else max(steps, len(blocks))
        asked.append(request([MASK] * masks, SamplingConfig(block_length=width, steps=steps)))
        each = blocks if steps is None else shares(steps, len(blocks))
        counts = [[n for n in shares(size, share) if n] for size, share in zip(blocks, each, strict=True)]
        expected.append([(n, i == len(block) - 1) for block in counts for i, n in enumerate(block)])
    rows = rows_of(asked, MASK)
    found: list[list[tuple[int, bool]]] = [[] for _ in shapes]
    while not bool(rows.done_R.all()):
        count_R, last_R = scheduled(rows)
        for row in range(len(rows)):
            if not bool(rows.done_R[row]):
                found[row].append((int(count_R[row]), bool(last_R[row])))
        next_R = last_R & ~rows.done_R
        rows.block_step_R = torch.where(next_R, 0, rows.block_step_R + 1)
        rows.block_R = rows.block_R + next_R
        rows.start_R = torch.where(next_R, rows.end_R, rows.start_R)
        rows.end_R = torch.where(next_R, torch.minimum(rows.end_R + rows.width_R, rows.places_R), rows.end_R)
    assert found == expected


def test_numbers_of_any_size_key_the_noise() -> None:
    asked = [request([MASK], SamplingConfig(seed=seed), number) for seed, number in ((2**64 + 5, -(2**70)), (5, 0))]
    rows = rows_of(asked, MASK)
    assert rows.seed_R.tolist() == [5, 5]
    assert rows.request_R.tolist() == [0, 0]
    assert rows_of([request([MASK], PLAIN, 2**63)], MASK).request_R.tolist() == [-(2**63)]


def test_a_row_without_masks_needs_no_place() -> None:
    rows = rows_of([request([1, 2])], MASK)
    assert rows.done_R.tolist() == [True]
    assert rows.place_RM.shape == (1, 1)


def test_fewer_steps_than_blocks_is_an_error_that_says_how_many_it_takes() -> None:
    with pytest.raises(OptionError, match=re.escape("steps=2 is fewer than the 3 blocks of block_length=2")):
        check_steps(request([MASK] * 5, SamplingConfig(steps=2, block_length=2)))
    check_steps(request([MASK] * 5, SamplingConfig(steps=3, block_length=2)))
    check_steps(request([1], SamplingConfig(steps=1, block_length=2)))
