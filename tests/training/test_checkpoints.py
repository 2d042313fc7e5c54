"""Which checkpoints are whole, whatever a killed process, a full disk or a broken copy left of them."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dllm.training.checkpoints import SEAL, UNFINISHED, fault, last_whole, no_room, put_in_place, rotate, seal

FILES = {"model.safetensors": 900, "optimizer.pt": 1500, "trainer_state.json": 20, "global_step2/rank_0.pt": 300}


def make_checkpoint(folder: Path, sealed: bool = True) -> Path:
    for name, size in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    if sealed:
        seal(folder)
    return folder


def test_a_sealed_checkpoint_is_whole(tmp_path: Path) -> None:
    assert fault(make_checkpoint(tmp_path)) is None
    seal(tmp_path)  # once more changes nothing
    assert fault(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([SEAL, *{name.split("/")[0] for name in FILES}])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [None, 0, 19])
def test_a_file_that_is_gone_or_cut_is_found(tmp_path: Path, name: str, keep: int | None) -> None:
    make_checkpoint(tmp_path)
    if keep is None:
        (tmp_path / name).unlink()
        assert fault(tmp_path) == f"{name} is not there"
    else:
        os.truncate(tmp_path / name, keep)
        assert fault(tmp_path) == f"{name} has {keep} bytes and was saved with {FILES[name]:,}"


@pytest.mark.parametrize("content", [None, "", '{"model.safetens'])
def test_a_checkpoint_without_a_whole_seal_is_not_whole(tmp_path: Path, content: str | None) -> None:
    make_checkpoint(tmp_path, sealed=False)
    if content is not None:
        (tmp_path / SEAL).write_text(content)
    assert fault(tmp_path) == "files.json, which is written last, is not there"


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished, folder = tmp_path / UNFINISHED / "checkpoint-2", tmp_path / "checkpoint-2"
    make_checkpoint(unfinished)
    wanted = [os.path.relpath(path, unfinished) for path in [unfinished, *unfinished.rglob("*")]]
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        events.append(os.path.realpath(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def watched_replace(source: Path, target: Path) -> None:
        events.append(f"rename to {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    put_in_place(unfinished, folder)
    place = events.index("rename to checkpoint-2")
    assert sorted(events[:place]) == sorted(os.path.normpath(unfinished / name) for name in wanted)
    assert events[place + 1 :] == [str(tmp_path)], "the rename itself"
    assert fault(folder) is None


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOSPC, False)])
def test_a_file_system_that_cannot_wait_is_passed_over_and_a_full_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    unfinished, folder = tmp_path / UNFINISHED / "checkpoint-2", tmp_path / "checkpoint-2"
    make_checkpoint(unfinished)

    def fails(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    if passes:
        put_in_place(unfinished, folder)
    else:
        with pytest.raises(OSError, match="No space left") as caught:
            put_in_place(unfinished, folder)
        assert no_room(caught.value)
    assert folder.exists() is passes


def test_the_last_whole_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    assert last_whole(tmp_path) is None
    for step in (9, 10, 100):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    for name in ("checkpoint-final", "checkpoint-200.old", "other"):
        make_checkpoint(tmp_path / name)
    (tmp_path / "checkpoint-300").write_text("a file")
    make_checkpoint(tmp_path / "checkpoint-400", sealed=False)
    assert last_whole(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "checkpoint-100" / "optimizer.pt").unlink()
    assert last_whole(tmp_path) == tmp_path / "checkpoint-10"


def test_a_folder_gets_its_place_whole_and_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint-2"
    for content in ("first", "second"):
        unfinished = tmp_path / UNFINISHED / "checkpoint-2"
        unfinished.mkdir(parents=True)
        (unfinished / content).write_text(content)
        put_in_place(unfinished, place)
        assert [path.name for path in place.iterdir()] == [content]
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("saved", "keep", "best", "left"),
    [
        ([2, 4, 6], 2, None, [4, 6]),
        ([2, 4, 6], 1, None, [6]),
        ([2, 4, 6], None, None, [2, 4, 6]),
        ([2, 4, 6], 0, None, [2, 4, 6]),
        ([2, 4, 6], 2, 2, [2, 6]),
        ([2, 4, 6], 1, 2, [2, 6]),
        ([9, 10, 100], 2, None, [10, 100]),
        ([6, 8, 2, 4], 2, None, [2, 4]),  # a run that went back
    ],
)
def test_the_oldest_checkpoints_go(
    saved: list[int], keep: int | None, best: int | None, left: list[int], tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-1").write_text("a file")
    for time, step in enumerate(saved):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (1000 + time, 1000 + time))
    rotate(tmp_path, keep, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    names = {"checkpoint-final", "checkpoint-1", *(f"checkpoint-{step}" for step in left)}
    assert {path.name for path in tmp_path.iterdir()} == names


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file({"x": torch.zeros(100_000)}, path),
    "torch": lambda path: torch.save({"x": torch.zeros(100_000)}, path),
    "python": lambda path: path.write_bytes(bytes(400_000)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_for_which_there_is_no_room_is_known_whoever_writes(tmp_path: Path, writer: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(Exception, match=r"File too large|inline_container") as caught:
            WRITERS[writer](tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert no_room(caught.value)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(RuntimeError) as caught:
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert not no_room(caught.value)
    assert not no_room(PermissionError(errno.EACCES, "no"))
    assert not no_room(ValueError("loss is not finite"))
    assert no_room(OSError(errno.ENOSPC, "No space left on device"))
    assert no_room(OSError(errno.EDQUOT, "Disk quota exceeded"))
