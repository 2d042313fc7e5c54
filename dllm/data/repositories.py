"""Data sets of the hub, and folders that were cloned from it, through `datasets.load_dataset`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

from dllm.data.files import nearest_file
from dllm.data.spec import SourceSpec
from dllm.errors import DataError, did_you_mean

Columns = Callable[[list[str], str], list[str]]
"""(columns of a split, how errors call it) -> those that are needed."""


def is_repository(spec: SourceSpec) -> bool:
    """Whether a folder is a clone of a data set of the hub, whose README says which files are what."""
    path = Path(spec.name).expanduser()
    if not path.is_dir() or (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return False
    readme = path / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else ""
    return spec.config is not None or bool(re.match(r"---\n(?:.*\n)*?(configs|dataset_info):", head))


def load_repository(spec: SourceSpec, columns: Columns) -> dict[str, datasets.Dataset]:
    """The splits of a source, on disk and memory-mapped.

    With `train:N` only the rows that are needed are fetched, so that a part of a huge data set is quick; they go to the
    cache of `datasets`, never into memory as a whole.

    Raises:
        DataError: the data set, its configuration or its split does not exist, or it cannot be reached.
    """
    streams = open_repository(spec)
    train, test = spec.split or "train", spec.test_split or "test"
    wanted: dict[str, int | None] = {train: spec.train}
    if test in streams and spec.test != 0:
        wanted[test] = spec.test
    elif spec.train is not None:
        wanted[train] = spec.train + (spec.test or 0)
    return {split: _fetch(spec, split, rows, streams[split], columns) for split, rows in wanted.items()}


def open_repository(spec: SourceSpec) -> dict[str, datasets.IterableDataset]:
    """The splits of a source as streams; nothing is read yet.

    Raises:
        DataError: see `load_repository`.
    """
    name = str(Path(spec.name).expanduser()) if Path(spec.name).expanduser().is_dir() else spec.name
    try:
        found = datasets.load_dataset(name, spec.config, revision=spec.revision, streaming=True)
    except Exception as error:  # the hub's client has many errors; all of them mean the same to the user
        raise _refusal(spec, error) from error
    for split in (spec.split or "train", spec.test_split):
        if split is not None and split not in found:
            raise DataError(
                f"{spec.name} has no split named {split}; it has {', '.join(found)}. Name the one to train on: "
                f"{spec.name}[split:NAME]."
            )
    return dict(found)


def _refusal(spec: SourceSpec, error: Exception) -> DataError:
    text = str(error)
    listed = re.search(r"(?:available configs|Available): \[(.*?)\]", text)
    if listed is not None:
        configs = re.findall(r"'([^']+)'", listed[1])
        what = f"has no configuration {spec.config!r}." if spec.config else "has several configurations."
        near = did_you_mean(spec.config or "", configs)
        return DataError(f"{spec.name} {what}{near} Write  {spec.name}[name:CONFIG].")
    if Path(spec.name).expanduser().is_dir():
        return DataError(
            f"{spec.name} cannot be loaded: {type(error).__name__}: {text.splitlines()[0] if text else ''}"
        )
    offline = " HF_HUB_OFFLINE is set." if huggingface_hub.constants.HF_HUB_OFFLINE else ""
    near = nearest_file(Path(spec.name))
    joint = " To join two sources, write blanks around the plus." if "+" in spec.name else ""
    return DataError(
        f"{spec.name!r} is no file or folder here, and loading it from the hub failed:{offline} "
        f"{type(error).__name__}: {text.splitlines()[0] if text else ''}{joint}{near}"
    )


def _fetch(
    spec: SourceSpec, split: str, rows: int | None, stream: datasets.IterableDataset, columns: Columns
) -> datasets.Dataset:
    place = f"{spec.name}, {split} rows"
    name = str(Path(spec.name).expanduser()) if Path(spec.name).expanduser().is_dir() else spec.name
    try:
        there = stream.column_names or list(next(iter(stream)))
        used = columns(there, place)
        if rows is None:
            return datasets.load_dataset(name, spec.config, revision=spec.revision, split=split).select_columns(used)
        builder = datasets.load_dataset_builder(name, spec.config, revision=spec.revision)
        features = None if stream.features is None else datasets.Features({c: stream.features[c] for c in used})
        return datasets.Dataset.from_generator(
            _head,
            features=features,
            gen_kwargs={
                "name": name,
                "config": spec.config,
                "revision": spec.revision,
                "split": split,
                "rows": rows,
                "columns": tuple(used),
                "version": builder.cache_dir,
            },
        )
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{place} cannot be read: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
        ) from error


def _head(
    name: str, config: str | None, revision: str | None, split: str, rows: int, columns: tuple[str, ...], version: str
) -> Iterator[dict[str, Any]]:
    """The first rows of a split; `version` is there for the cache's key: it says which state of the data set this is."""
    del version
    stream = datasets.load_dataset(name, config, revision=revision, split=split, streaming=True)
    yield from stream.select_columns(list(columns)).take(rows)
