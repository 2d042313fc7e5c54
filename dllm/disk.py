"""What is written to last: there is room for it, and files and folders are on the disk, whole, before they have their name."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

from dllm.errors import OptionError

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


@contextmanager
def written_beside(place: Path) -> Iterator[Path]:
    """Where to write a file that is given its name at the end; an error deletes it, and leaves what has that name as it is.

    A link stays one: the file that it names is replaced.

    Raises:
        OSError: it cannot be written, such as for want of room.
    """
    place = place.resolve()
    unfinished = place.with_name(f"{place.stem}.unfinished{place.suffix}")
    try:
        yield unfinished
        put_in_place(unfinished, place)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def check_room(folder: Path, needed: float, what: str, remedy: str = "or name another folder") -> None:
    """Whether the disk of a folder has room for what is to be written there: found before any work is lost.

    Args:
        folder: it need not be there yet.
        needed: bytes.
        what: takes them, with its verb, such as "the weights take".
        remedy: beside freeing space.

    Raises:
        OptionError: it has not.
    """
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OptionError(
            f"The disk of {folder} has {decimal(free, precision=2)} free, and {what} {decimal(round(needed), precision=2)}: "
            f"free some space, {remedy}."
        )


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
