"""Rebuild `dllm/data/assets/wordnet.tsv.xz`, the dictionary behind `builtin:wordnet`, and its licence beside it.

Source: WordNet 3.0, copyright 2006 by Princeton University, as the Debian package `wordnet-base` carries it. Its licence
permits use, copies, changes and distribution for any purpose, and wants its notice on every copy: this script writes the
notice, from the head of the data itself, to `wordnet.LICENSE.txt`.

What is kept: of every set of synonyms the one word that WordNet counted most often in that sense, if it is a single word in
small letters; and of those the senses that WordNet's editors found in the texts that they read (`cntlist.rev`) or gave an
example of. What is dropped: synonyms and examples that use one of them in the word's place, relations, quotations with an
author, glosses that call a word coarse or offensive or that are about sex, and the hundred or so glosses whose quotation
marks do not match.

    apt-get install -y --no-install-recommends wordnet-base
    python scripts/build_builtin_wordnet.py

The output depends on the package alone: the same data give the same bytes.
"""

from __future__ import annotations

import argparse
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
OUTPUT = Path(__file__).resolve().parents[1] / "dllm" / "data" / "assets" / "wordnet.tsv.xz"
FILES = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
"""Ending of WordNet's files -> part of speech."""
KINDS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
"""WordNet's number in a sense key -> ending of its files; 5 is an adjective beside a head word."""
NOTICE_LINES = 29

_GLOSS = re.compile(
    r'(?P<definition>[^"]+?)(?:; (?P<examples>"[^"]*"(?: ?- ?[^";]+)?(?:; "[^"]*"(?: ?- ?[^";]+)?)*))?;?'
)
_EXAMPLE = re.compile(r'"([^"]*)"( ?- ?[^";]+)?')
_OFFENSIVE = re.compile(
    r"\b(slurs?|(?:coarse|offensive) (?:term|name|word)s?|obscen\w+|vulgar|derogatory|disparag\w+"
    r"|sex(?:ual\w*)?|erotic\w*|copulat\w+|genital\w*|prostitut\w+|whores?|rape[ds]?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Sense:
    """A word in one meaning."""

    word: str
    part: str
    count: int
    """How often WordNet's editors found it in the texts that they read."""
    number: int
    """Among the senses of this word and part of speech, the commonest first."""
    definition: str
    examples: tuple[str, ...]


def read_counts(path: Path) -> dict[tuple[str, str, int], int]:
    """(word, ending, sense number) -> occurrences, from `cntlist.rev`."""
    counts = {}
    for line in path.read_text(encoding="ascii").splitlines():
        key, number, count = line.split()
        word, _, place = key.partition("%")
        counts[word, KINDS[place[0]], int(number)] = int(count)
    return counts


def read_numbers(path: Path) -> dict[tuple[str, str], int]:
    """(word, offset of its synonyms) -> sense number, from an index file, which lists a word's senses in their order."""
    numbers = {}
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith(" "):  # the licence
            continue
        word, _, count, *rest = line.split()
        for number, offset in enumerate(rest[-int(count) :], start=1):
            numbers[word, offset] = number
    return numbers


def parse_gloss(gloss: str) -> tuple[str, tuple[str, ...]] | None:
    """Definition and examples; None where the quotation marks do not match."""
    match = _GLOSS.fullmatch(gloss)
    if match is None:
        return None
    found = _EXAMPLE.findall(match["examples"] or "")
    return tidy(match["definition"]), tuple(tidy(text) for text, author in found if text and not author)


def read_irregular(folder: Path) -> dict[str, list[str]]:
    """Word -> forms such as "ran", which do not begin as it does, from the .exc files."""
    forms: dict[str, list[str]] = {}
    for ending in FILES:
        for line in (folder / f"{ending}.exc").read_text(encoding="ascii").splitlines():
            form, *words = line.split()
            for word in words:
                forms.setdefault(word, []).append(form)
    return forms


def uses(example: str, word: str, irregular: list[str]) -> bool:
    """Whether an example has the word itself, in any of its forms, and not a synonym."""
    stem = re.sub("[ey]$", "", word) if len(word) > 3 else word
    forms = "|".join([*map(re.escape, irregular), f"{stem}[a-z]{{,4}}"])
    return re.search(rf"\b(?:{forms})\b", example.lower()) is not None


def tidy(text: str) -> str:
    """Puts blanks right, and writes `this' as 'this'."""
    return re.sub(r"\s+", " ", text.replace("`", "'")).replace(" ;", ";").strip(" ;")


def senses(
    folder: Path, ending: str, counts: dict[tuple[str, str, int], int], irregular: dict[str, list[str]]
) -> Iterator[Sense]:
    """Yields the senses that are kept of one part of speech."""
    numbers = read_numbers(folder / f"index.{ending}")
    for line in (folder / f"data.{ending}").read_text(encoding="ascii").splitlines():
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition("|")
        offset, _, _, size, *rest = head.split()
        words = [re.sub(r"\(\w+\)$", "", word) for word in rest[: 2 * int(size, 16) : 2]]
        single = [(word, numbers[word, offset]) for word in words if re.fullmatch("[a-z]{2,}", word)]
        parsed = parse_gloss(gloss.strip())
        if not single or parsed is None or _OFFENSIVE.search(gloss):
            continue
        # of equal counts the first, as in WordNet's own order
        count, word, number = max(
            ((counts.get((word, ending, number), 0), word, number) for word, number in single), key=lambda each: each[0]
        )
        definition, given = parsed
        examples = tuple(text for text in given if uses(text, word, irregular.get(word, [])))
        if count or examples:
            yield Sense(
                word=word, part=FILES[ending], count=count, number=number, definition=definition, examples=examples
            )


def notice(folder: Path) -> str:
    """The licence at the head of the data, less its line numbers."""
    lines = (folder / "data.noun").read_text(encoding="ascii").splitlines()[:NOTICE_LINES]
    return "".join(re.sub(r"^ +\d+ ?", "", line).rstrip() + "\n" for line in lines)


def main() -> None:
    """Reads WordNet and writes the asset."""
    parser = argparse.ArgumentParser(description="Rebuild the dictionary behind builtin:wordnet.")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder with WordNet's files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the .xz file to write")
    arguments = parser.parse_args()
    folder: Path = arguments.wordnet
    if not (folder / "cntlist.rev").exists():
        parser.error(f"{folder} holds no cntlist.rev: install the Debian package wordnet-base, or give --wordnet")
    counts, irregular = read_counts(folder / "cntlist.rev"), read_irregular(folder)
    kept = [sense for ending in FILES for sense in senses(folder, ending, counts, irregular)]
    kept.sort(key=lambda sense: (sense.word, -sense.count, list(FILES.values()).index(sense.part), sense.number))
    rows = ["\t".join((sense.word, sense.part, sense.definition, *sense.examples)) for sense in kept]
    plain = "".join(f"{row}\n" for row in rows).encode("ascii")
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    arguments.output.write_bytes(lzma.compress(plain, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters))
    arguments.output.with_name("wordnet.LICENSE.txt").write_text(notice(folder), encoding="ascii")
    print(f"{len(kept)} senses of {len({sense.word for sense in kept})} words")
    print(f"{len(plain)} bytes, packed {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
