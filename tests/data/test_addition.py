"""Addition problems: right, apart, and always the same."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from dllm.data.addition import _permute, _round_keys, problems
from dllm.errors import DataError, OptionError


def operands(question: str) -> tuple[int, int]:
    left, right = question.removesuffix("=").split("+")
    return int(left), int(right)


@pytest.mark.parametrize("digits", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(split: str, digits: int) -> None:
    rows = problems(split, 300, digits=digits)
    assert len(rows) == 300
    for question, answer in rows:
        a, b = operands(question)
        assert question == f"{a}+{b}="
        assert len(str(a)) == len(str(b)) == digits
        assert int(answer) == a + b


def test_the_two_orders_of_a_sum_lie_in_one_split() -> None:
    train = {frozenset(operands(q)) for q, _ in problems("train", 100_000)}
    test = {frozenset(operands(q)) for q, _ in problems("test", 81_000)}
    assert not train & test
    both = {operands(q) for q, _ in problems("test", 70_000)}
    assert any((b, a) in both for a, b in both if a != b)


def test_one_tenth_is_test_and_nothing_is_missing() -> None:
    train = {q for q, _ in problems("train", 7_290 + 600, digits=2)}
    test = {q for q, _ in problems("test", 810 + 600, digits=2)}
    assert len(train) + len(test) == 90 * 90
    assert 0.08 < len(test) / 8100 < 0.12


def test_draws_without_replacement() -> None:
    rows = problems("train", 50_000)
    assert len(set(rows)) == 50_000


def test_prefix_stable_and_seeded() -> None:
    rows = problems("train", 20_000, seed=5)
    for n in (0, 1, 777, 16_384):
        assert problems("train", n, seed=5) == rows[:n]
    assert problems("train", 100, seed=6) != rows[:100]
    first_test = {frozenset(operands(q)) for q, _ in problems("test", 5_000, seed=6)}
    assert not first_test & {frozenset(operands(q)) for q, _ in rows}


@pytest.mark.parametrize(("split", "digest"), [("train", "a27b1ca90d292281"), ("test", "cd7cddd41e8617fb")])
def test_rows_never_change(split: str, digest: str) -> None:
    """Published results name these rows: a change here is a change of the data set."""
    assert hashlib.sha256(repr(problems(split, 64)).encode()).hexdigest().startswith(digest)


@pytest.mark.parametrize("half_bits", [1, 3, 7])
def test_the_permutation_is_one_to_one(half_bits: int) -> None:
    size = 4**half_bits
    image = _permute(np.arange(size, dtype=np.uint64), half_bits, _round_keys(3, 0, 0))
    assert sorted(image.tolist()) == list(range(size))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(DataError, match=r"addition has no split 'tran'. Did you mean 'train'"):
        problems("tran", 1)
    with pytest.raises(OptionError, match="digits is 10: operands can have 1 to 9 digits"):
        problems("train", 1, digits=10)
    with pytest.raises(OptionError, match="n is -2"):
        problems("train", -2)
