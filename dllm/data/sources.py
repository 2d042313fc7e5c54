"""From a source's name to rows: built-in data, local files, and the hub.

Every source ends as two `datasets.Dataset`s, train and test, that share no row. Where a source has a single split, the
test rows are its last ones and never seen in training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from dllm.data.builtin import builtin_rows
from dllm.data.maps import check_conversation
from dllm.data.spec import SourceSpec, parse_dataset_args
from dllm.errors import DataError

READABLE = (".jsonl", ".json", ".parquet", ".txt")


def load_splits(
    dataset_args: str, *, column: str, source_column: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Loads train and test rows.

    Args:
        dataset_args: see `dllm.data.spec`.
        column: the one column that is needed: "text" to pretrain on, "messages" to fine-tune on.
        source_column: its name in files and on the hub, where it is another.

    Returns:
        (train, test); test is None where no source gives test rows. Both have the column `column` alone.

    Raises:
        DataError: a source that does not exist, an unreadable file (with the line), a missing column (with those there
            are), a local row that is no conversation (with its place), or a split that comes out empty.
    """
    pairs = [_load_source(spec, column, source_column or column) for spec in parse_dataset_args(dataset_args)]
    trains = [train for train, _ in pairs]
    tests = [test for _, test in pairs if test is not None and len(test)]
    return _joined(trains, column), _joined(tests, column) if tests else None


def _joined(parts: list[datasets.Dataset], column: str) -> datasets.Dataset:
    """All rows, one source after the other."""
    if len(parts) == 1:
        return parts[0]
    if column == "messages" and any(part.features != parts[0].features for part in parts):
        parts = [
            part.map(lambda row: {column: _role_and_content(row[column])}, features=_CONVERSATIONS)
            if part.features != _CONVERSATIONS
            else part
            for part in parts
        ]
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        kinds = " and ".join(str(part.features[column]) for part in parts)
        raise DataError(f"The sources cannot be joined: their column {column!r} is {kinds}.") from error


_CONVERSATIONS = datasets.Features(
    {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})}
)


def _role_and_content(messages: Any) -> Any:
    """A conversation without its other keys, such as names and dates: they differ from source to source and row to row."""
    if not isinstance(messages, list):
        return messages
    return [{key: m.get(key) for key in ("role", "content")} if isinstance(m, dict) else m for m in messages]


def _load_source(spec: SourceSpec, column: str, source_column: str) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    if spec.name.startswith("builtin:"):
        name = spec.name.removeprefix("builtin:")
        train = datasets.Dataset.from_list(builtin_rows(name, "train", spec.train, column=column))
        return train, None if spec.test == 0 else datasets.Dataset.from_list(
            builtin_rows(name, "test", spec.test, column=column)
        )
    path = Path(spec.name).expanduser()
    if path.exists() or path.suffix in READABLE:
        splits = _load_local(path, column, source_column)
    else:
        splits = _load_hub(spec)
    if "train" not in splits:
        raise DataError(f"{spec.name} has no split named train: rename the one to train on.")
    for split, rows in splits.items():
        if source_column not in rows.column_names:
            raise DataError(
                f"{spec.name}: the {split} rows have no column {source_column!r}; they have "
                f"{', '.join(rows.column_names)}. Name the right one with --{column}_column."
            )
        rows = rows.select_columns([source_column])
        splits[split] = rows if column == source_column else rows.rename_column(source_column, column)
    return _cut(splits, spec)


def _cut(splits: dict[str, datasets.Dataset], spec: SourceSpec) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Applies the limits; carves a test split off the end of a single one."""
    train = splits["train"]
    test = splits.get("test")
    if test is None and spec.test:
        if len(train) <= spec.test:
            raise DataError(
                f"{spec.name} has {len(train)} rows in one split: test:{spec.test} leaves none to train on. Ask for fewer."
            )
        test = train.select(range(len(train) - spec.test, len(train)))
        train = train.select(range(len(train) - spec.test))
    elif test is not None and spec.test is not None:
        test = test.select(range(min(spec.test, len(test))))
    if spec.train is not None:
        train = train.select(range(min(spec.train, len(train))))
    if not len(train):
        raise DataError(f"{spec.name} has no rows to train on.")
    return train, test


def _load_local(path: Path, column: str, source_column: str) -> dict[str, datasets.Dataset]:
    """A file is one split; a folder has train.* and maybe test.* (or is what `Dataset.save_to_disk` wrote)."""
    if path.is_file():
        return {"train": _read_file(path, column, source_column)}
    if not path.exists():
        raise DataError(f"There is no file {path}. Check the path; it is taken from {Path.cwd()}.")
    if (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        return {split: saved[split] for split in ("train", "test") if split in saved}
    if (path / "dataset_info.json").exists():
        return {"train": datasets.load_from_disk(str(path))}
    found: dict[str, datasets.Dataset] = {}
    for split in ("train", "test"):
        files = sorted(file for file in path.iterdir() if file.stem == split and file.suffix in READABLE)
        if len(files) > 1:
            raise DataError(f"{path} has {' and '.join(file.name for file in files)}: keep one file for {split}.")
        if files:
            found[split] = _read_file(files[0], column, source_column)
    if "train" not in found:
        raise DataError(f"The folder {path} has no train file: name it train.jsonl, train.parquet or train.txt.")
    return found


def _read_file(path: Path, column: str, source_column: str) -> datasets.Dataset:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    if path.suffix == ".parquet":
        try:
            rows = datasets.Dataset.from_parquet(str(path))
        except Exception as error:  # pyarrow raises types of its own for each way in which a file can be broken
            raise DataError(f"{path} is not a readable parquet file: {error}") from error
        if column == "messages" and source_column in rows.column_names:
            for number, row in enumerate(rows.select_columns([source_column]), 1):
                check_conversation(row[source_column], f"{path}, row {number}: the messages")
        return rows
    if path.suffix == ".txt":
        return _from_rows(path, _text_rows, column, source_column)
    if path.suffix in (".jsonl", ".json"):
        return _from_rows(path, _json_rows, column, source_column)
    raise DataError(f"{path}: dllm reads {', '.join(READABLE)}, not {path.suffix or 'a file without an ending'}.")


Reader = Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]
"""Gives rows, each with the line that it begins in."""


def _from_rows(path: Path, reader: Reader, column: str, source_column: str) -> datasets.Dataset:
    """Reads one column into Arrow through `datasets`' disk cache, keyed by the file's size and time."""
    if next(reader(path), None) is None:
        raise DataError(f"{path} has no rows.")
    stat = path.stat()
    key = {"path": path.resolve(), "size": stat.st_size, "time": stat.st_mtime_ns}
    try:
        return datasets.Dataset.from_generator(
            _checked_rows, gen_kwargs={"reader": reader, "column": column, "source_column": source_column, **key}
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise DataError(f"{path}: the rows do not have one shape: {error.__cause__ or error}") from error


def _place(path: Path, number: int) -> str:
    return f"{path}, {'row' if path.suffix == '.json' else 'line'} {number}"


def _checked_rows(
    reader: Reader, column: str, source_column: str, path: Path, size: int, time: int
) -> Iterator[dict[str, Any]]:
    """The column alone: rows may differ in the others, and Arrow would refuse them for it."""
    del size, time  # they are there for the cache's key
    for number, row in reader(path):
        if source_column not in row:
            raise DataError(
                f"{_place(path, number)}: there is no column {source_column!r}; the row has {', '.join(row)}. Name the right "
                f"one with --{column}_column."
            )
        value = row[source_column]
        if column == "text" and not isinstance(value, str):
            raise DataError(
                f"{_place(path, number)}: {source_column!r} is {str(value)[:60]!r}, and it has to be a string."
            )
        if column == "messages":
            check_conversation(value, f"{_place(path, number)}: the messages")
        yield {source_column: _role_and_content(value) if column == "messages" else value}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of UTF-8, with or without a byte-order mark; as bytes first, so that a fault is found in its line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 text ({error.reason}). Save the file as UTF-8."
                ) from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One JSON object a line; or, in a .json file, one list of objects, where the number is that of the object."""
    if path.suffix == ".json":
        try:
            rows = json.loads("".join(line for _, line in _lines(path)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}. For one object a line, name the file .jsonl.") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path} is not a list of objects. For one object a line, name the file .jsonl.")
        yield from enumerate(rows, 1)
        return
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}). Mend or remove the line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a row is an object like {{...}}, not {line.strip()[:60]!r}.")
        yield number, row


def _text_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _load_hub(spec: SourceSpec) -> dict[str, datasets.Dataset]:
    """A data set of the hub. With limits only that many rows are fetched, so that a part of a huge one is quick."""
    try:
        if spec.train is None:
            loaded = datasets.load_dataset(spec.name)
            return {split: loaded[split] for split in ("train", "test") if split in loaded}
        streams = datasets.load_dataset(spec.name, streaming=True)
        wanted = {"train": spec.train + (0 if "test" in streams else spec.test or 0)}
        if "test" in streams and spec.test:
            wanted["test"] = spec.test
        return {split: datasets.Dataset.from_list(list(streams[split].take(rows))) for split, rows in wanted.items()}
    except Exception as error:  # the hub's client has many errors; all of them mean the same to the user
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise DataError(
            f"{spec.name!r} is no file or folder here, and loading it from the hub failed:{offline} "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
