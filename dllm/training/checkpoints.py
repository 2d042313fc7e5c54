"""Which checkpoints are whole: a process can be killed, and a disk can fill up, in the middle of a save.

The last file of a checkpoint, `files.json`, gives the size of every other. Without it, or where a size differs, a checkpoint
is not whole, and `--resume_from_checkpoint auto` passes it over.
"""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

SEAL = "files.json"
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
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir())
    numbered = sorted(((int(match[1]), path) for match, path in found if match), reverse=True)
    return next((path for _, path in numbered if fault(path) is None), None)


def never_saved(folder: Path) -> bool:
    """Whether a run began in an output folder and ended before its first checkpoint was whole."""
    saved = (folder / "checkpoint-final").exists() or any(folder.glob(f"checkpoint-*/{SEAL}"))
    return (folder / "log.jsonl").is_file() and not saved


def no_room(error: BaseException) -> bool:
    """Whether something could not be written for want of space: a full disk, a quota, a limit of a file's size."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    text = str(error)
    quoted = any(f"(os error {number})" in text for number in _NO_ROOM)  # by safetensors
    return quoted or (isinstance(error, RuntimeError) and any(words in text for words in _TORCH_WRITER))
