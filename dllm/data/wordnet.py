"""The dictionary behind `builtin:wordnet`: words, what they mean, and examples, from WordNet 3.0.

`assets/README.md` says what was chosen, `assets/wordnet.LICENSE.txt` on which terms; `scripts/build_builtin_wordnet.py` builds
it. A word lies in one split with all its senses, and so does every other word of which a definition is the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dllm.data.shipped import check_split, read, text_hash

TEST_ONE_IN = 21
"""One group of words in this many, on average, is in the test split: about a thousand words."""
WORDS_OF_A_SENTENCE = 5
"""An example of fewer is a phrase, and no answer to who asks for a sentence."""

_ASSET = "wordnet.tsv.xz"
_ASKED = (
    'What does the {part} "{word}" mean?',
    'Define the {part} "{word}".',
    'What is the meaning of "{word}" as {article} {part}?',
    'Explain the {part} "{word}" to me.',
)
_ASKED_FOR_WORD = (
    "Which {part} means: {definition}?",
    "Find {article} {part} that means: {definition}.",
    "What is {article} {part} for this: {definition}?",
)
_ASKED_FOR_SENTENCE = (
    'Use the {part} "{word}" in a sentence.',
    'Give me an example of the {part} "{word}".',
    'Write a sentence with the {part} "{word}".',
)


@dataclass(frozen=True, kw_only=True)
class Sense:
    """A word in one meaning."""

    word: str
    part: str
    """`noun`, `verb`, `adjective` or `adverb`."""
    definition: str
    examples: tuple[str, ...]
    """Phrases and sentences that use the word; often none."""


def senses(split: str) -> list[Sense]:
    """Returns the senses of one split's words, in alphabetical order, a word's commonest sense first.

    Args:
        split: `train` or `test`.

    Raises:
        DataError: the split is unknown.
    """
    return [sense for group in _words(split) for sense in group]


def definitions(split: str) -> list[Sense]:
    """Returns the commonest sense of each word as each part of speech that it is, in alphabetical order: to ask for one.

    Raises:
        DataError: the split is unknown.
    """
    first: dict[tuple[str, str], Sense] = {}
    for sense in senses(split):
        first.setdefault((sense.word, sense.part), sense)
    return list(first.values())


def entries(split: str) -> list[str]:
    """Returns a text for each word of a split: a line for each sense, such as `bank (verb): tip laterally. "..."`.

    The order is one that mixes the alphabet, so that the first n are of every kind.

    Raises:
        DataError: the split is unknown.
    """
    texts = ["\n".join(map(_entry, group)) for group in _words(split)]
    return sorted(texts, key=text_hash)


def questions(split: str) -> list[tuple[str, str]]:
    """Returns questions with their answers, in an order that mixes the alphabet.

    Each of `definitions` gives a question for its meaning, one for the word that has it, and one for a sentence where there is
    an example that is one. Of several phrasings a hash of the word chooses.

    Raises:
        DataError: the split is unknown.
    """
    pairs = [pair for sense in definitions(split) for pair in _questions_of(sense)]
    return sorted(pairs, key=lambda pair: text_hash(pair[0]))


def _entry(sense: Sense) -> str:
    examples = "".join(f' "{example}"' for example in sense.examples)
    return f"{sense.word} ({sense.part}): {sense.definition}.{examples}"


def _questions_of(sense: Sense) -> list[tuple[str, str]]:
    word, part, definition = sense.word, sense.part, sense.definition
    article, number = "a" if part in ("noun", "verb") else "an", text_hash(f"{word} {part}")

    def asked(phrasings: tuple[str, ...]) -> str:
        return phrasings[number % len(phrasings)].format(word=word, part=part, article=article, definition=definition)

    pairs = [
        (asked(_ASKED), f'The {part} "{word}" means: {definition}.'),
        (asked(_ASKED_FOR_WORD), f'The {part} "{word}".'),
    ]
    sentence = next((text for text in sense.examples if len(text.split()) >= WORDS_OF_A_SENTENCE), None)
    if sentence is not None:
        end = "" if sentence[-1] in ".!?" else "."
        pairs.append((asked(_ASKED_FOR_SENTENCE), f"{sentence[0].upper()}{sentence[1:]}{end}"))
    return pairs


def _words(split: str) -> list[tuple[Sense, ...]]:
    """The senses of each word of a split."""
    check_split("wordnet", split)
    return [group for group, is_test in _all_words() if is_test == (split == "test")]


@functools.cache
def _all_words() -> tuple[tuple[tuple[Sense, ...], bool], ...]:
    """The senses of every word with whether it is a test word."""
    words: dict[str, list[Sense]] = {}
    for line in read(_ASSET).splitlines():
        word, part, definition, *examples = line.split("\t")
        sense = Sense(word=word, part=part, definition=definition, examples=tuple(examples))
        words.setdefault(word, []).append(sense)
    leaders = _leaders(words)
    return tuple((tuple(group), text_hash(leaders[word]) % TEST_ONE_IN == 0) for word, group in words.items())


def _leaders(words: dict[str, list[Sense]]) -> dict[str, str]:
    """For each word the first, in alphabetical order, of those that it has to share a split with."""
    leader = {word: word for word in words}

    def find(word: str) -> str:
        while leader[word] != word:
            word = leader[word]
        return word

    defined: dict[str, str] = {}
    for word, group in words.items():
        for sense in group:
            a, b = find(word), find(defined.setdefault(sense.definition, word))
            leader[max(a, b)] = min(a, b)
    return {word: find(word) for word in words}
