"""Gives a chat template the marks that fine-tuning needs: another template, with equal text, that says what the assistant says.

Templates are programs, so the marks are not put into the source's: conversations of sentinels are rendered, what stands between
the sentinels is read off, and a template is written from that. It is taken only if it renders like the source's on conversations
that were not used to make it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
LEADING = {"start": (), "system": ("system",), "user": ("user",), "assistant": ("user", "assistant")}
"""What came before -> a conversation that ends there."""
SENTINEL = "Q{}zXq"
"""Of letters and a number, which templates leave as it is."""
_PAD = " \n "

_CONTENTS = (
    "What is 2 + 3?",
    "  Five.\n",
    "Ünï🎉 \"quotes\" 'and' {{ braces }} {% if %} \\n",
    "Two\n\nparagraphs",
    "<b>",
    "last",
    "x",
)
_SHAPES = ("u", "ua", "uau", "uaua", "uauau", "su", "sua", "suau", "suaua")
"""Conversations to compare: s, u and a for the roles."""

_TEMPLATE = """\
{{%- set before = {before} -%}}
{{%- set after = {after} -%}}
{{%- set at = namespace(place='start') -%}}
{{%- for message in messages -%}}
{{%- set role = message['role'] -%}}
{{%- if role not in before[at.place] -%}}
{{{{- raise_exception('This chat template has no place for ' ~ role ~ ' after ' ~ at.place) -}}}}
{{%- endif -%}}
{{%- set content = message['content'] | trim if role in {trimmed} else message['content'] -%}}
{{{{- before[at.place][role] -}}}}
{{%- if role == 'assistant' -%}}
{{% generation %}}{{{{ {lead} + content + {turn_end} }}}}{{% endgeneration %}}
{{%- else -%}}
{{{{- content -}}}}
{{%- endif -%}}
{{%- set at.place = role -%}}
{{%- endfor -%}}
{{{{- after[at.place] -}}}}
{{%- if add_generation_prompt -%}}
{{{{- {prompt} -}}}}
{{%- endif -%}}
"""


@dataclass(frozen=True)
class MarkedTemplate:
    """A template with `{% generation %}` marks."""

    text: str
    turn_end: str
    """The special token with which the assistant's turns end, with blanks that stand before it."""


def source_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A tokenizer's chat template; of several, the one for plain conversations."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def mark_template(tokenizer: PreTrainedTokenizerBase) -> MarkedTemplate | None:
    """A template that renders as the tokenizer's, with what the assistant says marked, its end-of-turn included: all that the
    model writes behind the prompt for an answer.

    It has roles system, user and assistant, where the source has them; tools are not carried over.

    Returns:
        None where there is no template, or where none that is equal could be made: one that writes the day, drops parts of a
        conversation, or ends the assistant's turns without a special token.
    """
    template = source_template(tokenizer)
    if template is None or "strftime_now" in template:
        return None
    source = Rendering(tokenizer, template)
    before: dict[str, dict[str, str]] = {place: {} for place in LEADING}
    after: dict[str, str] = {"start": ""}
    for (place, leading), role in itertools.product(LEADING.items(), ROLES):
        # a template that writes the system's words into the user's turn shows them only when that comes
        ending, followed = source.pieces([*leading, role]), source.pieces([*leading, role, "user"])
        if ending is not None:
            after.setdefault(role, ending[-1])
        if (pieces := ending or followed) is not None:
            before[place][role] = pieces[len(leading)]
    if "assistant" not in after or "user" not in before["start"]:
        return None
    turn_end = _turn_end(tokenizer, after["assistant"])
    ends = [after["assistant"], *before["assistant"].values()]
    if turn_end is None or not all(text.startswith(turn_end) for text in ends):
        return None
    before["assistant"] = {role: text.removeprefix(turn_end) for role, text in before["assistant"].items()}
    after["assistant"] = after["assistant"].removeprefix(turn_end)
    asked, trimmed = source.pieces(["user"], prompt=True), source.trimmed_roles()
    if asked is None or not asked[-1].startswith(after["user"]) or trimmed is None:
        return None
    # what stands between the prompt for an answer and its words is written by the model: it is marked with them
    lead = before["user"]["assistant"].removeprefix(asked[-1]) if "assistant" in before["user"] else ""
    if lead == before["user"].get("assistant"):
        lead = ""
    if not all(roles.get("assistant", lead).endswith(lead) for roles in before.values()):
        return None
    for roles in before.values():
        if "assistant" in roles:
            roles["assistant"] = roles["assistant"].removesuffix(lead)
    text = _TEMPLATE.format(
        before=_literal(before),
        after=_literal(after),
        trimmed=_literal(trimmed),
        lead=ascii(lead),
        turn_end=ascii(turn_end),
        prompt=ascii(asked[-1].removeprefix(after["user"])),
    )
    return MarkedTemplate(text, turn_end) if _equal(source, Rendering(tokenizer, text)) else None


class Rendering:
    """What a template makes of conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template

    def text(self, roles: Any, contents: Any, *, prompt: bool = False) -> str | None:
        """The text, or None where the template refuses the conversation."""
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError):
            return None

    def pieces(self, roles: list[str], *, padded: str = "", prompt: bool = False) -> list[str] | None:
        """What stands before, between and after the contents; None where one of them is dropped, moved or repeated."""
        sentinels = [SENTINEL.format(i) for i in range(len(roles))]
        pads = [_PAD if role == padded else "" for role in roles]
        text = self.text(roles, [f"{pad}{each}{pad}" for pad, each in zip(pads, sentinels, strict=True)], prompt=prompt)
        pieces: list[str] = []
        for sentinel in sentinels:
            if text is None or text.count(sentinel) != 1:
                return None
            piece, _, text = text.partition(sentinel)
            pieces.append(piece)
        return None if text is None else [*pieces, text]

    def trimmed_roles(self) -> list[str] | None:
        """Roles whose contents lose the blanks around them; None where only one side does."""
        found = []
        for role, *conversation in (
            ("user", "user"),
            ("assistant", *LEADING["assistant"]),
            ("system", "system", "user"),
        ):
            place = conversation.index(role)
            plain, padded = self.pieces(conversation), self.pieces(conversation, padded=role)
            if plain is None or padded is None:
                continue
            if padded == plain:
                found.append(role)
                continue
            plain[place], plain[place + 1] = f"{plain[place]}{_PAD}", f"{_PAD}{plain[place + 1]}"
            if padded != plain:
                return None
        return found


def _turn_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """The special token that a text begins with, and blanks before it."""
    bare = text.lstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    token = max((token for token in special if bare.startswith(token)), key=len, default=None)
    return None if token is None else text[: len(text) - len(bare)] + token


def _literal(value: Any) -> str:
    """As Jinja reads it: its strings know Python's escapes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!a}: {_literal(each)}" for key, each in value.items()) + "}"
    return ascii(value)


def _equal(source: Rendering, made: Rendering) -> bool:
    """Whether two templates render alike, and refuse alike."""
    names = {role[0]: role for role in ROLES}
    for shape in _SHAPES:
        roles = [names[letter] for letter in shape]
        for shift in range(3):
            contents = [_CONTENTS[(i + shift) % len(_CONTENTS)] for i in range(len(roles))]
            for prompt in {False, shape[-1] != "a"}:
                if source.text(roles, contents, prompt=prompt) != made.text(roles, contents, prompt=prompt):
                    return False
    return True
