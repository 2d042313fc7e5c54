"""The models that ship inside the package, under names like `builtin:sudoku9`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from dllm.errors import CheckpointError, did_you_mean
from dllm.layers.adapters import SETTINGS

FINAL = "checkpoint-final"
"""Where in a run's folder its model is."""
DEFAULT = "builtin:sudoku9"
"""What is used where no model is named."""


def resolve(name_or_path: str | Path) -> str:
    """`builtin:NAME` as the folder that it lies in, the folder of a run as its final model; anything else as it is.

    Raises:
        CheckpointError: no embedded model has that name.
    """
    name_or_path = str(name_or_path)
    if not name_or_path.startswith("builtin:"):
        path = Path(name_or_path).expanduser()
        names = ("config.json", SETTINGS)
        if any((path / FINAL / name).exists() for name in names) and not any((path / name).exists() for name in names):
            return str(path / FINAL)
        return str(path) if name_or_path.startswith("~") else name_or_path
    name = name_or_path.removeprefix("builtin:")
    root = files("dllm.pipelines.llada").joinpath("embedded_models")
    there = [entry.name for entry in root.iterdir() if entry.is_dir()]
    if name not in there:
        raise CheckpointError(f"No model {name_or_path!r} ships with dllm.{did_you_mean(name, there)}")
    return str(root.joinpath(name))
