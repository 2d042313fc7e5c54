"""One of the streams of rows that a streamed source is divided into: its documents, shuffled, and the rows cut from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dllm.data.maps import Fate
from dllm.data.shards import ShardedSource
from dllm.diffusion.noise import Purpose, keyed_permutation
from dllm.errors import DataError

FILES_A_LANE = 8
"""Files that a lane has at least, where each lane has files of its own: with fewer, lanes would be of unequal length."""

Row = dict[str, Any]


class Cursor(NamedTuple):
    """Where a lane stands: what comes next begins here."""

    rows: int = 0
    """Rows given so far."""
    sweep: int = 0
    """Passes through the documents that are over."""
    block: int = 0
    """The block of documents in the pass."""
    file: int = 0
    """The place, in the pass's order of the lane's files, of the file in which the block begins."""
    row: int = 0
    """Its row there, those held out not counted."""
    document: int = 0
    """The document in the shuffled block."""
    offset: int = 0
    """The token in the document; for fine-tuning, the row of the conversation."""
    whole: int = 0
    cut: int = 0
    left_out: int = 0
    silent: int = 0
    test: int = 0
    """What became of the documents (fine-tuning: of their rows) before this one, of all passes; see `Fate`."""

    @property
    def fates(self) -> tuple[int, ...]:
        """How many had each `Fate`."""
        return self[len(self) - len(Fate) :]


class Encoded(NamedTuple):
    """What is learnt of a document."""

    rows: list[Row]
    fates: Sequence[Fate]
    """Of the document, or of each of its rows, those included that are left out."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What decides which sample is which row."""

    seed: int
    group: int
    """Samples of a step."""
    steps: int
    buffer: int = 10_000
    """Documents shuffled together, all lanes taken together."""


@dataclass(kw_only=True)
class Lane:
    """One of the streams of rows of a source."""

    source: ShardedSource
    plan: StreamPlan
    number: int
    lanes: int
    encode: Callable[[Iterable[Any]], Iterator[Encoded]]
    """From documents to the rows of each; pretraining: one row of all its tokens."""
    length: int | None
    """Tokens of a row cut across documents; None where a document's rows stay as they are."""

    def __post_init__(self) -> None:
        files = len(self.source.shards)
        self.groups = max(
            m for m in range(1, self.lanes + 1) if self.lanes % m == 0 and (m == 1 or m * FILES_A_LANE <= files)
        )
        self.sharers = self.lanes // self.groups
        """Lanes that take turns in the documents of the same files."""
        self.block_size = max(1, self.plan.buffer // self.lanes)

    def rows(self, start: Cursor) -> Iterator[tuple[Row, Cursor]]:
        """Rows from a place on, without an end, each with the place after it.

        Raises:
            DataError: a document that cannot be read, or nothing in them to learn.
        """
        count, sweep, tokens = start.rows, start.sweep, list[int]()
        fates = [*start.fates]
        at = start
        while True:
            before, fresh = count, (at.block, at.file, at.row, at.document, at.offset) == (0, 0, 0, 0, 0)
            any_document = False
            for block, file, row, found in self._blocks(sweep, at.block, at.file, at.row):
                any_document = True
                place, taken = at.document, at.offset
                for made in self.encode(self.source.document(*one) for one in found[place:]):
                    for given, reached in self._cut(made.rows, taken, tokens):
                        count += 1
                        yield given, Cursor(count, sweep, block, file, row, place, reached, *fates)
                    for fate in made.fates:  # counted once it is done with: who goes on within it reads it again
                        fates[fate] += 1
                    place, taken = place + 1, 0
                at = Cursor()
            if fresh and not any_document:
                raise DataError(f"{self.source.spec.name} has too few rows to be streamed: leave streaming out.")
            if fresh and count == before and not tokens:
                if fates[Fate.TEST] == sum(fates):
                    raise DataError(
                        f"{self.source.spec.name}: all rows to train on are test rows of this run too, word for word. Choose "
                        f"other test rows, or none with test:0."
                    )
                raise DataError(
                    f"{self.source.spec.name}: no row of a whole pass has an answer within --max_length: raise it."
                )
            sweep, at = sweep + 1, Cursor()

    def _cut(self, made: list[Row], offset: int, tokens: list[int]) -> Iterator[tuple[Row, int]]:
        """The rows that a document completes, and how far into it each reaches; `tokens` holds what has no row yet."""
        if self.length is None:
            for place in range(offset, len(made)):
                yield made[place], place + 1
            return
        ids = [token for whole in made for token in whole["input_ids"]]  # of one document, or of none
        while offset < len(ids):
            more = min(self.length - len(tokens), len(ids) - offset)
            tokens += ids[offset : offset + more]
            offset += more
            if len(tokens) == self.length:
                yield {"input_ids": list(tokens)}, offset
                tokens.clear()

    def _blocks(
        self, sweep: int, block: int, file: int, row: int
    ) -> Iterator[tuple[int, int, int, list[tuple[int, Any]]]]:
        """Shuffled blocks of this lane's rows (shard, raw), each with its number and the file and row in which it begins."""
        size = self.block_size * self.sharers
        turn = self.number // self.groups
        mine: list[tuple[int, Any]] = []
        begins, index = (file, row), block * size
        for at_file, at_row, raw, shard in self._raw(sweep, file, row, index):
            if index == block * size:
                begins = (at_file, at_row)
            if index % self.sharers == turn:
                mine.append((shard, raw))
            index += 1
            if index == (block + 1) * size:
                yield block, *begins, self._shuffled(mine, sweep, block)
                block, mine = block + 1, []
        if mine:
            yield block, *begins, self._shuffled(mine, sweep, block)

    def _shuffled(self, mine: list[tuple[int, Any]], sweep: int, block: int) -> list[tuple[int, Any]]:
        order = keyed_permutation(len(mine), self.plan.seed, Purpose.STREAM, self.number, sweep, block).tolist()
        return [mine[place] for place in order]

    def _raw(self, sweep: int, file: int, row: int, index: int) -> Iterator[tuple[int, int, Any, int]]:
        """All documents of this lane's files from one on: (file's place, row in it, raw row, shard)."""
        shards, group, limit = self.source.shards, self.number % self.groups, self.source.spec.train
        if limit is None:
            order = keyed_permutation(len(shards), self.plan.seed, Purpose.STREAM_FILES, sweep).tolist()
        else:  # the same rows in every pass
            order = list(range(len(shards)))
            limit = limit // self.groups + (group < limit % self.groups)
        files = order[group :: self.groups]
        for place in range(file, len(files)):
            shard = files[place]
            first = row if place == file else 0
            for number, raw in enumerate(shards[shard].raw(self.source.held.get(shard, 0) + first), first):
                if limit is not None and index >= limit:
                    return
                yield place, number, raw, shard
                index += 1
