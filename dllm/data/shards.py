"""Sources that are read while training: each is a list of shards, which give their rows one by one from any place.

A shard is a file, or what `datasets` counts as one. Rows come raw, and are made text or conversations only by who needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow.parquet

from dllm.data.columns import ColumnNames, RowFormat, find_format
from dllm.data.files import LINES, ending, find_files, is_local, place_of, raw_rows, read_raw, read_table
from dllm.data.repositories import is_repository, open_repository
from dllm.data.sources import FEATURES, Reading, file_format, load_source, read_file
from dllm.data.spec import SourceSpec
from dllm.errors import DataError

TABLE_ROWS = 256
"""Rows of a parquet file decoded together."""


class Shard(Protocol):
    """A part of a source."""

    @property
    def quick(self) -> bool:
        """Whether passing over rows costs far less than reading them."""

    def raw(self, start: int) -> Iterator[Any]:
        """Its rows from a place on, as they lie there."""

    def value(self, raw: Any) -> Any:
        """A row's text or messages."""


@dataclass(frozen=True, kw_only=True)
class LineShard:
    """A file of lines."""

    path: Path
    form: RowFormat

    @property
    def quick(self) -> bool:
        return self.path.suffix == ".jsonl"

    def raw(self, start: int) -> Iterator[Any]:
        return raw_rows(self.path, start)

    def value(self, raw: Any) -> Any:
        number, row = read_raw(self.path, raw)
        return self.form.convert(row, place_of(self.path, number))


@dataclass(frozen=True, kw_only=True)
class ParquetShard:
    """A parquet file; passing over rows reads none of their row groups."""

    path: Path
    form: RowFormat

    quick = True

    def raw(self, start: int) -> Iterator[Any]:
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                columns, number = self.form.used(file.schema_arrow.names), 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if number + rows > start:
                        yield from self._group(file, group, columns, number, start)
                    number += rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path} is not a readable parquet file: {error}") from error

    def _group(self, file: Any, group: int, columns: list[str], number: int, start: int) -> Iterator[Any]:
        for batch in file.iter_batches(TABLE_ROWS, row_groups=[group], columns=columns):
            for place in range(max(0, start - number), len(batch)):
                yield number + place + 1, batch, place
            number += len(batch)

    def value(self, raw: Any) -> Any:
        number, batch, place = raw
        return self.form.convert(batch.slice(place, 1).to_pylist()[0], place_of(self.path, number))


@dataclass(frozen=True, kw_only=True)
class TableShard:
    """Rows of a memory-mapped table."""

    rows: datasets.Dataset
    form: RowFormat
    place: str

    quick = True

    def raw(self, start: int) -> Iterator[Any]:
        return iter(range(start, len(self.rows)))

    def value(self, raw: Any) -> Any:
        return self.form.convert(self.rows[raw], f"{self.place}, row {raw + 1}")


@dataclass(frozen=True, kw_only=True)
class StreamShard:
    """One of the files of a data set of the hub, read over the network."""

    stream: datasets.IterableDataset
    form: RowFormat
    place: str

    quick = False

    def raw(self, start: int) -> Iterator[Any]:
        return enumerate(iter(self.stream.skip(start)), start)

    def value(self, raw: Any) -> Any:
        number, row = raw
        return self.form.convert(row, f"{self.place}, row {number + 1}")


@dataclass(frozen=True, kw_only=True)
class ShardedSource:
    """A source's training rows, and those of them that are held out."""

    spec: SourceSpec
    shards: tuple[Shard, ...]
    held: Mapping[int, int]
    """Shard -> how many of its first rows are test rows."""
    column: str
    """text or messages: what a value is."""
    render: Any
    """Makes text of messages, to pretrain on them; None where it is not asked for."""

    def document(self, shard: int, raw: Any) -> Any:
        """What is learnt of a row: a text to pretrain on, messages to fine-tune on."""
        value = self.shards[shard].value(raw)
        return value if self.render is None or isinstance(value, str) else self.render(value)


def open_source(spec: SourceSpec, reading: Reading) -> tuple[ShardedSource, datasets.Dataset | None]:
    """A source to be streamed, and its test rows.

    Where there is no test split, `test:M` holds out the first M rows.

    Raises:
        DataError: it does not exist, it cannot be read, or it has not what is needed.
    """
    names = (spec.split or "train", spec.test_split or "test")
    test: datasets.Dataset | None = None
    if spec.name.startswith("builtin:"):
        train, test = load_source(spec, reading)[1:]
        shards: list[Shard] = [_table(train, reading, spec.name)]
    elif is_repository(spec) or not is_local(spec.name):
        streams = open_repository(spec)
        shards = _stream_shards(spec, streams[names[0]], reading)
        if names[1] in streams and spec.test != 0:
            held = _stream_shards(spec, streams[names[1]], reading)
            test = _taken(held, spec.test, reading)[0]
    else:
        shards, others = _local_shards(spec, names, reading)
        if others and spec.test != 0:
            test = _taken(others, spec.test, reading)[0]
    held_rows: dict[int, int] = {}
    if test is None and spec.test and not spec.name.startswith("builtin:"):
        test, held_rows = _taken(shards, spec.test, reading)
        if len(test) < spec.test:
            raise DataError(
                f"{spec.name} has {len(test)} rows: test:{spec.test} leaves none to train on. Ask for fewer."
            )
    render = None if reading.render is None or reading.column == "messages" else reading.render.text
    source = ShardedSource(spec=spec, shards=tuple(shards), held=held_rows, column=reading.column, render=render)
    if not any(True for shard, n in enumerate(shards) for _ in islice(n.raw(held_rows.get(shard, 0)), 1)):
        raise DataError(f"{spec.name} has no rows to train on.")
    return source, test


def _local_shards(spec: SourceSpec, names: tuple[str, str], reading: Reading) -> tuple[list[Shard], list[Shard]]:
    path = Path(spec.name).expanduser()
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        splits = dict(saved) if isinstance(saved, dict) else {names[0]: saved}
        if names[0] not in splits:
            raise DataError(
                f"{spec.name} has no split named {names[0]}; it has {', '.join(splits)}. Name the one to train on: "
                f"{spec.name}[split:NAME]."
            )
        tables = {name: [_table(splits[name], reading, str(path))] for name in names if name in splits}
        return [*tables[names[0]]], [*tables.get(names[1], ())]
    files = find_files(spec.name, names)
    found = [[_file_shard(file, reading) for file in files.get(name, ())] for name in names]
    return found[0], found[1]


def _file_shard(path: Path, reading: Reading) -> Shard:
    if ending(path) == ".json":  # one value: it cannot be read in part, but what is in it can lie on the disk
        return _table(read_file(path, reading), replace(reading, names=ColumnNames()), str(path))
    if ending(path) in LINES:
        return LineShard(path=path, form=_usable(file_format(path, reading), reading, str(path)))
    if path.suffix == ".arrow":
        return _table(read_table(path), reading, str(path))
    try:
        columns = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    form = find_format(columns, reading.column, reading.names, str(path))
    return ParquetShard(path=path, form=_usable(form, reading, str(path)))


def _table(rows: datasets.Dataset, reading: Reading, place: str) -> TableShard:
    form = _usable(find_format(rows.column_names, reading.column, reading.names, place), reading, place)
    return TableShard(rows=rows.select_columns(form.used(rows.column_names)), form=form, place=place)


def _stream_shards(spec: SourceSpec, stream: datasets.IterableDataset, reading: Reading) -> list[Shard]:
    first: dict[str, Any] = {}
    if stream.column_names is None:
        first = next(iter(stream), {})
    there = stream.column_names or list(first)
    form = _usable(find_format(there, reading.column, reading.names, spec.name), reading, spec.name)
    narrow = stream.select_columns(form.used(there))
    count = max(1, int(narrow.num_shards))
    return [
        StreamShard(
            stream=narrow.shard(count, index) if count > 1 else narrow, form=form, place=f"{spec.name}, file {index}"
        )
        for index in range(count)
    ]


def _usable(form: RowFormat, reading: Reading, place: str) -> RowFormat:
    if form.column != reading.column and reading.render is None:
        raise DataError(
            f"{place}: these are conversations, and a tokenizer trained here needs text: name builtin:char or a checkpoint's."
        )
    return form


def _taken(shards: list[Shard], rows: int | None, reading: Reading) -> tuple[datasets.Dataset, dict[int, int]]:
    """The first rows of some shards, and how many of each that are."""
    values: list[Any] = []
    counts: dict[int, int] = {}
    for index, shard in enumerate(shards):
        wanted = None if rows is None else rows - len(values)
        if wanted == 0:
            break
        taken = [shard.value(raw) for raw in islice(shard.raw(0), wanted)]
        counts[index] = len(taken)
        values += taken
    if reading.column == "text" and reading.render is not None:
        values = [value if isinstance(value, str) else reading.render.text(value) for value in values]
    return datasets.Dataset.from_dict({reading.column: values}, features=FEATURES[reading.column]), counts
