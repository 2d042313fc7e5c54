"""Every error that dllm raises for something a user can put right.

    DllmError
    ├── OptionError      an option that does not exist, or a value that it cannot take   (also a ValueError)
    ├── DataError        a data file, a row, a column or a data set name                 (also a ValueError)
    ├── CheckpointError  a model folder, a configuration, a tokenizer                    (also an OSError)
    ├── NonFiniteError   a loss, a gradient or logits that are NaN or infinite         (also an ArithmeticError)
    └── MissingExtraError  an optional package that is not installed                     (also an ImportError)

Each message says what was given, what is allowed and what to do next. The command line prints it without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class DllmError(Exception):
    """Base of all errors that dllm raises on purpose."""


class OptionError(DllmError, ValueError):
    """An option that does not exist, or a value that it cannot take."""


class DataError(DllmError, ValueError):
    """Something is wrong with a data set: its name, a file, a row or a column."""


class CheckpointError(DllmError, OSError):
    """Something is wrong with a model folder, its configuration or its tokenizer."""


class NonFiniteError(DllmError, ArithmeticError):
    """A loss or a gradient of training, or logits of a row that is sampled, are NaN or infinite."""

    rows: tuple[int, ...] = ()
    """Of many rows that were sampled, those that have no answer."""
    result: Any = None
    """What sampling gave, with the answers of all other rows (a `dllm.pipelines.llada.SamplingResult`)."""


class MissingExtraError(DllmError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: run  pip install 'dllm[{extra}]'")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Ends an error message about an unknown name.

    Args:
        name: what the user wrote.
        choices: the names that exist.

    Returns:
        `" Did you mean 'x'?"` where a close name exists, and the list of all names otherwise. It begins with a blank.
    """
    known = sorted(set(choices))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" It can be one of: {', '.join(known)}." if known else ""


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
