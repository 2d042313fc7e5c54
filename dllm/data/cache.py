"""Rows are computed once: kept on disk under a key of what they depend on, and memory-mapped by whoever asks again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

FORM = 1
"""Counts the changes of what is computed: a new number passes over what older versions left."""


def cached_map(
    rows: datasets.Dataset, function: Callable[..., Any], key: list[Any], *, workers: int | None = None, **options: Any
) -> datasets.Dataset:
    """`rows.map(function)`, whose result lies in the cache of `datasets`.

    The key is given and not taken from the function, for a tokenizer's own hash changes as it is used. So of several
    processes one computes, and the others load.

    Args:
        rows: any rows.
        function: from a row, or a batch of rows, to the new columns.
        key: what the result depends on beside the rows and the code.
        workers: processes.
        **options: of `datasets.Dataset.map`.
    """
    fingerprint = Hasher.hash([rows._fingerprint, FORM, *map(str, key)])
    return rows.map(
        function,
        remove_columns=rows.column_names,
        num_proc=workers if workers and workers > 1 else None,
        new_fingerprint=fingerprint,
        cache_file_name=str(_folder() / f"{fingerprint}.arrow"),
        load_from_cache_file=True,
        **options,
    )


def cached_numbers(key: list[Any], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Numbers that are computed once and lie in the cache of `datasets`.

    Args:
        key: what they depend on beside the code.
        compute: makes them.
    """
    path = _folder() / f"{Hasher.hash([FORM, *map(str, key)])}.npy"
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        found = compute()
        unfinished = path.with_suffix(f".{os.getpid()}.npy")
        np.save(unfinished, found, allow_pickle=False)
        os.replace(unfinished, path)
    return found


def _folder() -> Path:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dllm"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer makes of text and conversations: 16 hexadecimal digits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        model: Any = sorted(tokenizer.get_vocab().items())
    else:
        model = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # of the last call
            model.pop(name, None)
    parts = [model, str(tokenizer.chat_template), {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
