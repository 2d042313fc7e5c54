"""Splitting the built-in text: whether a chapter is a test chapter depends on its own words alone."""

from __future__ import annotations

import hashlib

from dllm.data.text import TEST_ONE_IN, chapters


def is_test(chapter: str) -> bool:
    return int(hashlib.blake2b(chapter.encode(), digest_size=8).hexdigest(), 16) % TEST_ONE_IN == 0


def test_the_split_of_a_chapter_is_a_hash_of_its_words() -> None:
    assert all(map(is_test, chapters("test")))
    assert not any(map(is_test, chapters("train")))


def test_chapters_are_in_reading_order() -> None:
    train = chapters("train")
    assert train[0].startswith("In the beginning, God created")
    begins = ["Now these are the names of the sons of Israel", "The book of the genealogy of Jesus Christ"]
    places = [next(i for i, text in enumerate(train) if text.startswith(begin)) for begin in begins]
    assert places == sorted(places)


def test_a_caller_cannot_change_what_the_next_one_gets() -> None:
    chapters("test").clear()
    assert len(chapters("test")) == 70
