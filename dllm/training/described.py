"""How a field of an arguments dataclass says what it is: its text is the option's help on the command line."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def described(text: str, **kwargs: Any) -> Any:
    """A dataclass field with a help text.

    Args:
        text: the help.
        **kwargs: of `dataclasses.field`.
    """
    return field(metadata={"help": text}, **kwargs)
