"""Rebuild `dllm/data/assets/text.txt.xz`, the text behind `builtin:text`.

Source: the Debian package `sword-text-web` (module engWEB2015eb of the SWORD project), an English translation of the
Bible that its publishers, eBible.org, placed in the public domain. Licence of the text: public domain. The name of that
translation is a trademark for its unaltered text; this script drops headings, notes, numbering and repeated chapters,
so the result is called `builtin:text` and nothing else.

What is kept: the words of the verses and the titles of the psalms, one paragraph a blank-line block, one verse of
poetry a line. What is dropped: front matter, headings, footnotes, cross references, speaker labels, and any chapter
that mostly repeats an earlier one (Greek Daniel, 2 Kings against Isaiah, ...), so that a split by chapter is a fair
one.

    apt-get install -y --no-install-recommends sword-text-web
    python scripts/build_builtin_text.py

The output depends on the package alone: the same module gives the same bytes.
"""

from __future__ import annotations

import argparse
import html
import lzma
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

MODULE = Path("/usr/share/sword/modules/texts/ztext/engWEB2015eb")
OUTPUT = Path(__file__).resolve().parents[1] / "dllm" / "data" / "assets" / "text.txt.xz"
CHAPTER_SEPARATOR = "\f"

SHINGLE_WORDS = 8
REPEATED_FRACTION = 0.2  # a chapter with more than this share of its 8-word runs seen before is dropped

SCRAMBLED = frozenset({"EsthGr.4"})  # the module interleaves the verses of three chapters of Greek Esther here

_LENGTH_WRAP = 1 << 16
_DROPPED_ELEMENTS = ("note", "speaker", "reference", "title")
_BREAKS = re.compile(r"<div\b[^>]*\btype=\"(?:x-p|paragraph)\"[^>]*>|</?lg\b[^>]*>|</?list\b[^>]*>")
_LINES = re.compile(r"<l\b[^>]*>|<lb\b[^>]*>|</?item\b[^>]*>")
_CHAPTER = re.compile(
    r"<chapter\b[^>]*\bosisID=\"([^\"]+)\"[^>]*\bsID=[^>]*>(.*?)<chapter\b[^>]*\beID=\"\1\"[^>]*>", re.DOTALL
)


def read_entries(module: Path, testament: str) -> Iterator[str]:
    """Yields the entries of one testament of a SWORD zText module in reading order.

    A zText module is three files: `.bzs`, per compressed block its (offset, stored size, plain size); `.bzv`, per verse
    its (block, start, length), of 4, 4 and 2 bytes; `.bzz`, the zlib blocks. All numbers are little-endian.

    Args:
        module: the folder that holds the files.
        testament: `ot` or `nt`.
    """
    stored = (module / f"{testament}.bzz").read_bytes()
    blocks: list[bytes] = []
    for offset, size, plain_size in struct.iter_unpack("<III", (module / f"{testament}.bzs").read_bytes()):
        block = zlib.decompress(stored[offset : offset + size])
        if len(block) != plain_size:
            raise ValueError(
                f"{testament}.bzz: block {len(blocks)} has {len(block)} bytes and should have {plain_size}"
            )
        blocks.append(block)
    entries = list(struct.iter_unpack("<IIH", (module / f"{testament}.bzv").read_bytes()))
    starts = sorted({(block_index, start) for block_index, start, length in entries if length})
    ends = {
        (at, begin): (nxt if at == to else len(blocks[at])) for (at, begin), (to, nxt) in pairwise([*starts, (-1, 0)])
    }
    seen: set[tuple[int, int]] = set()
    for block_index, start, length in entries:
        # Two verses that the translation joins point at the same entry.
        if not length or (block_index, start) in seen:
            continue
        seen.add((block_index, start))
        # A length over 65,535 has lost its high bits: the start of the next entry tells them.
        end = start + length
        end += (ends[block_index, start] - end) // _LENGTH_WRAP * _LENGTH_WRAP
        yield blocks[block_index][start:end].decode("utf-8")


def clean(markup: str) -> str:
    """Turns the OSIS markup of one chapter into plain paragraphs.

    Args:
        markup: OSIS of one chapter.

    Returns:
        Paragraphs parted by one empty line; a paragraph of poetry has a line for each of its lines.
    """
    # From here to the split, white space is a blank only, a vertical tab parts paragraphs and a newline parts lines.
    text = re.sub(r"\s+", " ", markup)
    text = re.sub(r'<title\b[^>]*\bcanonical="true"[^>]*>(.*?)</title>', r"\v\1\v", text)
    for name in _DROPPED_ELEMENTS:
        # A note can stand between two words with no blank around it.
        text = re.sub(rf"<{name}\b[^>]*(?<!/)>.*?</{name}>", " ", text)
    text = _LINES.sub("\n", _BREAKS.sub("\v", text))
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    paragraphs = []
    for paragraph in text.split("\v"):
        lines = (tidy(line) for line in paragraph.split("\n"))
        body = "\n".join(line for line in lines if line)
        if body:
            paragraphs.append(body)
    return "\n\n".join(paragraphs)


def tidy(line: str) -> str:
    """Puts the blanks of one line right: one between words, none before a closing sign or after an opening one."""
    line = re.sub(r"\s+", " ", line).strip()
    line = re.sub(r" +([,.;:!?’”)])", r"\1", line)
    return re.sub(r"([“‘(]) +", r"\1", line)


def chapters(module: Path) -> Iterator[tuple[str, str]]:
    """Yields (OSIS chapter name, plain text) for every chapter of the module, in reading order."""
    for testament in ("ot", "nt"):
        for match in _CHAPTER.finditer(" ".join(read_entries(module, testament))):
            text = clean(match.group(2))
            if text and match.group(1) not in SCRAMBLED:
                yield match.group(1), text


def shingles(text: str) -> set[tuple[str, ...]]:
    """Returns the set of runs of `SHINGLE_WORDS` words, letters only and in lower case."""
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def without_repeats(named: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Drops the chapters that mostly repeat earlier ones.

    Returns:
        The texts that stay, and a line about each one dropped.
    """
    kept: list[str] = []
    dropped: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for name, text in named:
        own = shingles(text)
        share = len(own & seen) / max(len(own), 1)
        if share > REPEATED_FRACTION:
            dropped.append(f"{name}: {share:.0%} seen before")
        else:
            kept.append(text)
            seen |= own
    return kept, dropped


def main() -> None:
    """Reads the module and writes the asset."""
    parser = argparse.ArgumentParser(description="Rebuild the text behind builtin:text.")
    parser.add_argument("--module", type=Path, default=MODULE, help="folder with the zText files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the .xz file to write")
    arguments = parser.parse_args()
    if not (arguments.module / "ot.bzs").exists():
        parser.error(f"{arguments.module} holds no ot.bzs: install the Debian package sword-text-web, or give --module")
    kept, dropped = without_repeats(chapters(arguments.module))
    plain = CHAPTER_SEPARATOR.join(kept).encode("utf-8")
    # lc=4 and lp=pb=0 suit 8-bit text; xz stores no time, so the bytes depend on the text alone.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    packed = lzma.compress(plain, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_bytes(packed)
    print("\n".join(dropped))
    print(f"{len(kept)} chapters, {len(dropped)} repeated ones dropped")
    print(f"{len(plain)} bytes, packed {len(packed)} bytes")


if __name__ == "__main__":
    main()
