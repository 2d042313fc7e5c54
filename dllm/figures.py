"""Where matplotlib is asked for: without a screen, and with the name of the extra where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm.errors import MissingExtraError


def pyplot(purpose: str) -> Any:
    """matplotlib's pyplot, drawing into files.

    Args:
        purpose: begins the error's sentence.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", purpose) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def quiet(axis: Any) -> None:
    """A light grid, and no frame at the top and the right."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a figure as PNG, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot("Drawing").close(figure)
    return path
