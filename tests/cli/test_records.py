"""Statistics of a row, and the file of answers: what was written stays, what was not is written, nothing is mixed."""

from __future__ import annotations

import fcntl
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm.cli.records import AnswerFile, statistics
from dllm.cli.requests import Request
from dllm.engine.tickets import Answer
from dllm.errors import OptionError
from dllm.sampling.config import SamplingConfig

SETTINGS = {"command": "generate", "temperature": 0.5, "cfg_keep_tokens": (1, 2)}
REQUESTS = [Request(row, {"prompt": f"prompt {row}", "id": row * 7}) for row in range(4)]


def record(row: int) -> dict[str, Any]:
    return {"row": row, **REQUESTS[row].given, "text": f"é {row}", "steps": row}


def write(path: Path, *rows: int, **changes: Any) -> AnswerFile:
    with AnswerFile(path, {**SETTINGS, **changes}, REQUESTS) as answers:
        for row in rows:
            answers.write(record(row))
    return answers


def test_a_row_costs_the_forwards_it_took_part_in() -> None:
    canvas = torch.zeros(3, dtype=torch.int64)
    assert statistics(Answer(canvas, 10, 30, seconds=1.73456, waited=0.5), SamplingConfig(cfg_scale=1.0)) == {
        "steps": 10,
        "nfe": 20,
        "new_tokens": 30,
        "tokens_per_forward": 1.5,
        "seconds": 1.2346,
        "exact": True,
    }
    nothing = statistics(Answer(canvas, 0, 0, seconds=0.0), SamplingConfig(cache="dual"))
    assert (nothing["nfe"], nothing["tokens_per_forward"], nothing["exact"]) == (0, 0.0, False)


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, SETTINGS, REQUESTS) as answers:
        assert answers.done == set()
        for row in (0, 1):
            answers.write(record(row))
            assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == list(range(row + 1))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [record(0), record(1)]


@given(st.data())
def test_whatever_is_cut_off_a_later_run_goes_on_with_the_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "answers.jsonl"
    write(path, 0, 2, 3)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    answers = write(path)
    whole = content[:cut].count(b"\n")
    assert answers.done == {*[0, 2, 3][:whole]}
    write(path, *[0, 2, 3][whole:], 1)  # one that comes late takes its place in the end
    first, *others = content.splitlines(keepends=True)
    assert path.read_bytes() == b"".join([first, json.dumps(record(1)).encode() + b"\n", *others])


def test_rows_with_an_error_are_tried_again_and_come_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, SETTINGS, REQUESTS) as answers:
        answers.write(record(0))
        answers.write({"row": 1, **REQUESTS[1].given, "error": "too long"})
        answers.write(record(2))
        assert answers.errors == 1
    mended = [REQUESTS[0], Request(1, {"prompt": "shorter"}), *REQUESTS[2:]]
    with AnswerFile(path, SETTINGS, mended) as answers:
        assert (answers.errors, answers.done) == (0, {0, 2})
        assert [json.loads(line)["row"] for line in path.read_bytes().splitlines()] == [0, 2]
        with pytest.raises(
            OptionError, match="another run is writing to it"
        ):  # the file that took its place is held too
            AnswerFile(path, SETTINGS, mended)
        answers.write({"row": 1, "prompt": "shorter", "text": "b"})
    assert [json.loads(line)["row"] for line in path.read_bytes().splitlines()] == [0, 1, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.settings.json"]


def test_a_run_that_is_stopped_tells_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", 0)
    answers = AnswerFile(tmp_path / "a.jsonl", SETTINGS, REQUESTS)
    answers.write(record(1))
    answers.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == f"\n{tmp_path / 'a.jsonl'}: 2 rows. The same command goes on."


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a full disk is: whatever goes beyond fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 0)
    whole = path.read_bytes()
    with (
        files_of_at_most(len(whole) + 10),
        AnswerFile(path, SETTINGS, REQUESTS) as answers,
        pytest.raises(
            OptionError, match=r"a\.jsonl cannot be written any more: File too large\. .* the same command goes on"
        ),
    ):
        answers.write(record(1))
    assert path.read_bytes()[: len(whole)] == whole
    assert write(path, 1).done == {0}
    assert path.read_bytes() == whole + json.dumps(record(1)).encode() + b"\n"


def test_a_disk_that_is_full_at_the_start_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    with files_of_at_most(0), pytest.raises(OptionError, match=r"a\.jsonl cannot be written: File too large\."):
        AnswerFile(tmp_path / "a.jsonl", SETTINGS, REQUESTS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    write(tmp_path / "a.jsonl", 0)
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS, REQUESTS) as answers:
        answers.write({"row": 1, **REQUESTS[1].given, "error": "too long"})
    before = (tmp_path / "a.jsonl").read_bytes()
    with files_of_at_most(3), pytest.raises(OptionError, match=r"a\.jsonl cannot be written: File too large\."):
        AnswerFile(tmp_path / "a.jsonl", SETTINGS, REQUESTS)  # which would take the error out
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.settings.json"]


def test_a_file_that_took_its_place_meanwhile_is_the_one_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run replaces the file between this one's opening and its lock."""
    path, lock = tmp_path / "a.jsonl", fcntl.flock
    write(path, 0)
    (tmp_path / "new").write_bytes(path.read_bytes() + json.dumps(record(1)).encode() + b"\n")

    def late(file: Any, operation: int) -> None:
        if (tmp_path / "new").exists():
            (tmp_path / "new").rename(path)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with AnswerFile(path, SETTINGS, REQUESTS) as answers:
        assert answers.done == {0, 1}
        answers.write(record(2))
    assert [json.loads(line)["row"] for line in path.read_bytes().splitlines()] == [0, 1, 2]


def test_a_link_stays_one_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real.jsonl", tmp_path / "a.jsonl"
    real.touch(mode=0o640)
    link.symlink_to(real)
    with AnswerFile(link, SETTINGS, REQUESTS) as answers:
        answers.write({"row": 1, **REQUESTS[1].given, "error": "too long"})
        answers.write(record(0))
    assert write(link, 1).done == {0}
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert [json.loads(line)["row"] for line in real.read_bytes().splitlines()] == [0, 1]


def test_an_error_of_a_prompt_that_is_there_no_more_is_forgotten(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS, REQUESTS) as answers:
        answers.write(record(0))
        answers.write({"row": len(REQUESTS) - 1, **REQUESTS[-1].given, "error": "too long"})
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS, REQUESTS[:-1]) as answers:
        assert answers.done == {0}


def test_keys_that_are_carried_over_may_hold_what_equals_nothing(tmp_path: Path) -> None:
    requests = [Request(0, {"prompt": "a", "score": math.nan})]
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS, requests) as answers:
        answers.write({"row": 0, **requests[0].given, "text": "b"})
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS, requests) as answers:
        assert answers.done == {0}


def test_more_prompts_may_follow(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 0, 1)
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS, [*REQUESTS, Request(4, {"prompt": "new"})]) as answers:
        assert answers.done == {0, 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"temperature": 0.7},
            r"holds answers of temperature=0\.5, and now it is 0\.7: give the same, or name another",
        ),
        ({"cfg_keep_tokens": ()}, r"cfg_keep_tokens=\[1, 2\], and now it is \[\]"),
        ({"command": "infill"}, "command='generate', and now it is 'infill'"),
        ({"new": 3}, "new=None, and now it is 3"),
    ],
)
def test_other_settings_are_an_error_and_the_file_stays(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 0)
    before = path.read_bytes() + b'{"half'
    path.write_bytes(before)
    with pytest.raises(OptionError, match=message):
        write(path, **changes)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (REQUESTS[:1], "line 2 answers row 1, and there are 1 prompts: these are other prompts"),
        ([REQUESTS[0], Request(1, {"prompt": "changed", "id": 7})], "line 2 answers another prompt than row 1 is now"),
        ([REQUESTS[0], Request(1, {"prompt": "prompt 1", "id": 8})], "line 2 answers another prompt than row 1 is now"),
        ([REQUESTS[1], REQUESTS[0]], "line 1 answers another prompt than row 0 is now"),
    ],
)
def test_other_prompts_are_an_error_and_the_file_stays(requests: list[Request], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 0, 1)
    before = path.read_bytes()
    with pytest.raises(OptionError, match=message):
        AnswerFile(path, SETTINGS, requests)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b"text\n", b"[]\n", b'{"row": "x"}\n', b'{"text": "a"}\n', b"\xff\n"])
def test_a_file_of_something_else_is_an_error(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    with pytest.raises(
        OptionError, match=r"is not empty, and a\.jsonl\.settings\.json that tells its settings is missing"
    ):
        write(path)
    write(tmp_path / "other.jsonl").beside.rename(tmp_path / "a.jsonl.settings.json")
    with pytest.raises(OptionError, match=r"line 1 is no answer\. Delete that line, or name another file"):
        write(path)
    assert path.read_bytes() == line


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    with (
        AnswerFile(tmp_path / "a.jsonl", SETTINGS, REQUESTS),
        pytest.raises(OptionError, match="another run is writing to it"),
    ):
        AnswerFile(tmp_path / "a.jsonl", SETTINGS, REQUESTS)
    write(tmp_path / "a.jsonl")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--output .*a\.jsonl cannot be written: No such file"):
        write(tmp_path / "nowhere" / "a.jsonl")
