"""Prompts from words, lines and JSON lines; a bad line is an error of its row alone."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.cli.requests import ANSWER_KEYS, Request, read_requests
from dllm.errors import OptionError

TURNS = [{"role": "user", "content": "Why is the sky blue?"}]


def jsonl(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def test_words_come_before_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\n  two \r\n\nthree\x85 \u2028still three".encode())
    requests = read_requests(["one", "-x"], tmp_path / "prompts.txt")
    assert requests == [
        Request(0, {"prompt": "one"}),
        Request(1, {"prompt": "-x"}),
        Request(2, {"prompt": "  two "}, None, True),
        Request(3, {"prompt": "three\x85 \u2028still three"}, None, True),
    ]
    assert read_requests([], None) == []


@pytest.mark.parametrize("form", ["lines", "jsonl"])
@pytest.mark.parametrize(("words", "path"), [(["-"], None), ([], Path("-"))])
def test_a_dash_is_standard_input(
    words: list[str], path: Path | None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "a"}\n\n'))
    (request,) = read_requests(words, path, form)
    assert request == Request(0, {"prompt": "a" if form == "jsonl" else '{"prompt": "a"}'}, None, True)


def test_the_form_may_be_named_against_the_suffix(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a"})
    assert read_requests([], path)[0].prompt == "a"
    assert read_requests([], path, "lines")[0].prompt == '{"prompt": "a"}'
    other = path.rename(tmp_path / "prompts.txt")
    assert read_requests([], other, "jsonl")[0].prompt == "a"


keys = st.text(max_size=5).filter(lambda key: key not in {*ANSWER_KEYS, "prompt", "messages"})
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
texts = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.lists(st.tuples(texts, st.dictionaries(keys, values, max_size=3)), min_size=1, max_size=5), st.booleans())
def test_other_keys_are_carried_over(rows: list[tuple[str, dict[str, Any]]], ascii_only: bool) -> None:
    given_rows = [{**extra, "prompt": text} for text, extra in rows]
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in given_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines, newline=""))
        requests = read_requests(["-"], None, "jsonl")
    assert [request.given for request in requests] == given_rows
    assert [request.row for request in requests] == list(range(len(rows)))
    assert not any(request.error for request in requests)


def test_a_prompt_is_text_or_a_conversation(tmp_path: Path) -> None:
    first, second = read_requests([], jsonl(tmp_path, {"prompt": "hello"}, {"messages": TURNS}))
    assert (first.prompt, first.title) == ("hello", "hello")
    assert (second.prompt, second.title) == (TURNS, "Why is the sky blue?")


@pytest.mark.parametrize(
    ("line", "kept", "message"),
    [
        ('{"prompt": "half', {"line": '{"prompt": "half'}, "line 2: this is no JSON object: Unterminated string"),
        ("[1]", {"line": "[1]"}, 'line 2: this is no JSON object: write {"prompt": "..."}'),
        (
            {"promt": "a", "id": 3},
            {"promt": "a", "id": 3},
            "it has neither prompt nor messages. Did you mean 'prompt'?",
        ),
        ({}, {"line": "{}"}, "it has neither prompt nor messages. It can be one of: messages, prompt."),
        (
            {"prompt": "a", "messages": TURNS},
            {"prompt": "a", "messages": TURNS},
            "it has prompt and messages. Keep one.",
        ),
        ({"prompt": 3}, {"prompt": 3}, "its prompt is 3: it is a text."),
        ({"messages": []}, {"messages": []}, "messages are '[]': they are a list like"),
        ({"messages": [{"role": "user"}]}, {"messages": [{"role": "user"}]}, "they are a list like"),
        ({"prompt": "a", "text": "b"}, {"prompt": "a"}, "its key 'text' is one that the answer uses: rename it."),
        ('{"prompt": "\\ud800"}', {"prompt": "\ud800"}, "it holds half of a surrogate pair, which is no character."),
        ("[" * 100_000, {"line": "[" * 200}, "this is no JSON object"),
    ],
)
def test_a_bad_line_is_bad_alone(line: Any, kept: dict[str, Any], message: str, tmp_path: Path) -> None:
    before, bad, after = read_requests([], jsonl(tmp_path, {"prompt": "a"}, line, {"prompt": "b"}))
    assert [before.error, after.error] == [None, None]
    assert (bad.row, after.row) == (1, 2)
    assert bad.given == kept
    assert str(bad.error).startswith("line 2: ")
    assert message in str(bad.error)
    json.dumps(bad.given)  # it can be written down


@pytest.mark.parametrize(
    ("words", "path", "form", "message"),
    [
        ([], Path("absent.txt"), "auto", r"--prompts_file absent\.txt cannot be read: .*No such file"),
        ([], Path("empty.jsonl"), "auto", r"--prompts_file empty\.jsonl holds no prompt"),
        (["a"], Path("empty.jsonl"), "auto", "holds no prompt"),
        (["-"], Path("empty.jsonl"), "auto", "- is standard input, and --prompts_file names a file: give one of them"),
        (["a"], None, "jsonl", "--prompts_format says how --prompts_file is read"),
        ([], Path("empty.jsonl"), "json", "--prompts_format 'json' does not exist. Did you mean 'jsonl'"),
    ],
)
def test_what_cannot_be_read_is_an_error(
    words: list[str], path: Path | None, form: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n \n")
    with pytest.raises(OptionError, match=message):
        read_requests(words, path, form)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_line_that_is_not_utf8_fails_alone_and_a_mark_of_windows_is_left_out(suffix: str, tmp_path: Path) -> None:
    written = ['{"prompt": "a"}', '{"prompt": "où"}', '{"prompt": "où"}'] if suffix == "jsonl" else ["a", "où", "où"]
    encoded = [written[0].encode("utf-8-sig"), written[1].encode("latin-1"), written[2].encode()]
    (tmp_path / f"p.{suffix}").write_bytes(b"\r\n".join(encoded))
    first, second, third = read_requests([], tmp_path / f"p.{suffix}")
    assert (first.given, first.error, third.given, third.error) == ({"prompt": "a"}, None, {"prompt": "où"}, None)
    assert second.error == "line 2: this is not UTF-8."
    assert second.given == {"line": written[1].replace("ù", "\ufffd")}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_told_by_its_name(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa\r\nb\r\n".encode(encoding))
    with pytest.raises(OptionError, match=r"p\.txt is UTF-16: save it as UTF-8"):
        read_requests([], tmp_path / "p.txt")


def test_a_word_that_is_not_utf8_is_told() -> None:
    with pytest.raises(OptionError, match=r"A prompt of the command line is not UTF-8: write it into a file"):
        read_requests(["a", "o\udcf9"], None)
