"""Names that are given last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import datasets
import pytest

from dllm.data.prepared import Manifest, write_prepared
from dllm.disk import check_room, put_in_place
from dllm.errors import OptionError
from dllm.pipelines.llada.tokenizer import char_tokenizer


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is waited for, and what is renamed, in their order."""
    told: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        told.append(Path(os.path.realpath(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def watched_replace(source: Path, target: Path) -> None:
        told.append(f"{Path(source).name} > {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    return told


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[str]) -> None:
    (tmp_path / "new").write_text("b")
    (tmp_path / "name").write_text("a")
    put_in_place(tmp_path / "new", tmp_path / "name")
    assert events == ["new", "new > name", tmp_path.name]
    assert (tmp_path / "name").read_text() == "b"


def test_a_folder_is_moved_aside_if_asked(tmp_path: Path, events: list[str]) -> None:
    for name in ("new", "name"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    put_in_place(tmp_path / "new", tmp_path / "name", old=tmp_path / "old")
    assert events == ["file", "new", "name > old", "new > name", tmp_path.name]
    assert [(tmp_path / name / "file").read_text() for name in ("name", "old")] == ["new", "name"]


def test_prepared_rows_are_on_the_disk_before_their_folder_has_its_name(tmp_path: Path, events: list[str]) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    told = dict(task="pretrain", dataset_args="x", max_length=2, truncation=None, turns=None, tokenizer="", versions={})
    manifest = Manifest(**told, train=2, test=0)  # type: ignore[arg-type]
    write_prepared(tmp_path / "rows", manifest, char_tokenizer(), rows, None)
    place = events.index("rows.unfinished > rows")
    assert {"prepared.json", "dataset_info.json", "tokenizer.json", "rows.unfinished"} <= {*events[:place]}
    assert events[place + 1 :] == [tmp_path.name]


def test_a_small_disk_is_told_in_units_that_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tmp_path / "not" / "there", 1, "it takes")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_room(tmp_path, 1_500, "it takes")
    with pytest.raises(OptionError) as error:
        check_room(tmp_path / "out", 2.5e6, "it takes")
    assert str(error.value) == (
        f"The disk of {tmp_path / 'out'} has 1.50 kB free, and it takes 2.50 MB: free some space, or name another folder."
    )
