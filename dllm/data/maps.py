"""From rows of text or conversations to rows of token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from dllm.data.cache import cached_map, tokenizer_fingerprint
from dllm.data.columns import check_conversation
from dllm.errors import CheckpointError, DataError, OptionError

BATCH = 1000
"""Rows mapped at a time; pretraining rows are cut within a batch, so it bounds what is left over."""
TRUNCATIONS = ("right", "left", "filter")
TURNS = ("drawn", "all")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What stands before the assistant's words in a chat template that says which they are; as transformers looks for it."""

Say = Callable[[str], None]


def pretraining_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, workers: int | None = None
) -> datasets.Dataset:
    """Documents joined by end-of-text and cut to `max_length`: rows of `input_ids`, all of that length.

    What is left at the end of every 1000 documents is dropped, unless nothing else came of them.

    Args:
        rows: a column `text`.
        tokenizer: `eos_token_id` joins documents.
        max_length: tokens a row.
        workers: processes to map with.

    Raises:
        DataError: a row that is no text, or all of the text together is shorter than one row.
    """

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        stream = list(chain.from_iterable(document_ids(batch["text"], tokenizer)))
        return {"input_ids": [stream[i : i + max_length] for i in range(0, len(stream) - max_length + 1, max_length)]}

    mapped = cached_map(
        rows, cut, ["pretrain", tokenizer_fingerprint(tokenizer), max_length], workers=workers, batched=True,
        batch_size=BATCH, features=datasets.Features({"input_ids": _IDS}), desc="cutting text into rows",
    )  # fmt: skip
    if not len(mapped):
        raise DataError(
            f"{len(rows)} documents hold less than one row of max_length={max_length} tokens: "
            f"lower max_length, or bring more text."
        )
    return mapped


def document_ids(texts: list[Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each text's ids, end-of-text last.

    Raises:
        DataError: one is no string.
    """
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"A row's text is {text!r}: every row needs a string.")
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


_IDS = datasets.List(datasets.Value("int32"))


class Fate(IntEnum):
    """What became of an answer and its prompt."""

    WHOLE = 0
    CUT = 1
    LEFT_OUT = 2
    """Longer than max_length and filtered, or cut until nothing of an answer was left."""
    SILENT = 3
    """A conversation in which the assistant says nothing."""
    TEST = 4
    """A document that is a test row of the run too, word for word; of streams, which find them while they read."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How conversations become rows of at most `max_length` tokens."""

    max_length: int
    truncation: str = "right"
    """What is done to longer ones: right cuts their end; left cuts the oldest tokens after the first; filter leaves them
    out."""
    turns: str = "drawn"
    """drawn: a conversation is one row, of which training draws a turn at a time; all: each turn and what comes before it
    is a row of its own."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("truncation", self.truncation, TRUNCATIONS),
            ("turns", self.turns, TURNS),
        ):
            if value not in allowed:
                raise OptionError(
                    f"--{name} {value!r} does not exist: it is {', '.join(allowed[:-1])} or {allowed[-1]}."
                )


def sft_rows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    truncation: str = "right",
    turns: str = "drawn",
    workers: int | None = None,
    say: Say | None = None,
    what: str = "training",
) -> datasets.Dataset:
    """Conversations as ids, with the place of every assistant turn.

    Rows have `input_ids` (at most `max_length`) and `turns`, a flat list start, end, start, end, ... of the assistant's
    contents, end-of-turn included. A turn that the cut leaves nothing of is left out, and so is a conversation without
    any.

    Args:
        rows: a column `messages` of {"role", "content"} lists.
        tokenizer: with a chat template that marks what the assistant says.
        max_length: tokens a row.
        truncation: see `Fitting`.
        turns: see `Fitting`.
        workers: processes to map with.
        say: is told how many rows were cut and left out, if any were.
        what: how it calls the rows.

    Raises:
        DataError: a row that is no conversation, or `max_length` leaves no answer in any row.
        CheckpointError: the tokenizer has no chat template, or one that does not mark what the assistant says.
        OptionError: no such truncation or turns.
    """
    fitting = Fitting(max_length=max_length, truncation=truncation, turns=turns)
    check_chat_template(tokenizer)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pieces = [piece for messages in batch["messages"] for piece in conversation_rows(messages, tokenizer, fitting)]
        ids, places, fates = zip(*pieces, strict=True)
        return {"input_ids": list(ids), "turns": list(places), "fate": [int(fate) for fate in fates]}

    mapped = cached_map(
        rows, encode, ["sft", tokenizer_fingerprint(tokenizer), fitting], workers=workers, batched=True, batch_size=BATCH,
        features=datasets.Features({"input_ids": _IDS, "turns": _IDS, "fate": datasets.Value("int8")}),
        desc="encoding conversations",
    )  # fmt: skip
    fates = mapped.with_format("numpy")["fate"][:] if len(mapped) else np.zeros(0, np.int8)
    counts = np.bincount(fates, minlength=len(Fate))
    kept = mapped if counts[Fate.WHOLE] + counts[Fate.CUT] == len(mapped) else mapped.select(np.flatnonzero(fates < 2))
    if not len(kept):
        raise _nothing_left(counts, len(rows), fitting)
    if say is not None and (line := report(counts, fitting, what)):
        say(line)
    return kept.remove_columns("fate")


def report(counts: Any, fitting: Fitting, what: str) -> str:
    """What was done to rows that did not fit, in a line; "" where nothing was."""
    parts = []
    if counts[Fate.CUT]:
        end = {"right": "the end", "left": "the beginning"}[fitting.truncation]
        parts.append(f"{end} of {counts[Fate.CUT]:,} cut off")
    if counts[Fate.LEFT_OUT]:
        reason = "longer" if fitting.truncation == "filter" else "the cut leaves nothing of an answer"
        parts.append(f"{counts[Fate.LEFT_OUT]:,} left out ({reason})")
    if counts[Fate.SILENT]:
        parts.append(f"{counts[Fate.SILENT]:,} left out (no answer in them)")
    if not parts:
        return ""
    unit = "conversations" if fitting.turns == "drawn" else "turns"
    return (
        f"{what}: of {int(sum(counts)):,} {unit}, with --truncation {fitting.truncation} to {fitting.max_length} tokens, "
        f"{', '.join(parts)}"
    )


def _nothing_left(counts: Any, rows: int, fitting: Fitting) -> DataError:
    if counts[Fate.SILENT] == sum(counts):
        return DataError(
            f"None of {rows} conversations has a message whose role is 'assistant': there is no answer to learn."
        )
    if fitting.truncation == "filter":
        return DataError(
            f"max_length={fitting.max_length} is shorter than each of {rows} conversations: raise max_length, or cut them with "
            f"--truncation right."
        )
    return DataError(
        f"max_length={fitting.max_length} leaves no answer in any of {rows} conversations: raise max_length to more than the "
        f"prompts' length."
    )


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's chat template says which words are the assistant's."""
    return GENERATION.search(str(tokenizer.chat_template)) is not None


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether a tokenizer's chat template marks what is learnt.

    Raises:
        CheckpointError: it has none, or one that does not mark what the assistant says.
    """
    if not marks_answers(tokenizer):
        raise CheckpointError(
            "The tokenizer's chat template is missing or does not mark the assistant's words with {% generation %}: fine-tune "
            "a checkpoint whose tokenizer has LLaDA's chat markers, or write a marked template into its chat_template.jinja."
        )


Piece = tuple[list[int], list[int], Fate]
"""Ids, turns as a flat list start, end, ..., and what became of them."""


def conversation_rows(messages: Any, tokenizer: PreTrainedTokenizerBase, fitting: Fitting) -> list[Piece]:
    """The rows of one conversation; at least one, which may say that it is left out.

    Raises:
        DataError: it is no conversation.
    """
    check_conversation(messages)
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, spans = encoded["input_ids"], _spans(encoded["assistant_masks"])
    if not spans:
        return [([], [], Fate.SILENT)]
    if fitting.turns == "all":
        return [_fit(ids[:end], [(start, end)], fitting) for start, end in spans]
    return [_fit(ids[: spans[-1][1]], spans, fitting)]


def _fit(ids: list[int], spans: list[tuple[int, int]], fitting: Fitting) -> Piece:
    length, fate = fitting.max_length, Fate.WHOLE
    if len(ids) > length:
        fate = Fate.CUT
        if fitting.truncation == "filter":
            spans = []
        elif fitting.truncation == "right":
            spans = [(start, min(end, length)) for start, end in spans if start < length]
        else:
            # the first token, which begins every conversation, stays; an answer without any of its prompt teaches nothing
            gone = len(ids) - length
            ids = [ids[0], *ids[gone + 1 :]]
            spans = [(start - gone, end - gone) for start, end in spans if start - gone >= 2]
    if not spans:
        return [], [], Fate.LEFT_OUT
    return ids[: spans[-1][1]], [*chain.from_iterable(spans)], fate


def _spans(marks: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of ones as (start, end)."""
    spans: list[tuple[int, int]] = []
    previous = 0
    for place, mark in enumerate(marks):
        if mark and not previous:
            spans.append((place, place + 1))
        elif mark:
            spans[-1] = (spans[-1][0], place + 1)
        previous = mark
    return spans
