"""Reads the golden cases: tiny random checkpoints, and what the published implementations gave for them (fp32, CPU).

forward.safetensors holds `input_ids` [3, 26] with `logits`, and `padded_input_ids` with `attention_mask` (row 1 padded on
the right, row 2 on the left) and `padded_logits`, zero where padded. generate.safetensors holds `prompt` [2, 11] with
`attention_mask` (row 1 padded on the left) and, for each entry of generate.json, the whole canvases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

DENSE = ("llada_dense", "llada_dense_gqa_tied")
TOLERANCE = 1e-4
"""Of logits, whose size is about 3."""


def folder(name: str) -> Path:
    return Path(__file__).parent / name


def forward_case(name: str) -> dict[str, Tensor]:
    return load_file(folder(name) / "forward.safetensors")


def sampling_settings(name: str) -> dict[str, dict[str, Any]]:
    """Case name -> settings of the published sampler."""
    entries = json.loads((folder(name) / "generate.json").read_text(encoding="utf-8"))
    return {entry.pop("name"): entry for entry in entries}


def sampling_case(name: str, case: str) -> tuple[list[Tensor], list[Tensor]]:
    """(prompts, whole canvases), one int64 [length] a row, without padding."""
    stored = load_file(folder(name) / "generate.safetensors")
    real = stored["attention_mask"].bool()
    prompts = [row[keep] for row, keep in zip(stored["prompt"], real, strict=True)]
    width = real.shape[1]
    canvases = [row[width - len(prompt) :] for row, prompt in zip(stored[case], prompts, strict=True)]
    return prompts, canvases
