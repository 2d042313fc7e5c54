"""Which columns of a source are used, and how a row becomes a text or a conversation.

A conversation is a list of {"role", "content"} messages. Known forms of a row, in this order:

    messages                       [{"role": ..., "content": ...}, ...]
    conversations, conversation    the same, or ShareGPT's [{"from": ..., "value": ...}, ...]
    prompt + completion            strings, or lists of messages; also prompt + response
    instruction [+ input] + output one question and its answer; also with response for output
    text                           plain text, to pretrain on

A column `system` beside them is the system prompt, where the conversation brings none of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dllm.errors import DataError

CONVERSATIONS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
"""ShareGPT's names of the speakers, and ours."""

Conversation = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class ColumnNames:
    """Columns that the user named; None where they are to be found."""

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    system: str | None = None

    def of_conversations(self) -> bool:
        """Whether columns of conversations were named."""
        return any((self.messages, self.prompt, self.completion))


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a row is read."""

    kind: Literal["text", "messages", "pair"]
    columns: tuple[str, ...]
    """What every row has: one column, or prompt and answer."""
    extra: str | None = None
    """A column that adds to the prompt, where a row has it."""
    system: str | None = None
    """A column with the system prompt, where a row has it."""

    @property
    def column(self) -> str:
        """What comes of it: `text` or `messages`."""
        return "text" if self.kind == "text" else "messages"

    def used(self, there: Sequence[str]) -> list[str]:
        """Those of a table's columns that are read."""
        wanted = (*self.columns, self.extra, self.system)
        return [name for name in there if name in wanted]

    def convert(self, row: Mapping[str, Any], place: str) -> str | Conversation:
        """A row's text or conversation.

        Args:
            row: the columns.
            place: how an error calls the row, such as "a.jsonl, line 3".

        Raises:
            DataError: a column that the row has not, or that holds something else.
        """
        for name in self.columns:
            if name not in row:
                raise DataError(
                    f"{place}: there is no column {name!r}; the row has {', '.join(row)}. {_flag(self.column)}"
                )
        if self.kind == "text":
            value = row[self.columns[0]]
            if not isinstance(value, str):
                raise DataError(f"{place}: {self.columns[0]!r} is {str(value)[:60]!r}, and it has to be a string.")
            return value
        messages = self._messages(row, place)
        check_conversation(messages, f"{place}: the messages")
        system = row.get(self.system) if self.system else None
        if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return [{"role": message["role"], "content": message["content"]} for message in messages]

    def _messages(self, row: Mapping[str, Any], place: str) -> Any:
        if self.kind == "messages":
            value = row[self.columns[0]]
            return [_message(part) for part in value] if isinstance(value, list) else value
        parts: Conversation = []
        for role, name in zip(("user", "assistant"), self.columns, strict=True):
            value = row[name]
            if isinstance(value, list):
                parts += [_message(part) for part in value]
            elif isinstance(value, str):
                more = row.get(self.extra) if self.extra and role == "user" else None
                value = f"{value}\n\n{more}" if isinstance(more, str) and more.strip() else value
                parts.append({"role": role, "content": value})
            else:
                raise DataError(f"{place}: {name!r} is {str(value)[:60]!r}, and it has to be a string or messages.")
        return parts


def _message(part: Any) -> Any:
    """A message with ShareGPT's keys and names in ours; anything else as it is."""
    if isinstance(part, dict) and part.get("from") is not None and part.get("role") is None:
        return {"role": ROLES.get(part["from"], part["from"]), "content": part.get("value")}
    return part


def find_format(there: Sequence[str], task_column: str, names: ColumnNames, place: str) -> RowFormat:
    """The form of a source's rows.

    Args:
        there: the columns that it has.
        task_column: "text" to pretrain on, where conversations do as well; "messages" to fine-tune on.
        names: what the user named.
        place: how an error calls the source.

    Raises:
        DataError: a column that was named is not there, or no known form fits.
    """
    for name in (names.text if task_column == "text" else None, names.messages, names.prompt, names.completion):
        if name is not None and name not in there:
            raise DataError(
                f"{place}: there is no column {name!r}; it has {', '.join(there)}.{_nearest([name], there)} "
                f"{_flag('text' if name == names.text else 'messages')}"
            )
    system = names.system or "system"
    if names.system and names.system not in there:
        raise DataError(
            f"{place}: there is no column {names.system!r}; it has {', '.join(there)}. See --system_column."
        )
    if task_column == "text" and not names.of_conversations() and (names.text or "text" in there):
        return RowFormat(kind="text", columns=(names.text or "text",))
    if names.prompt or names.completion:
        pairs: Sequence[tuple[str, str]] = [(names.prompt or "prompt", names.completion or "completion")]
        columns: Sequence[str] = []
    else:
        pairs, columns = ([], [names.messages]) if names.messages else (PAIRS, CONVERSATIONS)
    for column in columns:
        if column in there:
            return RowFormat(kind="messages", columns=(column,), system=system)
    for question, answer in pairs:
        if question in there and answer in there:
            extra = "input" if question == "instruction" else None
            return RowFormat(kind="pair", columns=(question, answer), extra=extra, system=system)
    if bool(names.prompt) != bool(names.completion):
        given, other = ("prompt", "completion") if names.prompt else ("completion", "prompt")
        raise DataError(
            f"{place}: --{given}_column {getattr(names, given)} goes with --{other}_column, and there is no column {other!r}: "
            f"name that one too. It has {', '.join(there)}."
        )
    near = _nearest([names.text or "text"], there) if task_column == "text" else _nearest_form(there)
    if len(there) == 1 and (separator := next((s for s in ";\t|" if s in there[0]), "")):
        near = f" Fields seem to be separated by {separator!r}: a .csv has commas, a .tsv has tabs."
    raise DataError(
        f"{place}: there is no column {task_column!r}{_OTHERS[task_column]}; it has {', '.join(there)}.{near} "
        f"{_flag(task_column)}"
        + " Text without answers is for dllm pretrain."
        * (task_column == "messages" and "text" in there)
    )


_OTHERS = {"text": "", "messages": ", nor conversations, prompt and completion, or instruction and output"}


def _flag(column: str) -> str:
    if column == "text":
        return "Name the right one with --text_column."
    return "Name the right one with --messages_column, or two with --prompt_column and --completion_column."


def _nearest(wanted: Sequence[str], there: Sequence[str], cutoff: float = 0.6) -> str:
    for name in wanted:
        if close := difflib.get_close_matches(name, there, n=1, cutoff=cutoff):
            return f" Did you mean {close[0]!r}?"
    return ""


def _nearest_form(there: Sequence[str]) -> str:
    """What columns of conversations may be meant: a column of them, or two of questions and answers."""
    if near := _nearest(CONVERSATIONS, there, cutoff=0.75):  # a question is none of them
        return near
    found = [[difflib.get_close_matches(name, there, n=1) for name in pair] for pair in PAIRS]
    pairs = [(question[0], answer[0]) for question, answer in found if question and answer and question != answer]
    if not pairs and len(there) == 2:
        pairs = [(there[0], there[1])]
    return f" Did you mean --prompt_column {pairs[0][0]} --completion_column {pairs[0][1]}?" if pairs else ""


def check_conversation(messages: Any, what: str = "A row's messages") -> None:
    """Whether something is a conversation.

    Args:
        messages: anything.
        what: how the error calls it.

    Raises:
        DataError: it is none.
    """
    good = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not good:
        raise DataError(
            f'{what} are {str(messages)[:80]!r}: they are a list like [{{"role": "user", "content": "..."}}, '
            f'{{"role": "assistant", "content": "..."}}].'
        )
