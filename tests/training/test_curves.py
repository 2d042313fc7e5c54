"""losses.png: what is drawn, and what is said where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from dllm.training.curves import PICTURE, draw_losses, plot_losses

LOG = [
    {"step": step, "loss": 5.0 - 0.01 * step, "learning_rate": 1e-3, "nll_t0_25": 2.0, "nll_t75_100": 4.0}
    for step in range(1, 200)
] + [{"step": 100, "eval_loss": 4.2, "eval_nll_t0_25": 2.1}, {"step": 150, "loss": float("nan")}]


def test_a_picture_of_the_losses_is_written(tmp_path: Path) -> None:
    path = plot_losses(LOG, tmp_path / PICTURE, "a run")
    assert path is not None
    with Image.open(path) as picture:
        assert picture.size == (1040, 1170)
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 50


def test_there_is_none_without_a_loss(tmp_path: Path) -> None:
    assert plot_losses([{"step": 1, "eval_loss": 2.0}], tmp_path / PICTURE) is None
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_a_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_losses(tmp_path, "sft")
    assert capsys.readouterr().out == "losses.png was not drawn: that needs matplotlib, pip install 'dllm[plots]'\n"
