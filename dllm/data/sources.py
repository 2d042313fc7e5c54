"""From a source's name to rows: built-in data, local files, and the hub.

Every source ends as two `datasets.Dataset`s, train and test, that share no row. Where a source has a single split, its test
rows are always the same ones whatever the other limits are: the last rows of local files, the first rows of a data set of the
hub, whose end may be far away. They are never trained on, nor is a row that equals one of them, of whatever source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from dllm.data.builtin import builtin_rows
from dllm.data.cache import cached_map
from dllm.data.columns import ColumnNames, Conversation, RowFormat, check_conversation, find_format
from dllm.data.duplicates import Digests, digests, shared_rows
from dllm.data.files import LINES, ending, find_files, is_local, line_rows, place_of, read_table
from dllm.data.repositories import is_repository, load_repository
from dllm.data.spec import SourceSpec, parse_dataset_args
from dllm.errors import DataError

Say = Callable[[str], None]
"""Shows a line to the user."""


class Rendering(NamedTuple):
    """How a conversation becomes text to pretrain on."""

    fingerprint: str
    """Another one, other text: part of the cache's key."""
    text: Callable[[Conversation], str]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read of every source."""

    column: str
    """"text" to pretrain on, "messages" to fine-tune on."""
    names: ColumnNames = field(default_factory=ColumnNames)
    """Columns that were named."""
    render: Rendering | None = None
    """For conversations in pretraining; without one they are refused."""
    say: Say | None = None
    """Shows warnings; None on all processes but one."""


class Splits(NamedTuple):
    """A source's rows: one column, `text` or `messages`."""

    spec: SourceSpec
    train: datasets.Dataset
    test: datasets.Dataset | None


def load_splits(
    dataset_args: str,
    *,
    column: str,
    names: ColumnNames | None = None,
    render: Rendering | None = None,
    say: Say | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Loads train and test rows, all sources joined; weights are left aside.

    Args:
        dataset_args: see `dllm.data.spec`.
        column: the one column that is needed: "text" to pretrain on, "messages" to fine-tune on.
        names: columns that hold it in files and on the hub; by default they are found.
        render: makes text of conversations, to pretrain on them.
        say: shows warnings.

    Returns:
        (train, test); test is None where no source gives test rows. Both have the column `column` alone.

    Raises:
        DataError: a source that does not exist, an unreadable file (with the line), a missing column (with those there
            are), a local row that is no conversation (with its place), or a split that comes out empty.
    """
    reading = Reading(column=column, names=names or ColumnNames(), render=render, say=say)
    return join_splits(load_sources(dataset_args, reading))


def load_sources(dataset_args: str, reading: Reading) -> list[Splits]:
    """The same, source by source. No source trains on a row that is a test row, of itself or of another one."""
    sources = [load_source(spec, reading) for spec in parse_dataset_args(dataset_args)]
    if all(source.spec.name.startswith("builtin:") for source in sources):
        return sources  # whose splits share nothing, by their making
    held = digests(source.test for source in sources if source.test is not None)
    return [source._replace(train=_unseen(source, held, reading.say)) for source in sources]


def _unseen(source: Splits, held: Digests, say: Say | None) -> datasets.Dataset:
    """A source's training rows without those that are test rows of the run."""
    train, name = source.train, source.spec.name
    shared = shared_rows(train, held)
    if not len(shared):
        return train
    if len(shared) == len(train):
        raise DataError(
            f"All {len(train):,} training rows of {name} are test rows of this run too, word for word: nothing is left to "
            f"train on. Choose other test rows, or none with test:0."
        )
    if say is not None:
        say(
            f"Warning: {len(shared):,} of the {len(train):,} training rows of {name} are test rows of this run too, word for "
            f"word: they are left out."
        )
    return train.select(np.setdiff1d(np.arange(len(train)), shared, assume_unique=True))


def join_splits(sources: list[Splits]) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """All rows, one source after the other."""
    tests = [source.test for source in sources if source.test is not None and len(source.test)]
    return joined([source.train for source in sources]), joined(tests) if tests else None


def joined(parts: list[datasets.Dataset]) -> datasets.Dataset:
    """The rows of tables that have the same columns."""
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


FEATURES = {
    "text": datasets.Features({"text": datasets.Value("string")}),
    "messages": datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})}
    ),
}
"""The one column of a source, once it is read."""


def load_source(spec: SourceSpec, reading: Reading) -> Splits:
    """One source."""
    if spec.name.startswith("builtin:"):
        return _load_builtin(spec, reading.column)
    names = (spec.split or "train", spec.test_split or "test")
    repository = is_repository(spec) or not is_local(spec.name)
    if repository:
        splits = {
            split: _from_table(rows, reading, f"{spec.name}, {split} rows", check=False)
            for split, rows in load_repository(spec, partial(_used_columns, reading=reading)).items()
        }
    else:
        splits = _load_saved(spec, names, reading) or {
            split: joined([read_file(file, reading) for file in files])
            for split, files in find_files(spec.name, names).items()
        }
    return Splits(spec, *_cut(splits, spec, names, at_end=not repository))


def _load_builtin(spec: SourceSpec, column: str) -> Splits:
    if spec.config or spec.split or spec.test_split or spec.revision:
        raise DataError(
            f"{spec.name} has no configurations and no splits but train and test: leave the other keys out."
        )
    name = spec.name.removeprefix("builtin:")
    train = datasets.Dataset.from_list(builtin_rows(name, "train", spec.train, column=column))
    if spec.test == 0:
        return Splits(spec, train, None)
    return Splits(spec, train, datasets.Dataset.from_list(builtin_rows(name, "test", spec.test, column=column)))


def _cut(
    splits: dict[str, datasets.Dataset], spec: SourceSpec, names: tuple[str, str], *, at_end: bool
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Applies the limits; carves a test split off a single one."""
    train, test = splits[names[0]], splits.get(names[1])
    if test is None and spec.test:
        if len(train) <= spec.test:
            raise DataError(
                f"{spec.name} has {len(train)} rows in one split: test:{spec.test} leaves none to train on. Ask for fewer."
            )
        rest = len(train) - spec.test
        if at_end:
            train, test = train.select(range(rest)), train.select(range(rest, len(train)))
        else:
            train, test = train.select(range(spec.test, len(train))), train.select(range(spec.test))
    elif test is not None and spec.test is not None:
        test = test.select(range(min(spec.test, len(test))))
    if spec.train is not None:
        train = train.select(range(min(spec.train, len(train))))
    if not len(train):
        raise DataError(f"{spec.name} has no rows to train on.")
    if test is not None and not len(test) and spec.test != 0:
        raise DataError(f"{spec.name}: its split {names[1]} is empty. Write test:0 to do without it.")
    return train, test if test is not None and len(test) else None


def _load_saved(spec: SourceSpec, names: tuple[str, str], reading: Reading) -> dict[str, datasets.Dataset]:
    """What `save_to_disk` wrote, memory-mapped; nothing where the folder is none of these."""
    path = Path(spec.name).expanduser()
    if (path / "dataset_dict.json").exists():
        saved = dict(datasets.load_from_disk(str(path)))
    elif (path / "dataset_info.json").exists() and (path / "state.json").exists():
        saved = {names[0]: datasets.load_from_disk(str(path))}
    else:
        return {}
    if names[0] not in saved:
        raise DataError(
            f"{spec.name} has no split named {names[0]}; it has {', '.join(saved)}. Name the one to train on: "
            f"{spec.name}[split:NAME]."
        )
    found = {split: rows for split, rows in saved.items() if split in names}
    return {split: _from_table(rows, reading, f"{path}, {split}") for split, rows in found.items()}


def _used_columns(there: list[str], place: str, *, reading: Reading) -> list[str]:
    """Those columns of a table that will be read."""
    return find_format(there, reading.column, reading.names, place).used(there)


def _from_table(rows: datasets.Dataset, reading: Reading, place: str, *, check: bool = True) -> datasets.Dataset:
    """The one column of an Arrow table; it is rewritten only where the rows have another form.

    Args:
        rows: the table.
        reading: what is read.
        place: how errors call the table.
        check: look at every conversation now, so that an error can say where it is; otherwise encoding does.
    """
    form = find_format(rows.column_names, reading.column, reading.names, place)
    rows = rows.select_columns(form.used(rows.column_names))
    if form.kind == "text":
        (name,) = form.columns
        kind = rows.features[name]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise DataError(f"{place}: the column {name!r} holds {kind}, and it has to hold strings.")
        rows = rows if name == "text" else rows.rename_column(name, "text")
        return rows if rows.features == FEATURES["text"] else rows.cast(FEATURES["text"])
    if rows.column_names == [*form.columns]:
        named = rows if form.columns == ("messages",) else rows.rename_column(form.columns[0], "messages")
        if form.kind == "messages" and named.features == FEATURES["messages"]:
            for number, row in enumerate(named if check else (), 1):
                check_conversation(row["messages"], f"{place}, row {number}: the messages")
            return _as_text(named, reading, place)
    converted = cached_map(
        rows, _convert_row, [form, place], with_indices=True, fn_kwargs={"form": form, "place": place},
        features=FEATURES["messages"], desc="reading conversations",
    )  # fmt: skip
    return _as_text(converted, reading, place)


def _convert_row(row: dict[str, Any], index: int, form: RowFormat, place: str) -> dict[str, Any]:
    return {form.column: form.convert(row, f"{place}, row {index + 1}")}


def _as_text(rows: datasets.Dataset, reading: Reading, place: str) -> datasets.Dataset:
    """Conversations as they are; to pretrain on, as the text that they make."""
    if reading.column == "messages":
        return rows
    if reading.render is None:
        raise DataError(
            f"{place}: these are conversations, and a tokenizer trained here needs text: name builtin:char or a checkpoint's."
        )
    render = reading.render.text
    return cached_map(
        rows, lambda row: {"text": render(row["messages"])}, ["render", reading.render.fingerprint],
        features=FEATURES["text"], desc="writing conversations out",
    )  # fmt: skip


def read_file(path: Path, reading: Reading) -> datasets.Dataset:
    """One local file, through `datasets`' disk cache."""
    if ending(path) not in LINES:
        return _from_table(read_table(path), reading, str(path))
    form = file_format(path, reading)
    stat = path.stat()
    key = {"path": path.resolve(), "size": stat.st_size, "time": stat.st_mtime_ns}
    try:
        rows = datasets.Dataset.from_generator(
            _converted_rows, features=FEATURES[form.column], gen_kwargs={"form": form, **key}
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise DataError(f"{path}: the rows do not have one shape: {error.__cause__ or error}") from error
    return rows if form.kind == "text" else _as_text(rows, reading, str(path))


def file_format(path: Path, reading: Reading) -> RowFormat:
    """The form of the rows of a file of lines, by the first of them."""
    first = next(line_rows(path), None)
    if first is None:
        raise DataError(f"{path} has no rows.")
    return find_format([*first[1]], reading.column, reading.names, place_of(path, first[0]))


def _converted_rows(form: RowFormat, path: Path, size: int, time: int) -> Iterator[dict[str, Any]]:
    """The column alone: rows may differ in the others, and Arrow would refuse them for it."""
    del size, time  # they are there for the cache's key
    for number, row in line_rows(path):
        yield {form.column: form.convert(row, place_of(path, number))}
