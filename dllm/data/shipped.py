"""Texts that come inside the package: how one is unpacked, and the numbers that split and shuffle it."""

from __future__ import annotations

import hashlib
import lzma
from importlib import resources

from dllm.errors import DataError, did_you_mean


def read(name: str) -> str:
    """Returns the text of a file in `assets`, which may be an .xz file."""
    stored = resources.files("dllm.data").joinpath("assets", name).read_bytes()
    return (lzma.decompress(stored) if name.endswith(".xz") else stored).decode("utf-8")


def text_hash(text: str) -> int:
    """Returns a 64-bit number that is the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def check_split(name: str, split: str) -> None:
    """Makes sure that a split is `train` or `test`.

    Raises:
        DataError: it is another one.
    """
    if split not in ("train", "test"):
        raise DataError(f"{name} has no split {split!r}.{did_you_mean(split, ('train', 'test'))}")
