"""The models that english.py looks at: checkpoints along a run, and the autoregressive source that judges them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dllm.pipelines.llada import load_model, load_tokenizer
from dllm.pipelines.llada.autoregressive import find_source, read_config, read_tokenizer
from dllm.training.callbacks import read_log

END_OF_DOCUMENT = "<|endoftext|>"


class Checkpoint(NamedTuple):
    """A model, and what its training had taken."""

    name: str
    path: Path
    minutes: float
    """Of the clock, since its run began."""
    tokens: int
    """That training had seen."""

    def load(self) -> tuple[Any, Any]:
        return load_model(str(self.path)), load_tokenizer(str(self.path))


def fingerprint(folder: Path) -> str:
    """Two folders of tensors have the same one if their safetensors files are the same."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def checkpoints(name: str, folder: Path, most: int = 100) -> list[Checkpoint]:
    """The checkpoints of a run, at most `most` of them, evenly spread, the last one always; or the one that `folder` is."""
    if not (folder / "log.jsonl").exists():
        return [Checkpoint(name, folder, 0.0, 0)]
    log = read_log(folder / "log.jsonl")
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("checkpoint-*")):
        if (kind := path.name.removeprefix("checkpoint-")) == "final":
            found[int(log[-1]["step"])] = path
        elif re.fullmatch(r"\d+", kind):
            found.setdefault(int(kind), path)
    if not found:
        raise SystemExit(f"{folder} holds no checkpoint: give a run's folder, or that of a checkpoint.")
    steps = sorted(found)
    chosen = sorted({steps[-1 - round(place * (len(steps) - 1) / max(1, most - 1))] for place in range(most)})
    made = []
    for step in chosen[-most:]:
        so_far = [row for row in log if row["step"] <= step]
        minutes = max((row["seconds"] for row in so_far), default=0.0) / 60
        made.append(
            Checkpoint(
                f"{name} {step}", found[step], minutes, max((row.get("tokens_seen", 0) for row in so_far), default=0)
            )
        )
    return made


class Judge:
    """The autoregressive model that was adapted; it judges text, in nats."""

    def __init__(self, name: str) -> None:
        """Loads it.

        Args:
            name: a .gguf file, a folder, or a hub id.
        """
        source = find_source(name)
        self.tokenizer = read_tokenizer(source)
        self.model = AutoModelForCausalLM.from_pretrained(
            **source.reading, config=read_config(source), dtype=torch.float32
        ).eval()
        vocabulary = self.tokenizer.get_vocab()
        self.start = vocabulary.get(END_OF_DOCUMENT, self.tokenizer.bos_token_id)

    @torch.inference_mode()
    def nats(self, texts: Sequence[str], rows: int = 16) -> list[tuple[Tensor, list[tuple[int, int]]]]:
        """For each text -log p of its tokens, and the characters that each of them covers.

        A text stands behind an end of document; its own end is not asked for.
        """
        done = []
        for first in range(0, len(texts), rows):
            encoded = self.tokenizer(
                list(texts[first : first + rows]), add_special_tokens=False, return_offsets_mapping=True
            )
            ids = [torch.tensor([self.start, *row]) for row in encoded["input_ids"]]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.start)
            logits_BLV = self.model(input_ids=padded[:, :-1]).logits  # causal: what follows a text changes nothing
            for row, given, offsets in zip(logits_BLV, ids, encoded["offset_mapping"], strict=True):
                scores = torch.nn.functional.cross_entropy(row[: len(given) - 1], given[1:], reduction="none")
                done.append((scores, offsets))
        return done

    def of_spans(self, texts: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[tuple[float, int]]:
        """(nats, tokens) of the characters [begin, end) of each text: of the tokens that begin there, given all before."""
        found = []
        for (nats, offsets), (begin, end) in zip(self.nats(texts), spans, strict=True):
            inside = torch.tensor([begin <= first < end for first, _ in offsets], dtype=torch.bool)
            found.append((float(nats[inside].sum()), int(inside.sum())))
        return found
