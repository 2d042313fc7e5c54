"""`builtin:dialogues`: what is made of its sentences, and the split."""

from __future__ import annotations

import hashlib

import pytest

from dllm.data.builtin import BUILTIN, builtin_rows
from dllm.data.dialogues import _all_dialogues, _conversations, dialogues
from dllm.errors import DataError

EVERY = [turns for _, turns, _ in _all_dialogues()]


def test_every_question_has_its_answer_and_is_asked_once() -> None:
    assert {len(turns) for turns in EVERY} == {2, 4}
    assert len({turns[0] for turns in EVERY}) == len(EVERY)
    for turns in EVERY:
        assert all(turn.isascii() and turn == turn.strip() and "  " not in turn for turn in turns)
        assert all(turn[-1] in ".?!" for turn in turns)
        assert all(answer[0].isupper() for answer in turns[1::2])
    for split in ("train", "test"):
        assert len(dialogues(split)) == BUILTIN["dialogues"].default_rows["messages"][split]


def test_the_splits_share_no_subject() -> None:
    train, test = ({subject for subject, _, is_test in _all_dialogues() if is_test == held} for held in (False, True))
    assert not train & test
    assert 0.03 < len(test) / len(train | test) < 0.1


def test_lines_become_conversations() -> None:
    text = "# talk\nHi! | Hello!\n\n# things\nan owl | An owl hunts. | It is soft.\n# doings\nsleep | Lie down. | Be calm.\n"
    made = dict.fromkeys(subject for subject, _ in _conversations(text))
    assert list(made) == ["Hi!", "an owl", "sleep"]
    rows = [turns for _, turns in _conversations(text)]
    assert rows[0] == ("Hi!", "Hello!")
    assert rows[1][:2] == ("Tell me something about an owl.", "An owl hunts.")
    assert rows[1][3] == "It is soft."
    assert ("What do you know about an owl?", "An owl hunts. It is soft.") in rows
    assert ("Give me one tip: how can I sleep?", "Lie down.") in rows
    assert len(rows) == 1 + 4 + 4


def test_a_second_question_goes_on() -> None:
    rows = builtin_rows("dialogues", "train", None, column="messages")
    longer = next(row["messages"] for row in rows if len(row["messages"]) == 4)
    assert [turn["role"] for turn in longer] == ["user", "assistant"] * 2


def test_they_never_change() -> None:
    """Published results name these rows: a change here is a change of the data set."""
    digests = [hashlib.sha256(str(dialogues(split)).encode()).hexdigest()[:16] for split in ("train", "test")]
    assert digests == ["1c0e41208ac52630", "17780e6dbe0d561b"]


def test_another_split_is_refused() -> None:
    with pytest.raises(DataError, match="dialogues has no split 'dev'"):
        dialogues("dev")
