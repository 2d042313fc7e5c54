"""Pictures: a run's loss curve and its accuracy against tokens per forward; a grid while it is filled in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm.evaluation.sudoku import Score
from dllm.figures import pyplot, quiet, save_figure
from dllm.sampling.trace import Trace


def plot_run(log: Sequence[dict[str, Any]], scores: Sequence[Score], title: str, path: Path) -> Path:
    """Draws loss against training tokens, and exact answers against tokens per forward, side by side.

    Args:
        log: rows of a `log.jsonl` (`dllm.training.callbacks.read_log`).
        scores: one per number of tokens per forward.
        title: stands above both.
        path: of the PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plt = pyplot("Drawing the curves")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    train = [(row["tokens_seen"] / 1e6, row["loss"]) for row in log if "loss" in row]
    test = [(row["tokens_seen"] / 1e6, row["eval_loss"]) for row in log if "eval_loss" in row]
    left.plot(*zip(*train, strict=True), lw=1.2, label="training")
    if test:
        left.plot(*zip(*test, strict=True), "o", ms=5, label="unseen")
    left.set(xlabel="training tokens (millions)", ylabel="loss (nats per token, at most)")
    left.legend(frameon=False)
    right.plot([s.tokens_per_forward for s in scores], [100 * s.exact for s in scores], "o-")
    for s in scores:
        right.annotate(
            f"{100 * s.exact:.1f}", (s.tokens_per_forward, 100 * s.exact), (4, 5), textcoords="offset points"
        )
    right.set(
        xscale="log",
        xlabel="tokens per forward (right is faster)",
        ylabel="unseen puzzles solved exactly (%)",
        ylim=(0, 108),
    )
    ticks = [s.tokens_per_forward for s in scores]
    right.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    right.minorticks_off()
    for axis in (left, right):
        quiet(axis)
    return save_figure(figure, path)


def plot_denoising(puzzle: str, trace: Trace, cells: Sequence[str], path: Path, shares: Sequence[float]) -> Path:
    """Draws a sudoku at several moments of its denoising, each filled cell in the colour of the step that filled it.

    Args:
        puzzle: digits, `.` for blanks.
        trace: of a run whose row 0 is the puzzle.
        cells: the filled grid.
        path: of the PNG.
        shares: the moments, each as a fraction of the steps.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plt = pyplot("Drawing a grid")
    size, box_rows, box_columns = (9, 3, 3) if len(puzzle) == 81 else (6, 2, 3)
    filled_at = trace.commit_steps(0).tolist()
    last = max(filled_at)
    figure, axes = plt.subplots(1, len(shares), figsize=(3 * len(shares), 3.4), layout="constrained", squeeze=False)
    for axis, share in zip(axes[0], shares, strict=True):
        now = round(share * (last + 1))
        for place, cell in enumerate(puzzle):
            row, column = divmod(place, size)
            given, shown = cell != ".", cell != "." or filled_at[place] < now
            colour = "#e8e8e8" if given else plt.get_cmap("YlGnBu")(0.1 + 0.8 * filled_at[place] / max(1, last))
            axis.add_patch(plt.Rectangle((column, row), 1, 1, facecolor=colour if shown else "white", linewidth=0))
            dark = not given and filled_at[place] > 0.55 * last
            if shown:
                style = {"color": "white" if dark else "black", "weight": "bold" if given else "normal"}
                axis.text(column + 0.5, row + 0.53, cells[place], ha="center", va="center", fontsize=11, **style)
        for line in range(size + 1):
            axis.axhline(line, color="black", linewidth=1.6 if line % box_rows == 0 else 0.3)
            axis.axvline(line, color="black", linewidth=1.6 if line % box_columns == 0 else 0.3)
        axis.set(xlim=(0, size), ylim=(size, 0), aspect="equal", title=f"step {now} of {last + 1}")
        axis.set_axis_off()
    return save_figure(figure, path)
