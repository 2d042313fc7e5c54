"""Mixtures: every source whole, in the shares that were asked for."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.data.mixture import mix, tell


def rows(name: str, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"row": [f"{name}{i}" for i in range(count)]})


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 1)), min_size=1, max_size=3))
def test_an_epoch_has_every_row_and_the_shares(sources: list[tuple[int, float]]) -> None:
    lengths, weights = zip(*sources, strict=True)
    mixed = mix([rows("abc"[i], n) for i, n in enumerate(lengths)], weights)
    seen = Counter(mixed["row"][:])
    total = max(n / w for n, w in sources) * sum(weights)
    for i, (length, weight) in enumerate(sources):
        counts = [seen[f"{'abc'[i]}{row}"] for row in range(length)]
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1, "no row is seen twice more than another of its source"
        assert sum(counts) == pytest.approx(total * weight / sum(weights), abs=1)


def test_the_longest_for_its_weight_is_seen_once() -> None:
    mixed = mix([rows("a", 90), rows("b", 5)], [0.9, 0.1])
    assert mixed["row"][:] == [*rows("a", 90)["row"], *rows("b", 5)["row"], *rows("b", 5)["row"]]


def test_what_a_mixture_is_made_of_is_said() -> None:
    said: list[str] = []
    tell(said.append, ["a.jsonl", "b"], [900, 50], [0.9, 0.1])
    assert said == ["mixture: an epoch is 1,000 rows: a.jsonl 900 (90.0%, each 1 times), b 100 (10.0%, each 2 times)"]
