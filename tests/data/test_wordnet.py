"""`builtin:wordnet`: the split, and what is made of a word."""

from __future__ import annotations

import hashlib
import re
from importlib import resources

import pytest

from dllm.data.builtin import BUILTIN
from dllm.data.wordnet import Sense, _leaders, _questions_of, definitions, entries, questions, senses
from dllm.errors import DataError

SPLITS = ("train", "test")
COURAGE = Sense(
    word="courage",
    part="noun",
    definition="a quality of spirit",
    examples=("his courage", "it took courage to speak to them"),
)


def test_the_splits_share_no_word_and_no_definition() -> None:
    train, test = map(senses, SPLITS)
    for what in ("word", "definition"):
        assert not {getattr(sense, what) for sense in train} & {getattr(sense, what) for sense in test}, what
    assert len(train) + len(test) == 37_310
    assert len({sense.word for sense in test}) == 1_034


def test_a_word_is_one_text_with_all_its_senses() -> None:
    for split in SPLITS:
        texts, words = entries(split), {sense.word for sense in senses(split)}
        assert len(texts) == len(words) == BUILTIN["wordnet"].default_rows["text"][split]
        assert {text.split(" (")[0] for text in texts} == words
        assert sum(text.count("\n") + 1 for text in texts) == len(senses(split))
        beginnings = {text[0] for text in texts[:100]}
        assert len(beginnings) > 15, "the first rows are of the whole alphabet"
    (bank,) = [text for text in entries("train") if text.startswith("bank (")]
    lines = bank.splitlines()
    assert lines[0].startswith("bank (noun): sloping land (especially the slope beside a body of water). ")
    assert lines[0].endswith('"he sat on the bank of the river and watched the currents"')


def test_text_is_plain_and_decent() -> None:
    whole = "\n".join(entries("train") + entries("test"))
    assert whole.isascii()
    assert not re.search(r"[\t|`]| {2}|\n\n|ethnic slur|offensive term", whole)


def test_questions_ask_for_the_commonest_sense() -> None:
    for split in SPLITS:
        asked = questions(split)
        assert len(asked) == BUILTIN["wordnet"].default_rows["messages"][split]
        assert all(question[-1] in ".?" or question.endswith(" to me.") for question, _ in asked)
        assert all(not answer[0].islower() for _, answer in asked)
    first = {(sense.word, sense.part): sense for sense in reversed(senses("test"))}
    assert [first[sense.word, sense.part] for sense in definitions("test")] == definitions("test")
    meanings = {answer for _, answer in questions("test")}
    assert all(f'The {s.part} "{s.word}" means: {s.definition}.' in meanings for s in definitions("test"))


def test_a_sense_gives_a_question_for_its_meaning_its_word_and_a_sentence() -> None:
    meaning, word, sentence = _questions_of(COURAGE)
    assert '"courage"' in meaning[0]
    assert meaning[1] == 'The noun "courage" means: a quality of spirit.'
    assert "a quality of spirit" in word[0]
    assert "courage" not in word[0]
    assert word[1] == 'The noun "courage".'
    assert sentence[1] == "It took courage to speak to them."
    phrase = Sense(word="red", part="adjective", definition="of a colour", examples=("the red house",))
    assert len(_questions_of(phrase)) == 2, "a phrase is no sentence"


def test_words_that_share_a_definition_go_together() -> None:
    def group(word: str, *meanings: str) -> tuple[str, list[Sense]]:
        return word, [Sense(word=word, part="noun", definition=meaning, examples=()) for meaning in meanings]

    words = dict([group("d", "1", "2"), group("c", "3"), group("b", "2", "4"), group("a", "4"), group("e", "5", "3")])
    assert _leaders(words) == {"a": "a", "b": "a", "d": "a", "c": "c", "e": "c"}


def test_it_never_changes() -> None:
    """Published results name these rows: a change here is a change of the data set."""
    made = [entries("train"), entries("test"), questions("train"), questions("test")]
    digests = [hashlib.sha256("\f".join(map(str, rows)).encode()).hexdigest()[:16] for rows in made]
    assert digests == ["143ac6007ff22dcc", "cb34200b744a888f", "99efca2989de1925", "7c55d327b447afa9"]


def test_its_licence_lies_beside_it() -> None:
    notice = resources.files("dllm.data").joinpath("assets", "wordnet.LICENSE.txt").read_text(encoding="ascii")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice
    assert "Permission to use, copy, modify and distribute this software and\ndatabase" in notice
    assert notice.endswith("Princeton University and LICENSEE agrees to preserve same.\n")


def test_another_split_is_refused() -> None:
    with pytest.raises(DataError, match=r"wordnet has no split 'tset'. Did you mean 'test'"):
        senses("tset")
