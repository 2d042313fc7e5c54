"""`scripts/build_builtin_text.py`: the zText reader and the mark-up stripper, on a small module made here."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_builtin_text.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_builtin_text", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_module(folder: Path, books: list[list[bytes]], order: list[tuple[int, int]] | None = None) -> None:
    """Writes the three files of a testament; `order` lists (book, entry) as the verse index shall name them."""
    blocks = [b"".join(entries) for entries in books]
    packed = [zlib.compress(block) for block in blocks]
    offsets = [sum(map(len, packed[:i])) for i in range(len(packed))]
    index = order if order is not None else [(b, e) for b, entries in enumerate(books) for e in range(len(entries))]
    verses = [(b, sum(map(len, books[b][:e])), len(books[b][e]) % 65_536) for b, e in index]
    (folder / "ot.bzz").write_bytes(b"".join(packed))
    sizes = zip(offsets, packed, blocks, strict=True)
    (folder / "ot.bzs").write_bytes(b"".join(struct.pack("<III", o, len(p), len(b)) for o, p, b in sizes))
    (folder / "ot.bzv").write_bytes(struct.pack("<IIH", 0, 0, 0) + b"".join(struct.pack("<IIH", *v) for v in verses))


def test_reads_entries_in_index_order_once_each(script: ModuleType, tmp_path: Path) -> None:
    write_module(tmp_path, [[b"one", b"two"], [b"three"]], [(0, 1), (0, 1), (0, 0), (1, 0)])
    assert list(script.read_entries(tmp_path, "ot")) == ["two", "one", "three"]


def test_restores_lengths_that_overflowed(script: ModuleType, tmp_path: Path) -> None:
    long = b"x" * 70_000
    write_module(tmp_path, [[b"a", long, b"b"], [long]])
    assert list(map(len, script.read_entries(tmp_path, "ot"))) == [1, 70_000, 1, 70_000]


def test_reports_a_damaged_block(script: ModuleType, tmp_path: Path) -> None:
    write_module(tmp_path, [[b"one"]])
    (tmp_path / "ot.bzs").write_bytes(struct.pack("<III", 0, (tmp_path / "ot.bzz").stat().st_size, 99))
    with pytest.raises(ValueError, match="block 0 has 3 bytes and should have 99"):
        list(script.read_entries(tmp_path, "ot"))


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ('<w lemma="x">God</w><note placement="foot">a <q>note</q></note><w>made</w> <w>it</w> . ', "God made it."),
        ('One.<div eID="g" type="x-p"/> <div sID="h" type="x-p"/>Two &amp; three.', "One.\n\nTwo & three."),
        ('<lg sID="a"/><l level="1" sID="b"/>First,<l eID="b"/> <l sID="c"/>second.<l eID="c"/>', "First,\nsecond."),
        ('<title canonical="true" type="psalm">A song.</title>Praise!', "A song.\n\nPraise!"),
        ("<title>Heading</title><speaker>Lover</speaker>Rise , my love", "Rise, my love"),
        ('He said, “ <q who="x">Come</q> ” ( now ).', "He said, “Come” (now)."),
    ],
)
def test_strips_markup(script: ModuleType, markup: str, plain: str) -> None:
    assert script.clean(markup) == plain


def test_drops_chapters_that_repeat(script: ModuleType) -> None:
    first = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60))
    other = " ".join(f"term{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60))
    kept, dropped = script.without_repeats([("A.1", first), ("B.1", other), ("C.1", first.upper())])
    assert kept == [first, other]
    assert dropped == ["C.1: 100% seen before"]
