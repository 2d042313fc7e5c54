"""Command lines of small, quick runs, and what their tests compare."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

SHAPE = "n_layers=1,d_model=16,n_heads=2,mlp_hidden_size=24"
QUIET = ["--bf16", "False", "--report_to", "none", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
PRETRAIN = [
    "--model_name_or_path", "tiny", "--config_overrides", SHAPE, "--max_length", "12",
    "--dataset_args", "builtin:addition[train:60,test:10]", "--max_steps", "4", "--save_steps", "2",
    "--learning_rate", "0.01", *QUIET,
]  # fmt: skip
SFT = [
    "--dataset_args", "builtin:addition[train:12,test:4]", "--max_length", "60", "--max_steps", "4",
    "--learning_rate", "0.01", *QUIET,
]  # fmt: skip


class Done(NamedTuple):
    output: Path
    final: Path


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
