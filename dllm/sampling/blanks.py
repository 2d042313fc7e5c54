"""Blanks in a text: `[MASK:3]` is three tokens to be written."""

from __future__ import annotations

import re
from typing import Any

from dllm.errors import OptionError

BLANK = re.compile(r"\[MASK:(\d+)\]")
_NEARLY_BLANK = re.compile(r"\[ *mask *(?:[:;=] *[\w-]*|\d+)? *\]", re.IGNORECASE)


def brings_spaces(tokenizer: Any) -> bool:
    """Whether a tokenizer's words begin with the space before them, as in BPE; a character's do not."""
    two = tokenizer("a a", add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(two[:-1])).endswith("a")


def expand_blanks(text: str, mask_token: str, *, take_space: bool = False) -> str:
    """A text in which every `[MASK:n]` is n mask tokens.

    Args:
        text: with blanks.
        mask_token: the tokenizer's.
        take_space: the space before `[MASK:n]` belongs to it, for what is written there brings its own (see `brings_spaces`);
            the one between two blanks stays.

    Raises:
        OptionError: no tokens (`[MASK:0]`), too many, or something that was meant to be a blank.
    """

    def masks(match: re.Match[str]) -> str:
        count = int(match[1])
        if not 1 <= count <= 100_000:
            raise OptionError(f"{match[0]} is no blank: its number of tokens is from 1 to 100000.")
        return mask_token * count

    rest = BLANK.sub("", text)
    wrong = [match for match in _NEARLY_BLANK.findall(rest) if match not in (mask_token, "[MASK]")]
    if wrong:
        raise OptionError(f"{wrong[0]!r} is no blank. Did you mean '[MASK:3]', a blank of three tokens?")
    if "[MASK]" in rest and mask_token not in ("", "[MASK]"):
        raise OptionError("'[MASK]' is no token of this tokenizer. Did you mean '[MASK:1]'?")
    parts: list[str] = []
    end = 0
    for match in BLANK.finditer(text):
        before = text[end : match.start()]
        between = (parts and before == " ") or (mask_token and before.endswith(mask_token + " "))
        parts += [before.removesuffix(" ") if take_space and not between else before, masks(match)]
        end = match.end()
    return "".join([*parts, text[end:]])
