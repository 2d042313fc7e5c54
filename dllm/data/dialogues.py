"""The conversations behind `builtin:dialogues`: everyday questions, and the answers of a small model.

`assets/README.md` says which model and on which terms; `scripts/build_builtin_dialogues.py` asks it. All questions about one
thing lie in one split.
"""

from __future__ import annotations

import functools
import json

from dllm.data.shipped import check_split, text_hash, unpack

TEST_ONE_IN = 16
"""One subject in this many, on average, is in the test split."""

_ASSET = "dialogues.jsonl.xz"


def dialogues(split: str) -> list[list[str]]:
    """Returns the conversations of one split, each as its turns: question, answer, and so on.

    Args:
        split: `train` or `test`.

    Returns:
        Conversations in an order that mixes their subjects.

    Raises:
        DataError: the split is unknown.
    """
    check_split("dialogues", split)
    return [list(turns) for turns, is_test in _all_dialogues() if is_test == (split == "test")]


@functools.cache
def _all_dialogues() -> tuple[tuple[tuple[str, ...], bool], ...]:
    """Every conversation with whether it is a test conversation."""
    rows = [json.loads(line) for line in unpack(_ASSET).splitlines()]
    rows.sort(key=lambda row: text_hash(row[1]))
    return tuple((tuple(turns), text_hash(subject) % TEST_ONE_IN == 0) for subject, *turns in rows)
