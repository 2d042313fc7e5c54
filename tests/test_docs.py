"""What the documents name exists: files, options, functions, targets of make."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from dllm.cli.demo import RECIPE
from dllm.cli.main import COMMANDS
from dllm.sampling.config import ALIASES, SamplingConfig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern)
)
ids = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
OF_OTHERS = {"--config_file", "--num_processes", "--logdir"}
"""Options of `accelerate launch` and `tensorboard`."""
OF_SLURM = {"--nodes", "--gres", "--partition", "--account", "--qos", "--time", "--mem", "--signal", "--batch"}


@every_document
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"https?://|#|mailto:", link)]
    assert not [link for link in local if not (path.parent / link.partition("#")[0]).exists()]


@every_document
def test_options_exist(path: Path) -> None:
    from dllm.training.adapters import AdapterArguments
    from dllm.training.arguments import DataArguments, ModelArguments, TrainingArguments
    from dllm.training.launch import OPTIONS
    from dllm.training.slurm_options import make_parser

    settings = (ModelArguments, DataArguments, TrainingArguments, AdapterArguments, SamplingConfig)
    known = {f"--{field.name}" for kind in settings for field in dataclasses.fields(kind)}
    known |= {f"--{alias}" for alias in ALIASES} | {*RECIPE, *OF_OTHERS, *OF_SLURM, *OPTIONS, "--help"}
    known |= {name for action in make_parser()._actions for name in action.option_strings}
    for source in (*(ROOT / "dllm/cli").glob("*.py"), *(ROOT / "examples").rglob("*.py")):
        known |= set(re.findall(r'"(--\w+)"', source.read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+(?![\w-])", path.read_text(encoding="utf-8")))
    assert named <= known, sorted(named - known)


@every_document
def test_commands_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    shown = set(re.findall(r"(?m)(?:^|`)dllm ([a-z]\w*)", text))
    assert shown <= set(COMMANDS)
    targets = set(re.findall(r"(?m)^(\w+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert set(re.findall(r"(?m)(?:^|`)make (\w+)", text)) <= targets


def test_the_tree_in_the_readme_names_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"```\n(examples/llada/.*?)```", text, re.DOTALL)
    folders: list[str] = []
    missing = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        place = ROOT.joinpath(*folders[:depth], name)
        folders[depth:] = [name]
        if not place.exists():
            missing.append(str(place.relative_to(ROOT)))
    assert not missing
    assert {"dllm/", "loop.py"} <= {line.split()[0] for line in tree.splitlines()}


def test_symbols_lead_to_code() -> None:
    text = (ROOT / "docs/symbols.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:diffusion|sampling|data|layers|training)\.[a-z_.]+\.\w+)`", text)
    assert len(names) > 8
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"dllm.{module}"), attribute), name
