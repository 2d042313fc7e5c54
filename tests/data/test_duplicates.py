"""Rows of two splits that are the same: found by their letters alone, once, and kept."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from dllm.data import duplicates
from dllm.data.duplicates import digest, digests, fingerprint, shared_rows


def rows(values: list[Any], column: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: values})


def slow(train: list[Any], *tests: list[Any]) -> list[int]:
    return [number for number, value in enumerate(train) if any(value in test for test in tests)]


@pytest.mark.parametrize("batch", [1, 3, 10_000])
def test_shared_rows_are_those_that_a_search_finds(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(duplicates, "BATCH", batch)
    train = [f"{n % 7} of {batch}" for n in range(20)]
    tests = [[f"3 of {batch}", "never"], [f"{n} of {batch}" for n in (0, 6, 6)]]
    found = shared_rows(rows(train), digests(rows(test) for test in tests))
    assert found.tolist() == slow(train, *tests) == [0, 3, 6, 7, 10, 13, 14, 17]


def test_conversations_are_compared_message_by_message() -> None:
    said = {"role": "user", "content": "é\ud800"}
    assert digest([said]) == digest([dict(reversed(said.items()))])
    assert digest([said]) != digest([{**said, "role": "assistant"}])
    assert digest("a") != digest("A")


def test_they_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held = rows(["looked", "for", "once"]), digests([rows(["once"])])
    assert shared_rows(train, held).tolist() == [2]
    monkeypatch.setattr(duplicates, "digest", None)  # what a second search would call
    assert shared_rows(rows(["looked", "for", "once"]), held).tolist() == [2]
    monkeypatch.undo()
    assert shared_rows(train, digests([rows(["for"])])).tolist() == [1]
    assert shared_rows(train, frozenset()).tolist() == []


def test_a_fingerprint_is_of_the_rows_in_whatever_order() -> None:
    one, other = digests([rows(["a", "b"])]), digests([rows(["b"]), rows(["a"])])
    assert fingerprint(one) == fingerprint(other) != fingerprint(digests([rows(["a"])]))
