"""The text behind `builtin:text`: about 4.8 MB of English, one row a chapter.

`assets/README.md` names its source and licence; `scripts/build_builtin_text.py` builds it.
"""

from __future__ import annotations

import functools

from dllm.data.shipped import check_split, read, text_hash

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
    check_split("text", split)
    return [chapter for chapter, is_test in _all_chapters() if is_test == (split == "test")]


@functools.cache
def _all_chapters() -> tuple[tuple[str, bool], ...]:
    """Returns every chapter with whether it is a test chapter."""
    texts = read(_ASSET).split(_CHAPTER_SEPARATOR)
    return tuple((text, text_hash(text) % TEST_ONE_IN == 0) for text in texts)
