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
from dllm.errors import CheckpointError, DataError, OptionError
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


TALK = [message("system", "s"), *[message("user", "ab"), message("assistant", "cd")] * 3]


def whole_talk() -> tuple[list[int], list[int]]:
    return obvious_conversation(TALK)


def said_by(rows: datasets.Dataset, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    return sft_rows(rows, CHARS, say=said.append, **options).to_list(), said


def test_all_turns_are_rows_of_their_own() -> None:
    ids, turns = whole_talk()
    rows, said = said_by(chats([TALK]), max_length=999, turns="all")
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    assert rows == [{"input_ids": ids[:end], "turns": [start, end]} for start, end in pairs]
    assert said == []


def test_filter_leaves_longer_rows_out_and_says_how_many() -> None:
    ids, turns = whole_talk()
    rows, said = said_by(chats([TALK, TALK[:3]]), max_length=len(ids) - 1, truncation="filter", turns="all")
    assert [row["turns"][1] for row in rows] == [turns[1], turns[3], turns[1]]
    assert all(row["input_ids"] == ids[: row["turns"][1]] for row in rows)
    length = len(ids) - 1
    assert said == [f"training: of 4 turns, with --truncation filter to {length} tokens, 1 left out (longer)"]
    with pytest.raises(
        DataError, match="max_length=5 is shorter than each of 1 conversations: raise max_length, or cut"
    ):
        sft_rows(chats([TALK]), CHARS, 5, truncation="filter")


def test_right_says_what_it_cut() -> None:
    _, turns = whole_talk()
    long = [message("user", "a" * 200), message("assistant", "b")]
    silent = [message("user", "a")]
    rows, said = said_by(chats([TALK, long, silent]), max_length=turns[3] + 1, what="test")
    assert [row["turns"] for row in rows] == [turns[:4]]
    (line,) = said
    assert line == (
        f"test: of 3 conversations, with --truncation right to {turns[3] + 1} tokens, the end of 1 cut off, 1 left out (the "
        "cut leaves nothing of an answer), 1 left out (no answer in them)"
    )


@settings(max_examples=30)
@given(st.integers(2, 90), st.sampled_from(["drawn", "all"]))
def test_left_keeps_the_first_token_and_the_newest(length: int, turns: str) -> None:
    ids, places = whole_talk()
    pairs = list(zip(places[::2], places[1::2], strict=True))
    expected = []
    for end in [e for _, e in pairs] if turns == "all" else [pairs[-1][1]]:
        gone = max(0, end - length)
        kept = [ids[0], *ids[gone + 1 : end]]
        mine = [pair for pair in pairs if pair[1] == end] if turns == "all" else pairs
        spans = [(s - gone, e - gone) for s, e in mine if s - gone >= 2]
        if spans:
            expected.append({"input_ids": kept, "turns": [place for span in spans for place in span]})
            assert all(ids[gone:end][s:e] == kept[s:e] for s, e in spans)
    if expected:
        rows, _ = said_by(chats([TALK]), max_length=length, truncation="left", turns=turns)
        assert rows == expected
        assert all(len(row["input_ids"]) <= length for row in rows)
    else:
        with pytest.raises(DataError, match=f"max_length={length} leaves no answer in any of 1 conversations"):
            sft_rows(chats([TALK]), CHARS, length, truncation="left", turns=turns)


@pytest.mark.parametrize(
    ("option", "message_"),
    [
        ({"truncation": "middle"}, "--truncation 'middle' does not exist: it is right, left or filter."),
        ({"turns": "last"}, "--turns 'last' does not exist: it is drawn or all."),
    ],
)
def test_other_ways_do_not_exist(option: dict[str, str], message_: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message_)):
        sft_rows(chats([TALK]), CHARS, 99, **option)  # type: ignore[arg-type]


def test_rows_are_computed_once_whatever_the_tokenizer_did_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    data = texts(["some words", "and more of them"])
    first = pretraining_rows(data, char_tokenizer(), 4)
    used = char_tokenizer()
    used(["a", "bcd"], padding=True, truncation=True, max_length=2)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("dllm.data.maps.document_ids", never)
    again = pretraining_rows(data, used, 4)
    assert again.to_list() == first.to_list()
    assert again.cache_files == first.cache_files
    with pytest.raises(AssertionError, match="computed again"):
        pretraining_rows(data, used, 5)
