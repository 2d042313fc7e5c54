"""Pictures: files that open, of the size that was asked, and what is said where matplotlib is missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dllm.errors import MissingExtraError
from dllm.evaluation.plots import plot_denoising, plot_run
from dllm.evaluation.sudoku import Score, fill_puzzles
from dllm.pipelines import llada
from dllm.pipelines.llada.tokenizer import char_tokenizer
from dllm.sampling.trace import Trace

LOG: list[dict[str, Any]] = [
    {"step": step, "tokens_seen": 1000 * step, "seconds": step, "loss": 3.0 / step} for step in range(1, 6)
]
SCORES = [Score(puzzles=10, exact=e, tokens_per_forward=n, nfe=40 / n) for e, n in ((1.0, 1), (0.9, 2), (0.1, 40))]


def shape(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 1  # something is drawn
        return picture.size


@pytest.mark.parametrize(
    "extra",
    [[], [{"step": 5, "tokens_seen": 5000, "eval_loss": 0.7}, {"step": 5, "tokens_seen": 5000, "train_runtime": 1.0}]],
)
def test_a_run_is_drawn_into_a_folder_that_is_made(tmp_path: Path, extra: list[dict[str, Any]]) -> None:
    path = tmp_path / "new" / "curves.png"
    assert plot_run([*LOG, *extra], SCORES, "title", path) == path
    width, height = shape(path)
    assert width > 2 * height


def test_the_log_is_what_is_drawn(tmp_path: Path) -> None:
    one, other = (plot_run(log, SCORES, "title", tmp_path / f"{len(log)}.png") for log in (LOG, LOG[:2]))
    assert one.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("size", [9, 6])
def test_a_denoising_is_drawn_at_each_moment(tmp_path: Path, size: int) -> None:
    grid = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
    if size == 6:
        grid = "123456456123231564564231312645645312"
    puzzle = grid[:-7] + "......." if size == 6 else grid[:70] + "." * 11
    tokenizer = char_tokenizer()
    model = llada.fresh_model("tiny", tokenizer, "n_layers=1,d_model=16,n_heads=2,mlp_hidden_size=16")
    _, result = fill_puzzles(model, tokenizer, [puzzle], trace=True)  # random weights may write what is no digit
    widths = []
    for shares in ([0.0], [0.0, 0.5, 1.0]):
        path = plot_denoising(puzzle, result.trace, grid, tmp_path / f"{len(shares)}.png", shares)
        widths.append(shape(path)[0])
    assert widths[1] == 3 * widths[0]


DRAWINGS: dict[str, Callable[[Path], Path]] = {
    "Drawing the curves": lambda path: plot_run(LOG, SCORES, "title", path),
    "Drawing a grid": lambda path: plot_denoising("." * 81, Trace([]), "1" * 81, path, [1.0]),
}


@pytest.mark.parametrize("drawing", DRAWINGS)
def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawing: str) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = f"{drawing} needs the package 'matplotlib': run  pip install 'dllm[plots]'"
    with pytest.raises(MissingExtraError, match=re.escape(message)):
        DRAWINGS[drawing](tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
