"""The grammar of `--dataset_args`: which data, how many rows of each split, and in which shares they are mixed.

args   = source { ("|" | " + ") source }
source = name [ "[" key ":" value { "," key ":" value } "]" ]

train:10_000       rows to train on, at most; all by default
test:1000          rows to evaluate on
name:CONFIG        the configuration (subset) of a hub data set or of a folder that was cloned from it
split:train_sft    the split to train on, where it is not called train
test_split:NAME    the split to evaluate on, where it is not called test
revision:v1.0      branch, tag or commit of a hub data set
weight:0.3         the source's share in a mixture; all sources have one, or none has
streaming:true     read on the fly, never held whole; one such source makes the whole run stream

allenai/tulu-3-sft-mixture[train:10000,test:1000]
builtin:sudoku9[train:200_000,weight:0.9] | data/own.jsonl[weight:0.1,test:50]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dllm.errors import DataError, did_you_mean

EXAMPLE = "write it as  name[train:10000,test:1000]"
COUNTS = ("train", "test")
WORDS = {"name": "config", "split": "split", "test_split": "test_split", "revision": "revision"}
"""Keys whose value is a word, and the fields that hold it."""
KEYS = (*COUNTS, *WORDS, "weight", "streaming")


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of rows."""

    name: str
    """A file, a folder, a pattern such as data/*.jsonl, `builtin:NAME`, or the id of a data set on the hub."""
    train: int | None = None
    """Rows for training; None for all."""
    test: int | None = None
    """Rows for evaluation; None for all of a test split, and for none where the source has only one split."""
    config: str | None = None
    """Which configuration of a hub data set; None for the only one."""
    split: str | None = None
    """The split to train on; None for `train`."""
    test_split: str | None = None
    """The split to evaluate on; None for `test`, where there is one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    weight: float | None = None
    """Share in the mixture, in any unit; None where the sources are joined whole."""
    streaming: bool = False
    """Read on the fly."""


def parse_dataset_args(text: str) -> list[SourceSpec]:
    """Reads `--dataset_args`.

    Raises:
        DataError: the text does not follow the grammar; the message shows what does.
    """
    # a plus inside a name, as in c++.jsonl, joins nothing: it stands between blanks, or after a bracket
    parts = re.split(r"\||(?<!\S)\+(?!\S)|(?<=\])\s*\+", text)
    sources = [_parse_source(part.strip()) for part in parts]
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        name = sources[weighted.index(False)].name
        raise DataError(f"dataset_args {text!r}: {name} has no weight, and others have. Give all sources one, or none.")
    return sources


def _parse_source(text: str) -> SourceSpec:
    match = re.fullmatch(r"(?P<name>[^\[\]|]+?)\s*(\[(?P<items>[^\[\]]*)\])?", text)
    if match is None:
        raise DataError(f"dataset_args {text!r} cannot be read: {EXAMPLE}.")
    fields: dict[str, int | float | str | bool] = {}
    for part in filter(None, (part.strip() for part in (match["items"] or "").split(","))):
        key, colon, value = (piece.strip() for piece in part.partition(":"))
        if key not in KEYS:
            raise DataError(f"dataset_args {text!r}: there is no key {key!r}.{did_you_mean(key, KEYS)}")
        field = WORDS.get(key, key)
        if field in fields:
            raise DataError(f"dataset_args {text!r}: {key} is given twice.")
        fields[field] = _value(text, key, value if colon else "", part)
    if fields.get("train") == 0:
        raise DataError(f"dataset_args {text!r} asks for no row to train on: raise train:0.")
    return SourceSpec(name=match["name"], **fields)  # type: ignore[arg-type]


def _value(text: str, key: str, value: str, part: str) -> int | float | str | bool:
    if key in COUNTS:
        if not re.fullmatch(r"[0-9]+(_[0-9]+)*", value):
            raise DataError(f"dataset_args {text!r}: {part!r} gives no whole number of rows: {EXAMPLE}.")
        return int(value)
    if key == "weight":
        if not re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]{1,2})?", value) or not float(value) > 0:
            raise DataError(f"dataset_args {text!r}: {part!r} gives no number above 0, such as weight:0.3.")
        return float(value)
    if key == "streaming":
        if value not in ("true", "false"):
            raise DataError(f"dataset_args {text!r}: {part!r}: write streaming:true or streaming:false.")
        return value == "true"
    if not value:
        raise DataError(f"dataset_args {text!r}: {part!r} says no name: write  {key}:NAME.")
    return value
