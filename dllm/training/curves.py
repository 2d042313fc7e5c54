"""`losses.png`: what a run learnt, drawn from its log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm.errors import MissingExtraError
from dllm.figures import pyplot, quiet, save_figure
from dllm.training.callbacks import read_log
from dllm.training.metrics import QUARTERS

PICTURE = "losses.png"
SMOOTHED = 40
"""Points of a smooth curve: each is the mean of its part of the log."""


def plot_losses(log: Sequence[dict[str, Any]], path: Path, title: str = "") -> Path | None:
    """Draws training and evaluation loss, the nats of masked tokens by quarter of t, and the learning rate, against steps.

    Args:
        log: rows of a `log.jsonl` (`dllm.training.callbacks.read_log`).
        path: of the PNG.
        title: stands above.

    Returns:
        The path; None where the log has no loss yet.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    train = _series(log, "loss")
    if not train:
        return None
    plt = pyplot("Drawing the losses")
    figure, (losses, quarters, rate) = plt.subplots(
        3, 1, figsize=(8, 9), sharex=True, layout="constrained", height_ratios=(4, 4, 1.6)
    )
    figure.suptitle(title)
    losses.plot(*zip(*train, strict=True), color="C0", lw=0.8, alpha=0.35)
    losses.plot(*zip(*_smooth(train), strict=True), color="C0", lw=1.8, label="training")
    unseen = _series(log, "eval_loss")
    if unseen:
        losses.plot(*zip(*unseen, strict=True), "o-", color="C1", ms=4, lw=1.2, label="evaluation")
    losses.set(ylabel="loss (as normalised, nats)")
    for place, name in enumerate(QUARTERS):
        low, high = name.removeprefix("t").split("_")
        colour = plt.get_cmap("viridis")(0.1 + 0.25 * place)
        points = _series(log, f"nll_{name}")
        if points:
            quarters.plot(*zip(*_smooth(points), strict=True), color=colour, lw=1.5, label=f"{low} to {high} % masked")
        points = _series(log, f"eval_nll_{name}")
        if points:
            quarters.plot(*zip(*points, strict=True), "o", color=colour, ms=4)
    quarters.set(ylabel="cross-entropy of masked tokens\n(nats a token; dots: evaluation)")
    rates = _series(log, "learning_rate")
    if rates:
        rate.plot(*zip(*rates, strict=True), color="C7", lw=1.4)
    rate.set(xlabel="optimiser steps", ylabel="learning rate")
    for axis in (losses, quarters, rate):
        quiet(axis)
    for axis in (losses, quarters):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def draw_losses(folder: Path, task: str) -> None:
    """Writes `losses.png` of a run's log into its folder, where matplotlib is installed; a picture never ends a run."""
    try:
        plot_losses(read_log(folder / "log.jsonl"), folder / PICTURE, f"{task}: {folder.name}")
    except MissingExtraError:
        print(f"{PICTURE} was not drawn: that needs matplotlib, pip install 'dllm[plots]'")
    except OSError as error:
        print(f"{PICTURE} was not drawn: {error}")


def _series(log: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have it, less what is not finite."""
    return [(row["step"], row[key]) for row in log if isinstance(row.get(key), int | float) and math.isfinite(row[key])]


def _smooth(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """The means of at most `SMOOTHED` parts of equal size."""
    size = max(1, len(points) // SMOOTHED)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]
