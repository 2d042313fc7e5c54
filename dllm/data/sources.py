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
            are), or a split that comes out empty.
    """
    pairs = [_load_source(spec, column, source_column or column) for spec in parse_dataset_args(dataset_args)]
    trains = [train for train, _ in pairs]
    tests = [test for _, test in pairs if test is not None and len(test)]
    train = trains[0] if len(trains) == 1 else datasets.concatenate_datasets(trains)
    test = None if not tests else tests[0] if len(tests) == 1 else datasets.concatenate_datasets(tests)
    return train, test


def _load_source(spec: SourceSpec, column: str, source_column: str) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    if spec.name.startswith("builtin:"):
        name = spec.name.removeprefix("builtin:")
        train = datasets.Dataset.from_list(builtin_rows(name, "train", spec.train, column=column))
        return train, None if spec.test == 0 else datasets.Dataset.from_list(
            builtin_rows(name, "test", spec.test, column=column)
        )
    path = Path(spec.name).expanduser()
    if path.exists() or path.suffix in READABLE:
        splits = _load_local(path)
    else:
        splits = _load_hub(spec)
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


def _load_local(path: Path) -> dict[str, datasets.Dataset]:
    """A file is one split; a folder has train.* and maybe test.* (or is what `Dataset.save_to_disk` wrote)."""
    if path.is_file():
        return {"train": _read_file(path)}
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
            found[split] = _read_file(files[0])
    if "train" not in found:
        raise DataError(f"The folder {path} has no train file: name it train.jsonl, train.parquet or train.txt.")
    return found


def _read_file(path: Path) -> datasets.Dataset:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    if path.suffix == ".parquet":
        try:
            return datasets.Dataset.from_parquet(str(path))
        except Exception as error:  # pyarrow raises types of its own for each way in which a file can be broken
            raise DataError(f"{path} is not a readable parquet file: {error}") from error
    if path.suffix == ".txt":
        return _from_rows(path, _text_rows)
    if path.suffix in (".jsonl", ".json"):
        return _from_rows(path, _json_rows)
    raise DataError(f"{path}: dllm reads {', '.join(READABLE)}, not {path.suffix or 'a file without an ending'}.")


def _from_rows(path: Path, reader: Callable[[Path], Iterator[dict[str, Any]]]) -> datasets.Dataset:
    """Reads rows into Arrow through `datasets`' disk cache, keyed by the file's size and time."""
    first = next(reader(path), None)
    if first is None:
        raise DataError(f"{path} has no rows.")
    stat = path.stat()
    try:
        return datasets.Dataset.from_generator(
            _keyed_rows,
            gen_kwargs={"reader": reader, "path": path.resolve(), "size": stat.st_size, "time": stat.st_mtime_ns},
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise DataError(f"{path}: the rows do not have one shape: {error.__cause__ or error}") from error


def _keyed_rows(
    reader: Callable[[Path], Iterator[dict[str, Any]]], path: Path, size: int, time: int
) -> Iterator[dict[str, Any]]:
    del size, time  # they are there for the cache's key
    yield from reader(path)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One JSON object a line; or, in a .json file, one list of objects."""
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".json":
            try:
                rows = json.load(file)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path} is not JSON: {error}. For one object a line, name the file .jsonl.") from error
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise DataError(f"{path} is not a list of objects. For one object a line, name the file .jsonl.")
            yield from rows
            return
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}, line {number}: a row is an object like {{...}}, not {line.strip()[:60]!r}."
                    )
                yield row
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}). Mend or remove the line."
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, after line {number}: not UTF-8 text ({error.reason}).") from error


def _text_rows(path: Path) -> Iterator[dict[str, Any]]:
    """A text file's paragraphs: documents are separated by empty lines."""
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    lines.append(line.rstrip("\n"))
                elif lines:
                    yield {"text": "\n".join(lines)}
                    lines = []
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}).") from error
    if lines:
        yield {"text": "\n".join(lines)}


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
