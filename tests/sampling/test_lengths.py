"""How long things are: each rule against its transcription, and what holds for all of them."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import lengths as slow
from torch import Tensor

from dllm.sampling.lengths import answer_known, block_lengths, expansion, growth

DELIMITERS = (3, 5)
seeds, widths = st.integers(0, 2**32), st.lists(st.integers(0, 9), min_size=1, max_size=4)
thresholds = st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.9, 1.0])
factors = st.integers(1, 9)


def numbers(random: Random, width: int, examples: list[float], high: float) -> list[float]:
    """Some of the examples and some between them, all of which fp32 holds."""
    drawn = [random.choice(examples) if random.random() < 0.6 else random.uniform(0, high) for _ in range(width)]
    return np.array(drawn, dtype=np.float32).tolist()


def probabilities(random: Random, width: int) -> list[float]:
    return numbers(random, width, [0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0], 1)


def table(rows: list[Any], fill: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows side by side, padded on the right to two more places than the longest has."""
    width = max(map(len, rows)) + 2
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def some(random: Random, width: int) -> list[bool]:
    return random.choices(random.choice([[True], [False], [True, False]]), k=width)


def chosen(numbers: list[float], places: list[bool]) -> list[float]:
    return [x for x, inside in zip(numbers, places, strict=True) if inside]


# --- AdaBlock


@given(seeds, widths, thresholds, st.integers(1, 12))
def test_a_block_ends_after_the_surest_delimiter(seed: int, rows: list[int], least: float, usual: int) -> None:
    random = Random(seed)
    tokens = [random.choices(range(7), k=width) for width in rows]
    confidence = [probabilities(random, width) for width in rows]
    window = [random.randint(0, 11) for _ in rows]
    options = {"delimiter_threshold": least, "block_length": usual}
    ahead = table([[True] * width for width in rows], False, torch.bool)
    tensors = (table(tokens, 3, torch.int64), table(confidence, 1.0), ahead, torch.tensor(window))
    found = block_lengths(*tensors, DELIMITERS, **options)
    assert found.dtype == torch.int64
    expected = [slow.block_length(*row, DELIMITERS, **options) for row in zip(tokens, confidence, window, strict=True)]
    assert found.tolist() == expected
    for row in range(len(rows)):
        assert block_lengths(*(x[row : row + 1] for x in tensors), DELIMITERS, **options).tolist() == [expected[row]]
        assert min(1, rows[row]) <= expected[row] <= rows[row]


def test_a_block_by_hand() -> None:
    tokens = torch.tensor([[0, 3, 0, 5, 0, 3, 0, 0]])
    confidence = torch.tensor([[0.9, 0.4, 0.9, 0.6, 0.9, 0.95, 0.9, 0.9]])
    ahead = torch.ones(1, 8, dtype=torch.bool)

    def length(window: int, least: float = 0.3, delimiters: tuple[int, ...] = DELIMITERS, end: int = 8) -> int:
        there = ahead & (torch.arange(8) < end)
        options = {"delimiter_threshold": least, "block_length": 7}
        return int(block_lengths(tokens, confidence, there, torch.tensor([window]), delimiters, **options))

    assert length(8) == 6
    assert length(5) == 4
    assert length(3) == 2
    assert length(3, least=0.5) == 7  # it is not sure enough
    assert length(1) == 7  # none is in the window
    assert length(8, delimiters=()) == length(8, delimiters=(6,)) == 7
    assert length(8, delimiters=(6,), end=3) == 3  # no more is ahead
    assert length(8, end=5) == 4
    assert length(8, end=0) == 0


# --- DAEDAL


@given(seeds, widths, thresholds, factors)
def test_an_answer_grows_while_its_tail_is_unsure(seed: int, rows: list[int], least: float, factor: int) -> None:
    random = Random(seed)
    eos, tail = [probabilities(random, width) for width in rows], [some(random, width) for width in rows]
    room = [random.randint(-1, 12) for _ in rows]
    options: dict[str, Any] = {"eos_threshold": least, "expansion_factor": factor}
    tensors = (table(eos, 1.0), table(tail, False, torch.bool), torch.tensor(room))
    found = growth(*tensors, **options)
    assert found.dtype == torch.int64
    expected = [slow.growth(chosen(*row), r, **options) for *row, r in zip(eos, tail, room, strict=True)]
    assert found.tolist() == expected
    for row in range(len(rows)):
        assert growth(*(x[row : row + 1] for x in tensors), **options).tolist() == [expected[row]]


@given(seeds, widths, thresholds, thresholds, factors)
def test_the_least_sure_mask_becomes_several(
    seed: int, rows: list[int], unsure: float, ended: float, factor: int
) -> None:
    random = Random(seed)
    confidence, eos = ([probabilities(random, width) for width in rows] for _ in range(2))
    open_places, tail = ([some(random, width) for width in rows] for _ in range(2))
    room = [random.randint(-1, 12) for _ in rows]
    options: dict[str, Any] = {
        "expand_threshold": unsure,
        "expand_eos_threshold": ended,
        "expansion_factor": factor,
    }
    closed = table(open_places, False, torch.bool)
    tensors = (
        table(confidence, 0.0).masked_fill(~closed, -torch.inf),
        closed,
        table(eos, 1.0),
        table(tail, False, torch.bool),
        torch.tensor(room),
    )
    found = expansion(*tensors, **options)
    for row in range(len(rows)):
        sure = {place: x for place, x in enumerate(confidence[row]) if open_places[row][place]}
        place, added = slow.expansion(sure, chosen(eos[row], tail[row]), room[row], **options)
        assert found.at_RW[row].nonzero()[:, 0].tolist() == ([] if place is None else [place])
        assert found.added_R[row] == added
        assert 0 <= added <= max(0, min(room[row], factor - 1))
        alone = expansion(*(x[row : row + 1] for x in tensors), **options)
        assert torch.equal(alone.at_RW[0], found.at_RW[row])
        assert alone.added_R[0] == added


def test_growing_by_hand() -> None:
    eos = torch.tensor([[0.9, 0.2, 0.6, 0.4]])
    tail = torch.tensor([[False, False, True, True]])  # 0.5 on the mean
    grown = [growth(eos, tail, torch.tensor([100]), eos_threshold=x, expansion_factor=8) for x in (0.5, 0.51)]
    assert [x.tolist() for x in grown] == [[0], [8]]
    assert growth(eos, tail, torch.tensor([3]), eos_threshold=0.6, expansion_factor=8).tolist() == [3]

    options: dict[str, Any] = {"expand_eos_threshold": 0.9, "expansion_factor": 8}
    confidence, is_open = torch.tensor([[0.05, 0.02, 0.02, -torch.inf]]), torch.tensor([[True, True, True, False]])
    at, added = expansion(confidence, is_open, eos, tail, torch.tensor([100]), expand_threshold=0.1, **options)
    assert (at.tolist(), added.tolist()) == ([[False, True, False, False]], [7])
    at, added = expansion(confidence, is_open, eos, tail, torch.tensor([100]), expand_threshold=0.01, **options)
    assert (at.any().item(), added.tolist()) == (False, [0])
    for ended, expanded in ((0.5, 0), (0.51, 7)):
        options = {"expand_threshold": 0.1, "expand_eos_threshold": ended, "expansion_factor": 8}
        assert expansion(confidence, is_open, eos, tail, torch.tensor([100]), **options).added_R.tolist() == [expanded]


# --- Prophet


@given(seeds, widths, st.sampled_from([(7.5, 5.0, 2.5), (7.3, 4.9, 2.1), (0.0, 0.0, 0.0)]))
def test_an_answer_is_known_once_its_gaps_are_large(
    seed: int, rows: list[int], least: tuple[float, float, float]
) -> None:
    random = Random(seed)
    examples = random.choice([[7.5], [5.0], [2.5], [*least, 0.0, 9.0]])
    gaps = [numbers(random, width, examples, random.choice([5, 10, 15])) for width in rows]
    answer = [some(random, width) for width in rows]
    progress = numbers(random, len(rows), [0.0, 1 / 3, 2 / 3, 1.0], 1)
    options = dict(zip(("early_gap", "middle_gap", "late_gap"), least, strict=True))
    tensors = (table(gaps, 99.0), table(answer, False, torch.bool), torch.tensor(progress))
    found = answer_known(*tensors, **options)
    expected = [slow.answer_known(chosen(*row), p, **options) for *row, p in zip(gaps, answer, progress, strict=True)]
    assert found.tolist() == expected
    for row in range(len(rows)):
        assert answer_known(*(x[row : row + 1] for x in tensors), **options).tolist() == [expected[row]]


@pytest.mark.parametrize(
    ("gap", "progress", "known"),
    [(7.4, 0.0, False), (7.5, 0.3, True), (5.0, 0.3, False), (5.0, 0.4, True), (2.5, 0.6, False), (2.5, 0.7, True)],
)
def test_prophet_by_hand(gap: float, progress: float, known: bool) -> None:
    gaps, answer = torch.tensor([[gap - 1, gap + 1, 99.0]]), torch.tensor([[True, True, False]])
    options = {"early_gap": 7.5, "middle_gap": 5.0, "late_gap": 2.5}
    assert answer_known(gaps, answer, torch.tensor([progress]), **options).item() is known


# --- all of them


@settings(max_examples=10)
@given(seeds)
def test_nothing_is_read_back_to_the_host(refuses_reads: Any, seed: int) -> None:
    torch.manual_seed(seed)
    x, y, flags, more_flags = torch.rand(3, 5), torch.rand(3, 5), torch.rand(3, 5) < 0.7, torch.rand(3, 5) < 0.5
    tokens, counts = torch.randint(0, 7, (3, 5)), torch.randint(0, 9, (3,))
    with refuses_reads():
        block_lengths(tokens, x, flags, counts, DELIMITERS, delimiter_threshold=0.3, block_length=4)
        growth(x, flags, counts, eos_threshold=0.5, expansion_factor=8)
        grow = {"expand_threshold": 0.5, "expand_eos_threshold": 0.9}
        expansion(x, flags, y, more_flags, counts, **grow, expansion_factor=8)
        answer_known(x, flags, counts / 9, early_gap=0.7, middle_gap=0.5, late_gap=0.2)
