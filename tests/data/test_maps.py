"""From text and conversations to rows of ids."""

from __future__ import annotations

import re
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data.builtin import builtin_rows
from dllm.data.maps import BATCH, pretraining_rows, sft_rows
from dllm.errors import CheckpointError, DataError
from dllm.pipelines.llada.tokenizer import bpe_tokenizer, char_tokenizer

CHARS = char_tokenizer()
EOS = CHARS.eos_token_id
CONTENT = st.text("ab \n", max_size=8)


def texts(documents: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": documents})


def chats(conversations: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"messages": conversations})


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@settings(max_examples=40)
@given(st.lists(st.text("abc 0\n", max_size=12), min_size=1, max_size=6), st.integers(1, 20))
def test_packing_joins_with_eos_and_loses_only_the_tail(documents: list[str], length: int) -> None:
    stream: list[int] = []
    for document in documents:
        stream += [CHARS.convert_tokens_to_ids(character) for character in document] + [EOS]
    whole = len(stream) // length
    if whole == 0:
        with pytest.raises(
            DataError, match=f"{len(documents)} documents hold less than one row of max_length={length}"
        ):
            pretraining_rows(texts(documents), CHARS, length)
        return
    rows = pretraining_rows(texts(documents), CHARS, length)
    assert rows.column_names == ["input_ids"]
    assert rows["input_ids"][:] == [stream[i * length : (i + 1) * length] for i in range(whole)]


def test_a_tail_is_lost_only_every_thousand_documents() -> None:
    rows = pretraining_rows(texts(["ab"] * (2 * BATCH + 1)), CHARS, 7)
    assert len(rows) == 2 * (3 * BATCH // 7)  # the last batch is shorter than a row


def test_no_special_token_but_eos_is_put_in() -> None:
    tokenizer = bpe_tokenizer(["some text to train on, some more"], 280)
    ids = tokenizer("some text")["input_ids"]
    (row,) = pretraining_rows(texts(["some text"]), tokenizer, len(ids) + 1)["input_ids"]
    assert row == [*ids, tokenizer.eos_token_id]
    assert tokenizer.decode(row) == "some text<|endoftext|>"


@pytest.mark.parametrize("bad", [None, 3])
def test_a_text_that_is_none_is_refused(bad: Any) -> None:
    rows = texts(["a", None]) if bad is None else texts([bad])
    with pytest.raises(DataError, match=f"A row's text is {bad!r}: every row needs a string."):
        pretraining_rows(rows, CHARS, 2)


CONVERSATIONS = st.lists(
    st.builds(message, st.sampled_from(["system", "user", "assistant"]), CONTENT), min_size=1, max_size=5
)


def obvious_conversation(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and turns, written out piece by piece."""

    def ids(text: str) -> list[int]:
        return [CHARS.convert_tokens_to_ids(character) for character in text]

    special = CHARS.convert_tokens_to_ids
    out, turns = [special("<|startoftext|>")], []
    for m in messages:
        out += [special("<|start_header_id|>"), *ids(m["role"]), special("<|end_header_id|>"), *ids("\n\n")]
        start = len(out)
        out += [*ids(m["content"].strip()), special("<|eot_id|>")]
        if m["role"] == "assistant":
            turns += [start, len(out)]
    return out, turns


@settings(max_examples=40)
@given(CONVERSATIONS, st.integers(1, 80))
def test_turns_are_what_the_assistant_says_up_to_the_cut(messages: list[dict[str, str]], length: int) -> None:
    ids, turns = obvious_conversation(messages)
    # a turn counts if its first token is within the length, and ends where the length does
    kept = [(s, min(e, length)) for s, e in zip(turns[::2], turns[1::2], strict=True) if s < length]
    if not kept:
        answered = any(message["role"] == "assistant" for message in messages)
        cut, silent = (
            f"max_length={length} leaves no answer in any of 1",
            "None of 1 conversations has a message whose role",
        )
        with pytest.raises(DataError, match=re.escape(cut if answered else silent)):
            sft_rows(chats([messages]), CHARS, length)
        return
    (row,) = sft_rows(chats([messages]), CHARS, length)
    assert row["turns"] == [place for turn in kept for place in turn]
    assert row["input_ids"] == ids[: kept[-1][1]]


def test_a_turn_is_the_content_and_its_end() -> None:
    rows = sft_rows(chats([r["messages"] for r in builtin_rows("addition", "train", 20, column="messages")]), CHARS, 99)
    for row, source in zip(rows, builtin_rows("addition", "train", 20, column="messages"), strict=True):
        start, end = row["turns"]
        assert CHARS.decode(row["input_ids"][start:end]) == source["messages"][1]["content"] + "<|eot_id|>"
        assert end == len(row["input_ids"])


def test_a_conversation_without_an_answer_is_left_out() -> None:
    asked, answered = [message("user", "q")], [message("user", "q"), message("assistant", "a")]
    rows = sft_rows(chats([asked, answered, asked]), CHARS, 99)
    assert len(rows) == 1


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        [{"role": "user", "content": None}],
        [{"role": None, "content": "a"}],
    ],
)
def test_a_row_that_is_no_conversation_is_refused(bad: Any) -> None:
    good = [message("user", "q"), message("assistant", "a")]
    with pytest.raises(DataError, match=r"A row's messages are .*: they are a list like \[\{\"role\": \"user\""):
        sft_rows(chats([good, bad]), CHARS, 99)


@pytest.mark.parametrize("bad", ["a question", {"role": "user", "content": "q"}])
def test_a_column_that_holds_no_conversations_is_refused(bad: Any) -> None:
    with pytest.raises(DataError, match="A row's messages are "):
        sft_rows(chats([bad]), CHARS, 99)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_a_tokenizer_that_marks_no_answers_is_refused(template: str | None) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(CheckpointError, match="chat template is missing or does not mark the assistant's words"):
        sft_rows(chats([[message("user", "q"), message("assistant", "a")]]), tokenizer, 99)
