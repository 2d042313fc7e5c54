"""The grammar of `--dataset_args`: which data, and how many rows of each split.

Grammar, and two examples:

    args   = source { " + " source }
    source = name [ "[" limit { "," limit } "]" ]
    limit  = ("train" | "test") ":" count          10000, 10_000

    allenai/tulu-3-sft-mixture[train:10000,test:1000]
    builtin:sudoku9[train:200_000] + data/own.jsonl[test:50]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dllm.errors import DataError, did_you_mean

SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of rows."""

    name: str
    """A file or folder, `builtin:NAME`, or the id of a data set on the hub."""
    train: int | None = None
    """Rows for training; None for all."""
    test: int | None = None
    """Rows for evaluation; None for all of a test split, and for none where the source has only one split."""


def parse_dataset_args(text: str) -> list[SourceSpec]:
    """Reads `--dataset_args`.

    Raises:
        DataError: the text does not follow the grammar; the message shows what does.
    """
    sources = [_parse_source(part.strip()) for part in re.split(r"(?<!\S)\+(?!\S)", text)]
    return sources


def _parse_source(text: str) -> SourceSpec:
    example = "write it as  name[train:10000,test:1000]"
    match = re.fullmatch(r"(?P<name>[^\[\]]+?)\s*(\[(?P<limits>[^\[\]]*)\])?", text)
    if match is None:
        raise DataError(f"dataset_args {text!r} cannot be read: {example}.")
    limits: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in (match["limits"] or "").split(","))):
        split, colon, count = (piece.strip() for piece in part.partition(":"))
        if split not in SPLITS:
            raise DataError(f"dataset_args {text!r}: there is no split {split!r}.{did_you_mean(split, SPLITS)}")
        if not colon or not re.fullmatch(r"[0-9]+(_[0-9]+)*", count):
            raise DataError(f"dataset_args {text!r}: {part!r} gives no whole number of rows: {example}.")
        if split in limits:
            raise DataError(f"dataset_args {text!r}: {split} is given twice.")
        limits[split] = int(count)
    if limits.get("train") == 0:
        raise DataError(f"dataset_args {text!r} asks for no row to train on: raise train:0.")
    return SourceSpec(name=match["name"], train=limits.get("train"), test=limits.get("test"))
