"""The text of each token of a canvas, also where one character is spread over several tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""
LONGEST = 4
"""Bytes of the longest character in UTF-8, and so the most tokens that can share one."""


class TokenPieces:
    """Splits a canvas into the texts of its tokens; what was decoded once is kept.

    A token of a byte-level vocabulary may be a part of a character. Neighbours are decoded together: a character stands at the
    first of its tokens and its other tokens are empty, and only bytes whose neighbours are not there yet come out as
    U+FFFD. The pieces of a run of tokens, joined, are the text of the run.

    Args:
        decode: the text of token ids, such as `tokenizer.decode`.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.known: dict[tuple[int, ...], str] = {}

    def __call__(self, tokens: Sequence[int | None]) -> list[str | None]:
        """The piece of each token: a text, or None where the token is None (a mask)."""
        pieces: list[str | None] = [None] * len(tokens)
        start = 0
        while start < len(tokens):
            if tokens[start] is None:
                start += 1
                continue
            end = start
            run: list[int] = []
            while end < len(tokens) and (token := tokens[end]) is not None:
                run.append(token)
                end += 1
            pieces[start:end] = self._of_run(run)
            start = end
        return pieces

    def _of_run(self, run: list[int]) -> list[str]:
        # each piece is what it adds to the text of the piece before it: some decoders drop the blank at a text's start
        pieces = [""] * len(run)
        before = first = 0
        for end in range(1, len(run) + 1):
            added = self._text(run[before:end])[len(self._text(run[before:first])) :]
            if added.endswith(HALF) and end < len(run) and end - first < LONGEST:
                continue
            if HALF in added:
                pieces[first:end] = [self._text([token]) for token in run[first:end]]
            else:
                pieces[first] = added
            before, first = first, end
        return pieces

    def _text(self, tokens: list[int]) -> str:
        key = tuple(tokens)
        if key not in self.known:
            self.known[key] = self.decode(tokens) if tokens else ""
        return self.known[key]
