"""The text behind `builtin:text`: about 4.8 MB of English, one row a chapter.

`assets/README.md` names its source and licence; `scripts/build_builtin_text.py` builds it.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
from importlib import resources

from dllm.errors import DataError, did_you_mean

TEST_ONE_IN = 20
"""One chapter in this many, on average, is a test chapter."""

_ASSET = "text.txt.xz"
_CHAPTER_SEPARATOR = "\f"


def chapters(split: str) -> list[str]:
    """Returns the chapters of one split in reading order.

    Whether a chapter is a test chapter depends on its own words alone.

    Args:
        split: `train` or `test`.

    Returns:
        One string a chapter: paragraphs parted by an empty line, a line for each line of verse.

    Raises:
        DataError: the split is unknown.
    """
    if split not in ("train", "test"):
        raise DataError(f"text has no split {split!r}.{did_you_mean(split, ('train', 'test'))}")
    return [chapter for chapter, is_test in _all_chapters() if is_test == (split == "test")]


@functools.cache
def _all_chapters() -> tuple[tuple[str, bool], ...]:
    """Returns every chapter with whether it is a test chapter."""
    packed = resources.files("dllm.data").joinpath("assets", _ASSET).read_bytes()
    texts = lzma.decompress(packed).decode("utf-8").split(_CHAPTER_SEPARATOR)
    return tuple((text, _hash(text) % TEST_ONE_IN == 0) for text in texts)


def _hash(text: str) -> int:
    """Returns a 64-bit number that is the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
