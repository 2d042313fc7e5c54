"""The rules of the house: who may import whom, and what no file of the package may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dllm"
SOURCES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "errors": 0,
    "disk": 1,
    "figures": 1,
    "diffusion": 1,
    "layers": 1,
    "data": 2,
    "sampling": 2,
    "engine": 3,
    "training": 3,
    "pipelines": 4,
    "evaluation": 5,
    "serving": 5,
    "cli": 6,
}
"""A file imports from its own room or from a lower floor. The picture in README.md shows this table."""


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every module, with its place as file:line."""
    for path, tree in modules():
        for node in ast.walk(tree):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def imported_modules(node: ast.AST, package: list[str]) -> list[str]:
    """The full names that an import statement asks for; `package` holds the names of the package that it stands in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package[: len(package) - node.level + 1] if node.level else []
    start = ".".join([*base, *([node.module] if node.module else [])])
    return [f"{start}.{alias.name}" for alias in node.names] if start == "dllm" else [start]


def upward_imports(room: str, package: list[str], tree: ast.Module) -> list[str]:
    """What a module of `room` imports from a floor that it must not see; public names of the package count as such."""
    found = []
    for node in ast.walk(tree):
        for name in imported_modules(node, package):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top != "dllm" or other in (room, "__version__"):
                continue
            if not other or other not in FLOORS or FLOORS[other] >= FLOORS[room]:
                found.append(f"line {getattr(node, 'lineno', 0)}: {name}")
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__init__", "__pycache__"} <= set(FLOORS), "give the new room a floor in FLOORS, and in README.md"


def test_imports_go_downwards() -> None:
    wrong = []
    for path, tree in modules():
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts == ["dllm", "__init__"]:  # names everything, and loads none of it: see the test of laziness
            continue
        wrong += [f"{path.relative_to(ROOT)} {what}" for what in upward_imports(parts[1], parts[:-1], tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("from dllm.diffusion.noise import keyed_bits", True),
        ("from dllm.errors import DataError", True),
        ("from dllm import errors, __version__", True),
        ("import dllm.data.maps", True),
        ("from . import maps", True),
        ("from ..diffusion import noise", True),
        ("import dllmother", True),
        ("from dllm.sampling.loop import denoise", False),
        ("import dllm.training.run", False),
        ("def f():\n    from dllm.cli import main", False),
        ("from .. import sampling", False),
        ("from ..pipelines.llada import generate", False),
        ("import dllm", False),
        ("from dllm import generate", False),
    ],
)
def test_the_floor_test_sees(line: str, allowed: bool) -> None:
    assert (not upward_imports("data", ["dllm", "data"], ast.parse(line))) is allowed


def test_modules_are_named_for_what_they_hold() -> None:
    nameless = {"utils", "util", "common", "helpers", "helper", "misc"}
    found = [path for path in PACKAGE.rglob("*") if path.stem.strip("_") in nameless]
    assert not found


def test_modules_have_at_most_400_lines() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {path: count for path, count in lines.items() if count > 400}


@pytest.mark.parametrize(
    "code",
    [
        "import dllm",
        "import dllm; dllm.SamplingConfig",
        "from dllm.cli.main import main; sys.argv = ['dllm', '--help']; main()",
    ],
)
def test_loads_neither_torch_nor_transformers(code: str) -> None:
    heavy = ["accelerate", "datasets", "matplotlib", "numpy", "torch", "transformers"]
    script = (
        f"import sys\ntry:\n    import contextlib; {code}\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\nassert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_code_from_data() -> None:
    """No pickle, no code of a checkpoint, no evaluated strings: a model folder must not be able to run anything."""
    found = []
    for place, node in nodes():
        names = imported_modules(node, [])
        found += [f"{place}: import {n}" for n in names if n.split(".")[0] in {"pickle", "dill", "marshal", "shelve"}]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"eval", "exec", "torch.load"}:
            found.append(f"{place}: {called}(")
        trusted = [k for k in node.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) != "False"]
        found += [f"{place}: {ast.unparse(k.value)} for trust_remote_code" for k in trusted]
    assert not found, "\n".join(found)


def test_no_bare_except_and_no_assert_for_what_users_give() -> None:
    """`assert x is not None` and `assert isinstance(...)` are left: they tell the type checker what is known."""
    found = []
    for place, node in nodes():
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{place}: bare except")
        if isinstance(node, ast.Assert) and not re.search(r" is not None$|^isinstance\(", ast.unparse(node.test)):
            found.append(f"{place}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_files_name_no_place_that_only_one_machine_has() -> None:
    # in halves, so that this file passes its own test
    needles = ["/" + "home/", "/" + "root/", "/" + "Users/", "index" + "-url", "find" + "-links", "pypi" + ".org"]
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):  # binary, deleted, or a link to a folder
            continue
        found += [f"{name}: {needle}" for needle in needles if needle in text]
    assert not found, "\n".join(found)
