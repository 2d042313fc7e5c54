"""The data sets that come with dllm: real tasks and real text, with nothing to download.

`sudoku9`, `sudoku6` and `addition` are made on the spot, any number of rows, and their answers can be checked; `text`,
`wordnet` and `dialogues` are files in the package. Each has a `train` and a `test` split that share nothing. A row is a
dict with one of three columns:

- `text`: one string, for pretraining.
- `messages`: a chat, mostly of one question and one answer, for SFT.
- `puzzle`: the columns `puzzle` and `solution`, sudoku only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dllm.errors import DataError, OptionError, did_you_mean

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BuiltinDataset:
    """One built-in data set: what it is, and how its rows are made."""

    name: str
    description: str
    """One line for people who choose."""
    licence: str
    """Where it comes from and under which terms."""
    columns: Mapping[str, Callable[[str, int], list[Row]]] = field(repr=False)
    """For each column, what makes n rows of a split."""
    default_rows: Mapping[str, Mapping[str, int]]
    """For each column, how many rows each split has when nothing is asked."""


def builtin_rows(name: str, split: str, n: int | None, *, column: str) -> list[Row]:
    """Makes rows of a built-in data set.

    Args:
        name: `sudoku9`, `sudoku6`, `addition`, `text`, `wordnet` or `dialogues`.
        split: `train` or `test`.
        n: how many rows, the first n; None gives the default of the data set, `BUILTIN[name].default_rows`.
        column: `text`, `messages` or `puzzle`.

    Returns:
        The rows: `{"text": ...}`, `{"messages": [...]}` or `{"puzzle": ..., "solution": ...}`.

    Raises:
        DataError: no such data set, split or column, or more rows are asked for than there are.
        OptionError: n is negative.
    """
    dataset = find_builtin(name)
    if split not in ("train", "test"):
        raise DataError(f"builtin:{name} has no split {split!r}.{did_you_mean(split, ('train', 'test'))}")
    if column not in dataset.columns:
        raise DataError(
            f"builtin:{name} has no column {column!r}: it has {', '.join(map(repr, dataset.columns))}."
            f"{_elsewhere(column)}"
        )
    if n is not None and n < 0:
        raise OptionError(f"n is {n}: the number of rows has to be 0 or more")
    return dataset.columns[column](split, dataset.default_rows[column][split] if n is None else n)


def find_builtin(name: str) -> BuiltinDataset:
    """Returns the built-in data set of a name.

    Raises:
        DataError: there is none.
    """
    if name not in BUILTIN:
        raise DataError(f"there is no built-in data set {name!r}.{did_you_mean(name, BUILTIN)}")
    return BUILTIN[name]


def _elsewhere(column: str) -> str:
    having = [f"builtin:{d.name}" for d in BUILTIN.values() if column in d.columns]
    return f" The column {column!r} is in {', '.join(having)}." if having else ""


def _chat(*turns: str) -> Row:
    """A conversation of a question, its answer, and so on."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def _sudoku_puzzles(size: int, split: str, n: int) -> list[tuple[str, str]]:
    from dllm.data.sudoku import DEFAULT_CLUES, puzzles

    return puzzles(size, split, n, clues=DEFAULT_CLUES[size])


def _sudoku_text(size: int, split: str, n: int) -> list[Row]:
    from dllm.data.sudoku import solutions

    # Digits to their ASCII codes, and each row of bytes to one string.
    grids = (solutions(size, split, n) + ord("0")).view(f"S{size * size}").ravel()
    return [{"text": grid.decode("ascii")} for grid in grids.tolist()]


def _sudoku(size: int) -> BuiltinDataset:
    return BuiltinDataset(
        name=f"sudoku{size}",
        description=f"{size}x{size} sudoku with one solution each; no test grid is a rearranged training grid",
        licence="made by dllm, no rights reserved",
        columns={
            "text": lambda split, n: _sudoku_text(size, split, n),
            "messages": lambda split, n: [_chat(*pair) for pair in _sudoku_puzzles(size, split, n)],
            "puzzle": lambda split, n: [{"puzzle": p, "solution": s} for p, s in _sudoku_puzzles(size, split, n)],
        },
        default_rows={
            "text": {"train": {9: 100_000, 6: 50_000}[size], "test": 1_000},
            "messages": _PUZZLE_ROWS[size],
            "puzzle": _PUZZLE_ROWS[size],
        },
    )


def _addition(split: str, n: int) -> list[tuple[str, str]]:
    from dllm.data.addition import problems

    return problems(split, n)


def _text(split: str, n: int) -> list[Row]:
    from dllm.data.text import chapters

    return [{"text": text} for text in _first(n, chapters(split), "text", split)]


def _wordnet_text(split: str, n: int) -> list[Row]:
    from dllm.data.wordnet import entries

    return [{"text": text} for text in _first(n, entries(split), "wordnet", split)]


def _wordnet_chats(split: str, n: int) -> list[Row]:
    from dllm.data.wordnet import questions

    return [_chat(*pair) for pair in _first(n, questions(split), "wordnet", split)]


def _dialogues(split: str, n: int) -> list[Row]:
    from dllm.data.dialogues import dialogues

    return [_chat(*turns) for turns in _first(n, dialogues(split), "dialogues", split)]


def _first(n: int, rows: list[Any], name: str, split: str) -> list[Any]:
    if n > len(rows):
        raise DataError(f"builtin:{name} has {len(rows)} rows in its {split} split, and {n} were asked for")
    return rows[:n]


# Puzzles are dug one at a time, in about 2.4 ms a 9x9 and 0.6 ms a 6x6: either default takes less than a minute.
_PUZZLE_ROWS = {9: {"train": 20_000, "test": 1_000}, 6: {"train": 50_000, "test": 1_000}}

BUILTIN: dict[str, BuiltinDataset] = {
    dataset.name: dataset
    for dataset in (
        _sudoku(9),
        _sudoku(6),
        BuiltinDataset(
            name="addition",
            description="sums of two 3-digit numbers, such as 123+456=579; a+b and b+a lie in one split",
            licence="made by dllm, no rights reserved",
            columns={
                "text": lambda split, n: [{"text": question + answer} for question, answer in _addition(split, n)],
                "messages": lambda split, n: [_chat(*pair) for pair in _addition(split, n)],
            },
            default_rows={
                "text": {"train": 50_000, "test": 1_000},
                "messages": {"train": 50_000, "test": 1_000},
            },
        ),
        BuiltinDataset(
            name="text",
            description="4.8 MB of English prose and verse, a translation of the Bible, one chapter a row",
            licence="public domain, from the Debian package sword-text-web; see dllm/data/assets/README.md",
            columns={"text": _text},
            default_rows={"text": {"train": 1_290, "test": 70}},
        ),
        BuiltinDataset(
            name="wordnet",
            description="21,184 English words with 37,310 definitions and examples; a word is in one split with all its senses",
            licence="WordNet 3.0 licence (permissive), from the Debian package wordnet-base; see dllm/data/assets/README.md",
            columns={"text": _wordnet_text, "messages": _wordnet_chats},
            default_rows={
                "text": {"train": 20_150, "test": 1_034},
                "messages": {"train": 54_341, "test": 2_782},
            },
        ),
        BuiltinDataset(
            name="dialogues",
            description="short polite conversations: small talk, everyday things, how to do this and that",
            licence="written for dllm, no rights reserved",
            columns={"messages": _dialogues},
            default_rows={"messages": {"train": 737, "test": 51}},
        ),
    )
}
"""Every built-in data set by its name."""
