"""Rows that are in two splits: what a model was trained on says nothing about what it has learnt."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import datasets

BATCH = 10_000
"""Rows looked at together."""


def shared_rows(train: datasets.Dataset, test: datasets.Dataset) -> int:
    """How many test rows are training rows too, to the letter.

    Args:
        train: rows of one column; they are read in batches and not held.
        test: rows of the same column.
    """
    (column,) = test.column_names
    counts: dict[bytes, int] = {}
    for batch in test.iter(BATCH):
        for value in batch[column]:
            digest = _digest(value)
            counts[digest] = counts.get(digest, 0) + 1
    shared = 0
    for batch in train.iter(BATCH):
        for value in batch[column]:
            shared += counts.pop(_digest(value), 0)
        if not counts:
            break
    return shared


def _digest(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
