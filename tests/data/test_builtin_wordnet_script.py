"""`scripts/build_builtin_wordnet.py`, on a small dictionary made here in WordNet's format."""

from __future__ import annotations

import importlib.util
import lzma
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_builtin_wordnet.py"
LICENCE = "".join(f"  {n} line {n} of the licence  \n" for n in range(1, 30))
NOUNS = """\
00000001 06 n 02 motorcar 0 car 0 001 @ 00000009 n 0000 | a motor vehicle ; "he needs a car"; "no auto here"
00000002 06 n 01 car 1 000 | where passengers ride; "the car was full"- Mark Twain
00000003 06 n 01 Paris 0 000 | a city; "Paris in spring"
00000004 06 n 01 unseen 0 000 | nowhere found and without an example
00000005 06 n 01 lout 0 000 | offensive term for a person; "you lout"
00000006 06 n 01 broken 0 000 | marks that do not match; "one
00000007 06 n 01 ice_cream 0 000 | frozen dessert; "he likes ice cream"
"""
VERBS = '00000001 30 v 01 go 0 000 01 + 01 00 | move, usually `away\'; "he went home"; "she leaves"\n'
ADJECTIVES = '00000001 00 s 01 galore(ip) 0 000 | in abundance; "food galore";\n'


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_builtin_wordnet", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_builtin_wordnet"] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for ending, letter, lines in (
        ("noun", "n", NOUNS),
        ("verb", "v", VERBS),
        ("adj", "a", ADJECTIVES),
        ("adv", "r", ""),
    ):
        (folder / f"data.{ending}").write_text(LICENCE + lines)
        (folder / f"{ending}.exc").write_text("went go\n" if ending == "verb" else "")
        found: dict[str, list[str]] = {}
        for line in lines.splitlines():
            offset, _, _, size, *rest = line.split()
            for word in rest[: 2 * int(size) : 2]:
                found.setdefault(word.split("(")[0].lower(), []).append(offset)
        index = [f"{w} {letter} {len(o)} 1 @ {len(o)} 0 {' '.join(o)}\n" for w, o in found.items()]
        (folder / f"index.{ending}").write_text(LICENCE + "".join(index))
    (folder / "cntlist.rev").write_text("car%1:06:00:: 1 71\ncar%1:06:01:: 2 2\nmotorcar%1:06:00:: 1 1\n")
    return folder


def build(script: ModuleType, wordnet: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(sys, "argv", ["build", "--wordnet", str(wordnet), "--output", str(output)])
    script.main()
    return output.read_bytes()


def test_keeps_the_commonest_word_with_its_own_examples(
    script: ModuleType, wordnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = build(script, wordnet, tmp_path / "w.tsv.xz", monkeypatch)
    assert lzma.decompress(packed).decode().splitlines() == [
        "car\tnoun\ta motor vehicle\the needs a car",
        "car\tnoun\twhere passengers ride",
        "galore\tadjective\tin abundance\tfood galore",
        "go\tverb\tmove, usually 'away'\the went home",
    ]
    assert build(script, wordnet, tmp_path / "again.xz", monkeypatch) == packed
    notice = (tmp_path / "wordnet.LICENSE.txt").read_text()
    assert notice == "".join(f"line {n} of the licence\n" for n in range(1, 30))


def test_says_what_to_install(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        build(script, tmp_path, tmp_path / "w.xz", patch)
    assert "holds no cntlist.rev: install the Debian package wordnet-base, or give --wordnet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gloss", "parsed"),
    [
        ("a thing", ("a thing", ())),
        ('a thing; of a kind; "one thing"; "two things"', ("a thing; of a kind", ("one thing", "two things"))),
        ('a thing; "said so"- A. Writer; "one thing";', ("a thing", ("one thing",))),
        ('a "thing"; "one thing"', None),
        ('a thing; "one thing', None),
    ],
)
def test_parts_a_gloss(script: ModuleType, gloss: str, parsed: object) -> None:
    assert script.parse_gloss(gloss) == parsed


def test_an_example_has_to_use_the_word(script: ModuleType) -> None:
    assert script.uses("She is baking a cake", "bake", [])
    assert script.uses("they ran home", "run", ["ran"])
    assert script.uses("he hurried", "hurry", ["hurried"])
    assert not script.uses("the auto is red", "car", [])
    assert not script.uses("a scar", "car", [])
