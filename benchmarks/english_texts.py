"""Held-out text for english.py: spans of the built-in text that training has not seen, and held-out words."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from dllm.data.text import chapters


def spans(n: int, characters: int, texts: Sequence[str] | None = None) -> list[str]:
    """n spans of whole words, evenly spread over the test chapters.

    Args:
        n: how many.
        characters: of each span, at most.
        texts: in place of the test chapters.
    """
    texts = [text for text in (chapters("test") if texts is None else texts) if len(text) > characters]
    ends = list(accumulate(map(len, texts)))
    found = []
    for number in range(n):
        place = int((number + 0.5) * ends[-1] / n)
        which = bisect_right(ends, place)
        text = texts[which]
        begin = min(place - (ends[which - 1] if which else 0), len(text) - characters - 1)
        begin = text.find(" ", max(begin, 0)) + 1 if begin > 0 else 0
        end = text.rfind(" ", begin, begin + characters + 1)
        found.append(text[begin : end if end > begin else begin + characters])
    return found
