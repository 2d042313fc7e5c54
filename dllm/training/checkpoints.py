"""Which checkpoints are whole: a process can be killed, and a disk can fill up, in the middle of a save.

A checkpoint is written into the folder `unfinished` and gets its place by a rename once it is whole. Its last file,
`files.json`, gives the size of every other: without it, or where a size differs, as in a broken copy, a checkpoint is not
whole, and `--resume_from_checkpoint auto` passes it over. What it holds is on the disk before the rename: after a power
failure no name is there without its content.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

from dllm import disk

SEAL = "files.json"
UNFINISHED = "unfinished"
"""The folder of an output folder in which everything is written first; what a killed run left there is worth nothing."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch.save does not pass on what the system said, only where its writer noticed
_TORCH_WRITER = ("inline_container.cc", "PytorchStreamWriter", "iostream error")


def seal(folder: Path) -> None:
    """Writes down that a checkpoint is whole; by a rename, so that the seal itself is there entirely or not at all."""
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    unfinished = folder / f"{SEAL}.unfinished"
    unfinished.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / SEAL)


def fault(folder: Path) -> str | None:
    """What keeps a checkpoint from being whole; None where nothing does."""
    try:
        sizes: dict[str, int] = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return f"{SEAL}, which is written last, is not there"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is not there"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and was saved with {size:,}"
    return None


def last_whole(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step in an output folder."""
    numbered = sorted(_numbered(folder), reverse=True)
    return next((path for _, path in numbered if fault(path) is None), None)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a step, whole or not."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir())
    return [(int(match[1]), path) for match, path in found if match]


def has_checkpoints(folder: Path) -> bool:
    """Whether an output folder holds a checkpoint or a final model, whole or not."""
    return any(folder.glob("checkpoint-*"))


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Gives a folder that is whole its name; what had that name before is deleted afterwards."""
    disk.put_in_place(unfinished, folder, old=unfinished.with_name(f"{folder.name}.old"))
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def rotate(folder: Path, keep: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints of an output folder.

    Args:
        folder: the output folder.
        keep: how many stay; all for None or 0.
        best: the folder of one that stays whatever its age.
    """
    # by the time of saving: a run that went back to an earlier step writes the newest checkpoints under lower numbers
    found = [path for _, path in sorted(_numbered(folder), key=lambda each: (each[1].stat().st_mtime, each[0]))]
    spare = [path for path in found[:-1] if best is None or path != Path(best)]
    for path in spare[: max(0, len(found) - keep) if keep and keep > 0 else 0]:
        shutil.rmtree(path, ignore_errors=True)


def no_room(error: BaseException) -> bool:
    """Whether something could not be written for want of space: a full disk, a quota, a limit of a file's size."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    text = str(error)
    quoted = any(f"(os error {number})" in text for number in _NO_ROOM)  # by safetensors
    return quoted or (isinstance(error, RuntimeError) and any(words in text for words in _TORCH_WRITER))
