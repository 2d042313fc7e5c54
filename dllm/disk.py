"""What is written to last: files and folders that are on the disk, whole, before they have their name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF)
"""What file systems answer that keep nothing back, or cannot be asked."""


def put_in_place(unfinished: Path, place: Path, old: Path | None = None) -> None:
    """Gives a file or a folder its name once all of it is on the disk: after a power failure no name is without its content.

    Args:
        unfinished: what is whole, under another name of the same folder or file system.
        place: its name.
        old: where a folder that has that name is moved to before.

    Raises:
        OSError: something cannot be written, such as for want of room.
    """
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    if old is not None and place.exists():
        os.replace(place, old)
    os.replace(unfinished, place)
    sync(place.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk and not only in the machine's memory.

    Raises:
        OSError: they cannot be written, such as for want of room.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(handle)
