"""Pictures of a run: the loss curve, and accuracy against tokens per forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm.errors import MissingExtraError
from dllm.evaluation.sudoku import Score


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
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "Drawing the curves") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    train = [(row["tokens"] / 1e6, row["loss"]) for row in log if "loss" in row]
    test = [(row["tokens"] / 1e6, row["eval_loss"]) for row in log if "eval_loss" in row]
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
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
