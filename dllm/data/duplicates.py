"""Training rows that are test rows too: what a model was trained on says nothing about what it has learnt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np

from dllm.data.cache import cached_numbers

BATCH = 10_000
"""Rows looked at together."""
Digests = frozenset[bytes]
"""Of the test rows of a run, all sources together."""


def digest(value: Any) -> bytes:
    """16 bytes that stand for a text or a conversation, to the letter."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def digests(tests: Iterable[datasets.Dataset]) -> Digests:
    """Those of all rows; each table has one column, and is read in batches and not held."""
    return frozenset(digest(value) for rows in tests for values in _batches(rows) for value in values)


def shared_rows(train: datasets.Dataset, held: Digests) -> np.ndarray:
    """Which training rows are test rows too; found once and kept in the cache of `datasets`.

    Args:
        train: rows of one column.
        held: of the test rows.

    Returns:
        int64, the numbers of the rows in rising order.
    """
    if not held:
        return np.zeros(0, np.int64)

    def find() -> np.ndarray:
        found = [
            start * BATCH + place
            for start, values in enumerate(_batches(train))
            for place, value in enumerate(values)
            if digest(value) in held
        ]
        return np.array(found, np.int64)

    return cached_numbers(["shared rows", train._fingerprint, fingerprint(held)], find)


def fingerprint(held: Digests) -> str:
    """The same for the same rows, in whatever order."""
    return hashlib.blake2b(b"".join(sorted(held)), digest_size=16).hexdigest()


def _batches(rows: datasets.Dataset) -> Iterable[list[Any]]:
    (column,) = rows.column_names
    return (batch[column] for batch in rows.iter(BATCH))
