"""Training rows from sources that are never held whole: read, shuffled, tokenised and cut on the fly.

A step's N places are divided among S lanes, neighbours together (S divides N). Each lane is a stream of rows of its own, from
documents of its own: every S-th one, or, where a source has many files, of files of its own. So row k of a lane, and with it
sample n of the run, depends on the seed and on N alone, never on the number of processes or of workers; and a process reads no
other lanes than those of its places, so that the tokenising is divided.

A lane goes through its documents pass after pass. It takes them in blocks, each shuffled by a key of (lane, pass, block).
Pretraining joins documents by end-of-text and cuts rows across them, blocks and passes; fine-tuning makes rows of each
conversation.

Every row says where its lane stands after it (`Cursor`, a dozen integers). The latest of them are all that a checkpoint needs:
whoever takes a lane over, in whatever number of processes, goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.data.duplicates import Digests, digest, fingerprint
from dllm.data.lanes import FILES_A_LANE, Cursor, Encoded, Lane, Row, StreamPlan
from dllm.data.maps import Fate, Fitting, conversation_rows, document_ids, report
from dllm.data.shards import ShardedSource
from dllm.diffusion.noise import Purpose, keyed_uniform
from dllm.errors import DataError, OptionError

MOST_LANES = 16
ROWS_A_LANE = 64
"""Documents that a lane has at least; a source of fewer is one lane."""
TOKENISED = 64
"""Documents tokenised together."""


def lanes_of(sources: Sequence[ShardedSource], group: int) -> int:
    """S: the largest divisor of a step's N samples up to 16.

    It is less where passing over rows costs as much as reading them and there are few files; 1 where a source has too few rows
    to be divided.
    """
    most = MOST_LANES
    for source in sources:
        if not all(shard.quick for shard in source.shards):
            most = min(most, max(1, len(source.shards) // FILES_A_LANE))
    lanes = max(n for n in range(1, most + 1) if group % n == 0)
    for source in sources:
        wanted = lanes * ROWS_A_LANE
        if source.spec.train is not None and source.spec.train < wanted:
            return 1
        found = 0
        for index, shard in enumerate(source.shards):
            found += sum(1 for _ in islice(shard.raw(source.held.get(index, 0)), wanted - found))
            if found >= wanted:
                break
        if found < wanted:
            return 1
    return lanes


@dataclass(kw_only=True)
class StreamedRows:
    """The samples of a run in order, row by row: `self[n]` is sample n, with `cursor`: its lane's number and place.

    They are asked for in rising order; a step back is free within the last steps, and further back it is read again.
    """

    sources: Sequence[ShardedSource]
    plan: StreamPlan
    lanes: int
    encode: Encoder
    length: int | None
    fingerprint: str
    """Of all that decides which sample is which row."""
    in_order: bool = True
    """The order is that of the samples; nobody is to shuffle it."""
    _open: dict[tuple[int, int], tuple[Iterator[tuple[Row, Cursor]], deque[tuple[Row, Cursor]]]] = field(
        default_factory=dict
    )
    _saved: dict[int, Cursor] = field(default_factory=dict)
    _latest: dict[int, Cursor] = field(default_factory=dict)
    _drawn: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without the lanes that are open, which a data-loader worker that is spawned could not be given: it opens its own."""
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self.plan.steps * self.plan.group

    def __getitem__(self, sample: int) -> Row:
        step, place = divmod(sample, self.plan.group)
        share = self.plan.group // self.lanes
        lane, index = place // share, step * share + place % share
        source = 0
        if len(self.sources) > 1:
            source, index = self._draw(sample, lane, index)
        row, cursor = self._row(source, lane, index)
        return {**row, "cursor": (source * self.lanes + lane, *cursor)}

    def _draw(self, sample: int, lane: int, index: int) -> tuple[int, int]:
        """The source of a sample of a mixture, and how many earlier samples of the lane came from it."""
        before, counts = self._drawn.get(lane, (0, np.zeros(len(self.sources), np.int64)))
        if before > index:
            before, counts = 0, np.zeros(len(self.sources), np.int64)
        if before < index:
            share = self.plan.group // self.lanes
            ordinals = torch.arange(before, index)
            samples = ordinals // share * self.plan.group + lane * share + ordinals % share
            counts = counts + np.bincount(self._choice(samples), minlength=len(self.sources))
            self._drawn[lane] = (index, counts)
        (source,) = self._choice(torch.tensor([sample]))
        return int(source), int(counts[source])

    def _choice(self, samples: Tensor) -> Any:
        weights = np.cumsum([source.spec.weight for source in self.sources])
        u = keyed_uniform(self.plan.seed, Purpose.SOURCE, samples).numpy()
        return np.searchsorted(weights, u * weights[-1], side="right").clip(max=len(self.sources) - 1)

    def _row(self, source: int, lane: int, index: int) -> tuple[Row, Cursor]:
        rows, recent = self._open.get((source, lane), (None, deque()))
        saved = self._saved.get(source * self.lanes + lane, Cursor())
        nearer = bool(recent) and recent[-1][1].rows < saved.rows <= index
        if rows is None or nearer or index < recent[0][1].rows - 1:
            start = saved if saved.rows <= index else Cursor()
            stream = Lane(
                source=self.sources[source], plan=self.plan, number=lane, lanes=self.lanes, encode=self.encode,
                length=self.length,
            )  # fmt: skip
            rows, recent = stream.rows(start), deque(maxlen=2 * self.plan.group // self.lanes)
            self._open[source, lane] = (rows, recent)
        while not recent or recent[-1][1].rows <= index:
            recent.append(next(rows))
        return recent[index + 1 - recent[0][1].rows]

    def note(self, cursors: Tensor) -> None:
        """Takes down how far training has come: int64 [B, 13], the cursors of a batch."""
        for lane, *place in cursors.tolist():
            if lane not in self._latest or self._latest[lane].rows < place[0]:
                self._latest[lane] = Cursor(*place)

    def fates(self) -> Tensor:
        """int64 [lanes of all sources, fates], what became of the documents that training has come past.

        Of several processes that read a lane the one that is farthest is right: the greatest counts.
        """
        table = torch.zeros(len(self.sources) * self.lanes, len(Fate), dtype=torch.int64)
        for lane, cursor in self._latest.items():
            table[lane] = torch.tensor(cursor.fates)
        return table

    def told(self, fates: Tensor) -> list[str]:
        """What was done to the documents that were read, in lines; none where nothing was.

        Args:
            fates: of `fates`, the greatest of all processes.
        """
        counts, lines = fates.sum(0).tolist(), []
        if self.encode.fitting is not None:
            lines.append(report(counts[: Fate.TEST], self.encode.fitting, "training, as read so far"))
        if counts[Fate.TEST]:
            lines.append(
                f"Warning: {counts[Fate.TEST]:,} of the {sum(counts):,} training rows read so far are test rows of this run too, "
                f"word for word: they are left out."
            )
        return [line for line in lines if line]

    def save(self, folder: Path, process: int) -> None:
        """Writes this process's places into a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"fingerprint": self.fingerprint, "cursors": {str(k): list(v) for k, v in self._latest.items()}}
        (folder / f"stream-{process}.json").write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Goes on from where all processes of a checkpoint stood.

        Raises:
            OptionError: the checkpoint is of another stream.
        """
        for path in sorted(folder.glob("stream-*.json")):
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["fingerprint"] != self.fingerprint:
                raise OptionError(
                    f"{folder} was saved while another stream was read: go on with the same --dataset_args, --max_length, "
                    f"--shuffle_buffer, seed, tokenizer, and samples of a step."
                )
            for lane, place in state["cursors"].items():
                cursor = Cursor(*place)
                if cursor.rows > self._saved.get(int(lane), Cursor()).rows:
                    self._saved[int(lane)] = cursor
        self._latest = dict(self._saved)


def first_documents(sources: Sequence[ShardedSource], count: int, held: Digests = frozenset()) -> Iterator[Any]:
    """Some documents of each source, from its beginning; none that is a test row."""
    for source in sources:
        found = (
            source.document(index, raw)
            for index, shard in enumerate(source.shards)
            for raw in shard.raw(source.held.get(index, 0))
        )
        yield from islice((document for document in found if not held or digest(document) not in held), count)


def chained(sources: Sequence[ShardedSource]) -> Sequence[ShardedSource]:
    """Several sources without weights as one, with the files of all.

    Raises:
        DataError: one of them has a limit.
    """
    if len(sources) == 1 or sources[0].spec.weight is not None:
        return sources
    for source in sources:
        if source.spec.train is not None:
            raise DataError(
                f"{source.spec.name}[train:{source.spec.train}]: streamed sources that are joined have no limits of their own. "
                f"Leave it out, or give all of them weights."
            )
    starts = [sum(len(before.shards) for before in sources[:i]) for i in range(len(sources))]
    return [
        replace(
            sources[0],
            spec=replace(sources[0].spec, name=" + ".join(source.spec.name for source in sources)),
            shards=tuple(shard for source in sources for shard in source.shards),
            held={start + k: n for source, start in zip(sources, starts, strict=True) for k, n in source.held.items()},
        )
    ]


def streamed_rows(
    sources: Sequence[ShardedSource],
    plan: StreamPlan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int | None = None,
    fitting: Fitting | None = None,
    held: Digests = frozenset(),
    key: Sequence[Any] = (),
) -> StreamedRows:
    """The samples of a run from streamed sources.

    Args:
        sources: more than one is a mixture by weights.
        plan: seed and sizes.
        tokenizer: makes ids.
        length: to pretrain: tokens a row.
        fitting: to fine-tune: how conversations become rows.
        held: of the run's test rows, which are passed over wherever they turn up.
        key: what else the rows depend on.

    Raises:
        DataError: a row that cannot be read.
    """
    lanes = lanes_of(sources, plan.group)
    parts = [(source.spec, len(source.shards), sorted(source.held.items())) for source in sources]
    more = [*map(str, key), *([fingerprint(held)] if held else [])]
    text = repr((parts, plan.seed, plan.group, plan.buffer, lanes, length, fitting, more))
    return StreamedRows(
        sources=sources,
        plan=plan,
        lanes=lanes,
        encode=Encoder(tokenizer=tokenizer, fitting=fitting, held=held),
        length=length,
        fingerprint=hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
    )


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """From documents to the rows of each, some documents at a time."""

    tokenizer: PreTrainedTokenizerBase
    fitting: Fitting | None
    """For conversations; None for text."""
    held: Digests = frozenset()
    """Of documents that are passed over."""

    def __call__(self, documents: Iterable[Any]) -> Iterator[Encoded]:
        if self.fitting is None:
            coming = iter(documents)
            while some := list(islice(coming, TOKENISED)):
                passed = [self._is_held(text) for text in some]
                ids = iter(
                    document_ids([text for text, out in zip(some, passed, strict=True) if not out], self.tokenizer)
                )
                for out in passed:
                    yield Encoded([], [Fate.TEST]) if out else Encoded([{"input_ids": next(ids)}], [Fate.WHOLE])
            return
        for messages in documents:
            if self._is_held(messages):
                yield Encoded([], [Fate.TEST])
                continue
            pieces = conversation_rows(messages, self.tokenizer, self.fitting)
            rows = [{"input_ids": ids, "turns": turns} for ids, turns, fate in pieces if fate <= Fate.CUT]
            yield Encoded(rows, [fate for *_, fate in pieces])

    def _is_held(self, document: Any) -> bool:
        return bool(self.held) and digest(document) in self.held


@dataclass(frozen=True, kw_only=True)
class CursorCollator:
    """A collator whose batches say where their lanes stand: `cursor`, int64 [B, 13]."""

    collator: Callable[[list[Row]], dict[str, Tensor]]

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        return {**self.collator(rows), "cursor": torch.tensor([row["cursor"] for row in rows])}
