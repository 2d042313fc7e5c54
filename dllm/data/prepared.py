"""Rows of ids that were made once, kept in a folder and memory-mapped by every run that uses them.

A folder holds what `datasets.DatasetDict.save_to_disk` writes, the tokenizer, and `prepared.json`, which says how the rows were
made. It is written under another name first and gets its own by a rename once it is on the disk, so a folder is whole or is not
there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import datasets
import transformers
from transformers import PreTrainedTokenizerBase

from dllm.data.cache import tokenizer_fingerprint
from dllm.disk import put_in_place
from dllm.errors import DataError, OptionError

MANIFEST = "prepared.json"
TOKENIZER = "tokenizer"
"""The folder of the tokenizer in a folder of rows."""
SHARD_ROWS = 250_000
"""Rows in a file, at most."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """How the rows of a folder were made."""

    task: str
    """pretrain or sft."""
    dataset_args: str
    max_length: int
    truncation: str | None
    turns: str | None
    """These two of fine-tuning alone."""
    tokenizer: str
    """Its fingerprint; see `dllm.data.cache`."""
    train: int
    test: int
    """Rows of each split."""
    versions: dict[str, str]


def write_prepared(
    folder: Path,
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    test: datasets.Dataset | None,
    *,
    workers: int | None = None,
) -> None:
    """Writes a folder of rows; in several processes if asked.

    Raises:
        OptionError: the folder cannot be written.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    splits = {"train": train, **({} if test is None else {"test": test})}
    shards = {name: max(workers or 1, -(-len(rows) // SHARD_ROWS)) for name, rows in splits.items()}
    shards = {name: min(count, len(splits[name])) for name, count in shards.items()}
    many = min(workers or 1, *shards.values())
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        datasets.DatasetDict(splits).save_to_disk(
            str(unfinished), num_shards=shards, num_proc=many if many > 1 else None
        )
        tokenizer.save_pretrained(unfinished / TOKENIZER)
        text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n"
        (unfinished / MANIFEST).write_text(text, encoding="utf-8")
        put_in_place(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OptionError(f"{folder} cannot be written: {error.strerror or error}. Name another folder.") from error


def versions() -> dict[str, str]:
    """Of the packages that make rows."""
    return {"datasets": datasets.__version__, "transformers": transformers.__version__}


def read_manifest(folder: Path) -> Manifest:
    """What `prepared.json` says.

    Raises:
        DataError: there is none, or it is of another version.
    """
    if not (folder / MANIFEST).is_file():
        hint = (
            f" {folder}.unfinished was being written: run dllm prepare again."
            * folder.with_name(f"{folder.name}.unfinished").exists()
        )
        raise DataError(
            f"{folder} holds no prepared data ({MANIFEST} is not there). Name a folder that dllm prepare wrote.{hint}"
        )
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return Manifest(**{field.name: found[field.name] for field in fields(Manifest)})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read ({error}). Run dllm prepare again.") from error


def load_prepared(
    folder: Path, tokenizer: PreTrainedTokenizerBase, asked: Callable[[Manifest], Manifest]
) -> tuple[Manifest, datasets.Dataset, datasets.Dataset | None]:
    """Rows that were prepared.

    Args:
        folder: what `write_prepared` wrote.
        tokenizer: of this run.
        asked: from what the folder holds to what this run needs; they have to be the same.

    Returns:
        (manifest, train, test); test is None where there is none.

    Raises:
        DataError: there is no such folder, or it was made in another way than this run needs.
    """
    there = read_manifest(folder)
    needed = replace(asked(there), tokenizer=tokenizer_fingerprint(tokenizer))
    for name in ("task", "tokenizer", "max_length", "truncation", "turns", "dataset_args"):
        have, want = getattr(there, name), getattr(needed, name)
        if have != want:
            if name == "tokenizer":
                raise DataError(
                    f"{folder} was prepared with another tokenizer than this run's. Its own is in {folder / TOKENIZER}; run dllm "
                    f"prepare again for this one."
                )
            option = "" if name == "task" else "--"
            raise DataError(
                f"{folder} was prepared with {option}{name} {have}, and this run has {want}. Leave the option out, or run dllm "
                f"prepare again."
                if option
                else f"{folder} was prepared for dllm {have}, and this is dllm {want}. Run  dllm prepare {want}  again."
            )
    try:
        splits = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is damaged: {error}. Run dllm prepare again.") from error
    for name, rows in (("train", there.train), ("test", there.test)):
        if len(splits.get(name, ())) != rows:
            raise DataError(
                f"{folder} is damaged: {name} has {len(splits.get(name, ()))} of {rows} rows. Prepare it again."
            )
    return there, splits["train"], splits.get("test")
