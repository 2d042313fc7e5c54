"""What the sampling commands are asked: prompts from words, files of lines, files of JSON lines, and standard input."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, get_args

from dllm.data.columns import check_conversation
from dllm.errors import DataError, OptionError, did_you_mean

PromptsFormat = Literal["auto", "lines", "jsonl"]
PROMPT_KEYS = ("prompt", "messages")
ANSWER_KEYS = (
    "row",
    "text",
    "spans",
    "solved",
    "steps",
    "nfe",
    "new_tokens",
    "tokens_per_forward",
    "seconds",
    "exact",
    "error",
)
"""What an answer's record adds to the keys of its request."""


_UNDECODED = re.compile("[\udc80-\udcff]")
"""What stands for a byte that is not UTF-8."""
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")
"""How a file of UTF-16 begins, byte by byte."""


@dataclass
class Request:
    """One prompt, and what came with it."""

    row: int
    """Its place among all requests; it keys the row's noise."""
    given: dict[str, Any]
    """`prompt` (text) or `messages`, and the other keys of its line."""
    error: str | None = None
    """Why it cannot be answered."""
    from_file: bool = False
    """A bad one from a file fails alone; a bad word of the command line ends the command."""

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """Text or a conversation."""
        found: str | list[dict[str, str]] = self.given.get("messages") or self.given["prompt"]
        return found

    @property
    def title(self) -> str:
        """Text, or the last thing that was said."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


def read_requests(words: Sequence[str], path: Path | None, form: str = "auto") -> list[Request]:
    """The prompts of a command line, in its order: words, then those of a file.

    Args:
        words: prompts; a lone "-" is standard input.
        path: a file of prompts, or "-".
        form: of the file: `lines` (a prompt a line, empty ones left out), `jsonl` (an object a line with `prompt` or
            `messages`; other keys are carried over to the answer), or `auto`, by the suffix.

    Raises:
        OptionError: the file cannot be read or holds nothing, or standard input is named twice.
    """
    if form not in get_args(PromptsFormat):
        raise OptionError(f"--prompts_format {form!r} does not exist.{did_you_mean(form, get_args(PromptsFormat))}")
    if list(words) == ["-"]:
        if path is not None:
            raise OptionError("- is standard input, and --prompts_file names a file: give one of them.")
        words, path = [], Path("-")
    if any(map(_UNDECODED.search, words)):
        raise OptionError(
            "A prompt of the command line is not UTF-8: write it into a file, and name that with --prompts_file."
        )
    requests = [Request(row, {"prompt": word}) for row, word in enumerate(words)]
    if path is None:
        if form != "auto":
            raise OptionError("--prompts_format says how --prompts_file is read: give one, or - for standard input.")
        return requests
    text = _read(path).removeprefix("\ufeff")  # how Windows marks UTF-8
    if text.startswith(_UTF16):
        raise OptionError(f"--prompts_file {path} is UTF-16: save it as UTF-8.")
    json_lines = form == "jsonl" or (form == "auto" and path.suffix in (".jsonl", ".ndjson"))
    # not splitlines(), which also breaks at characters that may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        row = len(requests)
        if _UNDECODED.search(line):
            shown = line.encode(errors="surrogateescape").decode(errors="replace")[:200]
            requests.append(Request(row, {"line": shown}, f"line {number}: this is not UTF-8.", True))
            continue
        requests.append(_of_json(row, line, number) if json_lines else Request(row, {"prompt": line}, None, True))
    if len(requests) == len(words):
        raise OptionError(f"--prompts_file {path} holds no prompt.")
    return requests


def _read(path: Path) -> str:
    """A file's text, or standard input's where it is "-"; each byte that is not UTF-8 is a lone surrogate."""
    try:
        if str(path) != "-":
            return path.read_text(encoding="utf-8", errors="surrogateescape")
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        return sys.stdin.read()
    except OSError as error:
        raise OptionError(f"--prompts_file {path} cannot be read: {error}") from error


def _of_json(row: int, line: str, number: int) -> Request:
    """The request of a JSON line; what is wrong with the line becomes its error."""

    def bad(what: str, given: Any = None) -> Request:
        kept = {key: value for key, value in given.items() if key not in ANSWER_KEYS} if given else {"line": line[:200]}
        return Request(row, kept, f"line {number}: {what}", True)

    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        return bad(f"this is no JSON object: {error}")
    if not isinstance(given, dict):
        return bad('this is no JSON object: write {"prompt": "..."} or {"messages": [...]}')
    there = [key for key in PROMPT_KEYS if key in given]
    if len(there) != 1:
        near = did_you_mean(next(iter(given), ""), PROMPT_KEYS) if not there else " Keep one."
        return bad(f"it has {' and '.join(there) or 'neither prompt nor messages'}.{near}", given)
    taken = [key for key in given if key in ANSWER_KEYS]
    if taken:
        return bad(f"its key {taken[0]!r} is one that the answer uses: rename it.", given)
    if there == ["messages"]:
        try:
            check_conversation(given["messages"], "messages")
        except DataError as error:
            return bad(str(error), given)
    elif not isinstance(given["prompt"], str):
        return bad(f"its prompt is {str(given['prompt'])[:80]}: it is a text.", given)
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # "\ud800" is JSON, and no character
        return bad("it holds half of a surrogate pair, which is no character.", given)
    return Request(row, given, None, True)
