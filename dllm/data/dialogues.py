"""Short polite conversations behind `builtin:dialogues`, from sentences that were written for dllm (`assets/dialogues.txt`).

Small talk is taken as it stands; a thing or a doing, with the two sentences about it, is asked for in several ways. All
conversations about one subject lie in one split.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from dllm.data.shipped import check_split, read, text_hash

TEST_ONE_IN = 16
"""One subject in this many, on average, is in the test split."""

Turns = tuple[str, ...]
"""Question, answer, and so on."""

_ASSET = "dialogues.txt"
_MORE = ("Tell me more.", "Can you tell me more?", "Interesting! What else?", "What else?")


def dialogues(split: str) -> list[Turns]:
    """Returns the conversations of one split, in an order that mixes their subjects.

    Args:
        split: `train` or `test`.

    Raises:
        DataError: the split is unknown.
    """
    check_split("dialogues", split)
    return [turns for _, turns, is_test in _all_dialogues() if is_test == (split == "test")]


@functools.cache
def _all_dialogues() -> tuple[tuple[str, Turns, bool], ...]:
    """(subject, conversation, whether it is a test conversation) of all."""
    rows = sorted(_conversations(read(_ASSET)), key=lambda row: text_hash(" ".join(row[1])))
    return tuple((subject, turns, text_hash(subject) % TEST_ONE_IN == 0) for subject, turns in rows)


def _conversations(text: str) -> Iterator[tuple[str, Turns]]:
    """Yields (subject, conversation); the number of a section, parted by headings, says what its lines are."""
    section = 0
    for line in text.splitlines():
        if line.startswith("#"):
            section += 1
        elif line:
            subject, *sentences = (part.strip() for part in line.split(" | "))
            for turns in (_said, _thing, _doing)[section - 1](subject, *sentences):
                yield subject, turns


def _said(question: str, answer: str) -> list[Turns]:
    return [(question, answer)]


def _thing(thing: str, first: str, more: str) -> list[Turns]:
    return [
        (f"Tell me something about {thing}.", first, _more(thing), more),
        (f"What do you know about {thing}?", f"{first} {more}"),
        (f"Write one sentence about {thing}.", first),
        (f"Explain {thing} to me.", f"{first} {more}", "Thank you!", "You are welcome!"),
    ]


def _doing(doing: str, first: str, more: str) -> list[Turns]:
    return [
        (f"How do I {doing}?", first, _more(doing), more),
        (
            f"I want to {doing}. Where should I begin?",
            f"Good idea! {first}",
            "Thank you!",
            "You are welcome. Good luck!",
        ),
        (f"Give me one tip: how can I {doing}?", first),
        (f"What helps me to {doing}?", f"{first} {more}"),
    ]


def _more(subject: str) -> str:
    return _MORE[text_hash(subject) % len(_MORE)]
