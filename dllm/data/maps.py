"""From rows of text or conversations to rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from dllm.data.columns import check_conversation
from dllm.errors import CheckpointError, DataError

BATCH = 1000
"""Rows mapped at a time; pretraining rows are cut within a batch, so it bounds what is left over."""


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
        for text in batch["text"]:
            if not isinstance(text, str):
                raise DataError(f"A row's text is {text!r}: every row needs a string.")
        encoded = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        stream = list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in encoded))
        return {"input_ids": [stream[i : i + max_length] for i in range(0, len(stream) - max_length + 1, max_length)]}

    mapped = _map(rows, cut, workers, "cutting text into rows")
    if not len(mapped):
        raise DataError(
            f"{len(rows)} documents hold less than one row of max_length={max_length} tokens: "
            f"lower max_length, or bring more text."
        )
    return mapped


def sft_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, workers: int | None = None
) -> datasets.Dataset:
    """Conversations as ids, with the place of every assistant turn.

    Rows have `input_ids` (cut to `max_length`) and `turns`, a flat list start, end, start, end, ... of the assistant's
    contents, end-of-turn included. A turn that the cut leaves nothing of is left out, and so is a conversation without
    any.

    Args:
        rows: a column `messages` of {"role", "content"} lists.
        tokenizer: with a chat template that marks what the assistant says.
        max_length: tokens a row.
        workers: processes to map with.

    Raises:
        DataError: a row that is no conversation, or `max_length` leaves no answer in any row.
        CheckpointError: the tokenizer has no chat template, or one that does not mark what the assistant says.
    """
    if "{% generation %}" not in str(tokenizer.chat_template):
        raise CheckpointError(
            "The tokenizer's chat template is missing or does not mark the assistant's words with {% generation %}: fine-tune "
            "a checkpoint whose tokenizer has LLaDA's chat markers."
        )

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        out: dict[str, list[list[int]]] = {"input_ids": [], "turns": []}
        for messages in batch["messages"]:
            check_conversation(messages)
            encoded = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids = encoded["input_ids"][:max_length]
            turns = list(chain.from_iterable(_spans(encoded["assistant_masks"][:max_length])))
            if turns:
                out["input_ids"].append(ids[: turns[-1]])
                out["turns"].append(turns)
        return out

    mapped = _map(rows, encode, workers, "encoding conversations")
    if not len(mapped):
        if not any(message["role"] == "assistant" for messages in rows["messages"] for message in messages):
            raise DataError(
                f"None of {len(rows)} conversations has a message whose role is 'assistant': there is no answer to learn."
            )
        raise DataError(
            f"max_length={max_length} leaves no answer in any of {len(rows)} conversations: raise max_length to more than the "
            f"prompts' length."
        )
    return mapped


def _map(rows: datasets.Dataset, function: Any, workers: int | None, what: str) -> datasets.Dataset:
    many = workers if workers and workers > 1 else None
    return rows.map(
        function, batched=True, batch_size=BATCH, remove_columns=rows.column_names, num_proc=many, desc=what,
        load_from_cache_file=False,
    )  # fmt: skip


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
