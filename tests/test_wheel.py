"""The wheel: that it holds everything, is small, and works from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = "dllm/pipelines/llada/embedded_models"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the build leaves nothing in the work tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "dllm", tree / "dllm", ignore=shutil.ignore_patterns("__pycache__"))
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    (built,) = (tree / "dist").glob("dllm-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel is installed, alone."""
    target = tmp_path_factory.mktemp("target")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", target, wheel, cwd=target)
    return target


def test_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path for path in (ROOT / "dllm").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    files |= set((ROOT / "dllm/training/accelerate_configs").glob("*"))  # a link, which rglob does not follow
    assert inside == {path.relative_to(ROOT).as_posix() for path in files}
    assert "dllm/training/accelerate_configs/ddp.yaml" in inside
    assert "dllm/py.typed" in inside
    assert any(name.startswith("dllm/data/assets/") for name in inside)


def test_is_at_most_10_mb(wheel: Path) -> None:
    assert wheel.stat().st_size <= 10_000_000


def test_works_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    code = (
        "import dllm; from dllm.data.builtin import builtin_rows; "
        "print(dllm.__file__); print(builtin_rows('text', 'train', 1, column='text')[0]['text'][:16])"
    )
    where, text = run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(where) == installed / "dllm" / "__init__.py"
    assert text == "In the beginning"


@pytest.mark.skipif(not (ROOT / EMBEDDED).is_dir(), reason="no model is embedded")
def test_the_model_inside_answers_from_another_folder(installed: Path, tmp_path: Path) -> None:
    shown = run("-m", "dllm.cli.main", "generate", "--seed", "1", cwd=tmp_path, PYTHONPATH=str(installed))
    assert ": solved" in shown
    assert list(tmp_path.iterdir()) == []
