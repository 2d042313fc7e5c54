"""The registry of built-in data sets, and the text that comes with the package."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys

import pytest

from dllm.data.builtin import BUILTIN, builtin_rows, find_builtin
from dllm.data.sudoku import DEFAULT_CLUES, is_solution
from dllm.data.text import chapters
from dllm.errors import DataError, OptionError

EVERY = [(name, column) for name, dataset in BUILTIN.items() for column in dataset.columns]


@pytest.mark.parametrize(("name", "column"), EVERY)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_column_has_the_rows_it_promises(name: str, column: str, split: str) -> None:
    rows = builtin_rows(name, split, 20, column=column)
    assert len(rows) == 20
    keys = {"text": ["text"], "messages": ["messages"], "puzzle": ["puzzle", "solution"]}[column]
    assert all(list(row) == keys for row in rows)
    assert rows[:7] == builtin_rows(name, split, 7, column=column)
    assert builtin_rows(name, split, 0, column=column) == []


@pytest.mark.parametrize("size", [6, 9])
def test_sudoku_columns_tell_the_same_puzzles(size: int) -> None:
    name = f"sudoku{size}"
    solved = [row["text"] for row in builtin_rows(name, "train", 10, column="text")]
    chats = [row["messages"] for row in builtin_rows(name, "train", 10, column="messages")]
    pairs = builtin_rows(name, "train", 10, column="puzzle")
    for grid, (user, assistant), pair in zip(solved, chats, pairs, strict=True):
        assert user == {"role": "user", "content": pair["puzzle"]}
        assert assistant == {"role": "assistant", "content": pair["solution"]}
        assert grid == pair["solution"]
        assert is_solution(pair["puzzle"], grid)
        assert DEFAULT_CLUES[size][0] <= len(grid) - pair["puzzle"].count(".") <= DEFAULT_CLUES[size][1]


def test_addition_columns_tell_the_same_sums() -> None:
    texts = builtin_rows("addition", "test", 10, column="text")
    for text, chat in zip(texts, builtin_rows("addition", "test", 10, column="messages"), strict=True):
        user, assistant = chat["messages"]
        assert text["text"] == user["content"] + assistant["content"]


@pytest.mark.parametrize(("name", "column"), [("sudoku9", "text"), ("sudoku6", "text"), ("addition", "messages")])
def test_the_default_number_of_rows_is_the_documented_one(name: str, column: str) -> None:
    for split in ("train", "test"):
        assert len(builtin_rows(name, split, None, column=column)) == BUILTIN[name].default_rows[column][split]


def test_every_data_set_describes_itself() -> None:
    for name, dataset in BUILTIN.items():
        assert dataset.name == name
        assert dataset.description
        assert "\n" not in dataset.description
        assert dataset.licence
        assert set(dataset.default_rows) == set(dataset.columns)


def test_refusals_say_what_is_there() -> None:
    with pytest.raises(DataError, match=r"no built-in data set 'sudoko9'. Did you mean 'sudoku9'"):
        find_builtin("sudoko9")
    with pytest.raises(DataError, match="It can be one of: addition, dialogues, sudoku6, sudoku9, text, wordnet"):
        builtin_rows("qqq", "train", 1, column="text")
    message = "builtin:text has no column 'messages': it has 'text'. The column 'messages' is in builtin:sudoku9, "
    with pytest.raises(DataError, match=re.escape(message)):
        builtin_rows("text", "train", 1, column="messages")
    with pytest.raises(
        DataError, match=r"it has 'text', 'messages'. The column 'puzzle' is in builtin:sudoku9, builtin:s"
    ):
        builtin_rows("addition", "train", 1, column="puzzle")
    with pytest.raises(DataError, match=r"it has 'text', 'messages', 'puzzle'.$"):
        builtin_rows("sudoku6", "train", 1, column="labels")
    with pytest.raises(DataError, match="builtin:addition has no split 'valid'"):
        builtin_rows("addition", "valid", 1, column="text")
    with pytest.raises(DataError, match="builtin:text has 70 rows in its test split, and 71 were asked for"):
        builtin_rows("text", "test", 71, column="text")
    with pytest.raises(OptionError, match="n is -1"):
        builtin_rows("text", "test", -1, column="text")
    with pytest.raises(DataError, match=r"text has no split 'trian'. Did you mean 'train'"):
        chapters("trian")


def test_importing_the_registry_is_cheap() -> None:
    code = (
        "import sys, dllm.data.builtin; print([m for m in ('numpy', 'torch', 'datasets', 'lzma') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- text ---


def test_text_is_about_five_megabytes_of_clean_english() -> None:
    texts = chapters("train") + chapters("test")
    whole = "\n\n".join(texts)
    assert 4_500_000 < len(whole.encode()) < 5_500_000
    assert not set("<>&{}\t\r\f\x00") & set(whole)
    assert set(whole) <= set("\n !'(),-.:;?[]’‘“”—") | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert not re.search(r" {2}| \n|\n |\n{3}| [,.;:!?]|[“‘(] ", whole)
    assert not re.search(r"[a-z][,.;:!?][A-Za-z]|[a-z][A-Z]", whole)
    assert all(text == text.strip() and len(text) > 100 for text in texts)


def test_text_splits_share_no_chapter() -> None:
    train, test = chapters("train"), chapters("test")
    assert len(set(train) | set(test)) == len(train) + len(test) == 1_360
    assert 0.04 < len(test) / 1_360 < 0.06
    assert {"train": len(train), "test": len(test)} == BUILTIN["text"].default_rows["text"]


def test_text_test_chapters_do_not_repeat_training_chapters() -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z]+", text.lower())
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    train = set().union(*map(runs, chapters("train")))
    shares = [len(own & train) / len(own) for own in map(runs, chapters("test"))]
    assert max(shares) < 0.6
    assert sum(shares) / len(shares) < 0.06


def test_text_never_changes() -> None:
    """Published results name these rows: a change here is a change of the data set."""
    digests = [hashlib.sha256("\f".join(chapters(split)).encode()).hexdigest()[:16] for split in ("train", "test")]
    assert digests == ["17889d370b62792b", "a6d8071be31e1b9f"]


def test_text_rows_are_all_chapters() -> None:
    assert [row["text"] for row in builtin_rows("text", "test", None, column="text")] == chapters("test")
    assert builtin_rows("text", "train", 1, column="text")[0]["text"].startswith("In the beginning, God created")
