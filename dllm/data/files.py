"""Local files: which ones a path names, and their rows, each with its place.

Files of lines (.jsonl, .json, .csv, .tsv, .txt, any of them with .gz) are read here, so that a fault is named with its line;
.parquet and .arrow files are Arrow tables already.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import pyarrow

from dllm.errors import DataError

LINES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
TABLES = (".parquet", ".arrow")
READABLE = (*LINES, *TABLES)
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "eval", "validation", "valid", "dev")}
"""What files of a folder are called by; the first name is the split."""
LONGEST_FIELD = 1 << 30
"""Bytes of a field in a CSV file; Python's own limit is 128 KiB."""

Row = dict[str, Any]


def ending(path: Path) -> str:
    """A file's kind, such as `.jsonl`, whether it is compressed or not."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def is_local(name: str) -> bool:
    """Whether a source's name means files here rather than an id of the hub."""
    path = Path(name).expanduser()
    return path.exists() or glob.has_magic(name) or ending(path) in READABLE or name.startswith((".", "/", "~"))


def nearest_file(path: Path) -> str:
    """Ends an error about a file that is not there with the nearest name in its folder; "" where none is near."""
    try:
        names = os.listdir(path.expanduser().parent)
    except OSError:  # there is no such folder, or it cannot be read
        return ""
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f" Did you mean {str(path.with_name(close[0]))!r}?" if close else ""


def find_files(name: str, splits: tuple[str, str] = ("train", "test")) -> dict[str, list[Path]]:
    """The files of a source, by split.

    A file, or a pattern, is one split. In a folder, files belong to the split that their name or their folder's begins
    with, such as train-00001.parquet or test/a.jsonl; where no name says one, all are the training split.

    Args:
        name: file, folder or pattern.
        splits: names of the split to train on and of that to evaluate on.

    Raises:
        DataError: there is none, or it is of a kind that is not read.
    """
    path = Path(name).expanduser()
    if glob.has_magic(name) and not path.exists():
        found = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
        if not found:
            raise DataError(f"No file fits {name}. Check the pattern; it is taken from {Path.cwd()}.")
        return {splits[0]: [_readable(file) for file in found]}
    if path.is_file():
        return {splits[0]: [_readable(path)]}
    if not path.exists():
        raise DataError(f"There is no file {path}. Check the path; it is taken from {Path.cwd()}.{nearest_file(path)}")
    files = sorted(file for file in path.rglob("*") if file.is_file() and ending(file) in READABLE)
    files = [f for f in files if not any(part.startswith((".", "_")) for part in f.relative_to(path).parts)]
    named = {split: [f for f in files if _belongs(f.relative_to(path), split)] for split in splits}
    if not named[splits[0]] and not named[splits[1]] and splits == ("train", "test"):
        named[splits[0]] = [file for file in files if ending(file) != ".json"] or files
    if not named[splits[0]]:
        raise DataError(
            f"The folder {path} has no {splits[0]} file: name it {splits[0]}.jsonl, .parquet, .csv or .txt."
        )
    for split, of_split in named.items():
        plain = [file for file in of_split if file.name.partition(".")[0] == split]
        if len(plain) > 1:
            raise DataError(f"{path} has {' and '.join(file.name for file in plain)}: keep one file for {split}.")
    return {split: of_split for split, of_split in named.items() if of_split}


def _belongs(path: Path, split: str) -> bool:
    names = "|".join(map(re.escape, SPLIT_NAMES.get(split, (split,))))
    return any(re.match(rf"({names})([^a-zA-Z0-9]|$)", part) for part in path.parts)


def _readable(path: Path) -> Path:
    if ending(path) not in READABLE:
        raise DataError(f"{path}: dllm reads {', '.join(READABLE)}, not {path.suffix or 'a file without an ending'}.")
    return path


def read_table(path: Path) -> datasets.Dataset:
    """A .parquet or .arrow file; the latter stays where it is, and only what is read of it takes memory.

    Raises:
        DataError: the file is broken or empty.
    """
    _not_empty(path)
    try:
        if path.suffix == ".arrow":
            try:
                return datasets.Dataset.from_file(str(path))
            except pyarrow.ArrowInvalid:  # Arrow has two file forms; what is neither fails below
                return datasets.load_dataset("arrow", data_files=str(path), split="train")
        return datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow raises types of its own for each way in which a file can be broken
        cause = error.__cause__ or error
        raise DataError(f"{path} is not a readable {path.suffix[1:]} file: {cause}") from error


def _not_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")


def place_of(path: Path, number: int) -> str:
    """How errors call a row: by its line, or where lines say nothing by its number."""
    return f"{path}, {'line' if ending(path) in LINES and ending(path) != '.json' else 'row'} {number}"


def line_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a file of lines, each with the line that it begins in.

    Args:
        path: a file whose ending is one of LINES.

    Raises:
        DataError: the file, or a line of it, cannot be read.
    """
    return (read_raw(path, raw) for raw in raw_rows(path))


def raw_rows(path: Path, start: int = 0) -> Iterator[tuple[int, Row | str]]:
    """The same from a row on; those of a .jsonl file come unread, so that passing over them costs little."""
    _not_empty(path)
    kind = ending(path)
    if kind == ".jsonl":
        return islice(((number, line) for number, line in _lines(path) if line.strip()), start, None)
    readers = {".json": _json_list, ".csv": _csv_rows, ".tsv": _csv_rows, ".txt": _text_rows}
    return islice(readers[kind](path), start, None)


def read_raw(path: Path, raw: tuple[int, Row | str]) -> tuple[int, Row]:
    """A row that `raw_rows` gave, read."""
    number, row = raw
    return _json_row(path, number, row) if isinstance(row, str) else (number, row)


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of UTF-8, with or without a byte-order mark; as bytes first, so that a fault is found in its line."""
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: not UTF-8 text ({error.reason}). Save the file as UTF-8."
                    ) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}, after line {number}: the compressed file is broken ({error}).") from error


def _json_row(path: Path, number: int, line: str) -> tuple[int, Row]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}). Mend or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: a row is an object like {{...}}, not {line.strip()[:60]!r}.")
    return number, row


def _json_list(path: Path) -> Iterator[tuple[int, Row]]:
    """One list of objects, where the number is that of the object."""
    try:
        rows = json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}. For one object a line, name the file .jsonl.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is not a list of objects. For one object a line, name the file .jsonl.")
    yield from enumerate(rows, 1)


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """A table whose first line names the columns; quoted fields may hold line breaks."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = (line for _, line in _lines(path))
    reader = csv.reader(lines, delimiter="\t" if ending(path) == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {first}: not CSV ({error}). Mend or remove the line.") from error
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise DataError(f"{path}, line {first}: a column's name is there twice: {', '.join(header)}.")
        elif len(fields) != len(header):
            raise DataError(
                f"{path}, line {first}: {len(fields)} fields, and the first line names {len(header)} columns. A field with "
                f"commas or line breaks stands between double quotes."
            )
        else:
            yield first, dict(zip(header, fields, strict=True))


def _text_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """A text file's paragraphs: documents are separated by empty lines."""
    lines: list[str] = []
    number = 0
    for number, line in _lines(path):
        if line.strip():
            lines.append(line.rstrip("\r\n"))
        elif lines:
            yield number - len(lines), {"text": "\n".join(lines)}
            lines = []
    if lines:
        yield number - len(lines) + 1, {"text": "\n".join(lines)}
