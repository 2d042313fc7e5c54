"""`run.json`: with what a run was started, so that it can be told, and done, again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dllm import __version__
from dllm.disk import written_beside
from dllm.training.arguments import TrainingArguments

RECORD = "run.json"
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "numpy",
    "peft",
    "tokenizers",
    "torch",
    "transformers",
)


def record_start(
    args: TrainingArguments, others: Sequence[Any], *, task: str, rows: dict[str, int | None], resumed: str | None
) -> dict[str, Any]:
    """Adds this start to `run.json`, which lists all starts of an output folder; the first process calls it.

    Args:
        args: how it trains.
        others: dataclasses of the other settings (model, data).
        task: "pretrain" or "sft".
        rows: name of a split -> its rows, None where they cannot be counted.
        resumed: the checkpoint that it goes on from.

    Returns:
        What was added.
    """
    arguments: dict[str, Any] = {}
    for other in others:
        arguments |= asdict(other) if is_dataclass(other) and not isinstance(other, type) else {}
    arguments |= {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
    start = {
        "task": task,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": resumed,
        "command": _without_secrets([sys.executable, *sys.argv]),
        "arguments": arguments,
        "rows": rows,
        "processes": args.world_size,
        "devices": _devices(args),
        "host": platform.node(),
        "versions": {"dllm": __version__, "python": platform.python_version(), **_versions()},
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }
    path = Path(str(args.output_dir)) / RECORD
    starts = read_record(path)
    with written_beside(path) as unfinished:
        unfinished.write_text(json.dumps({"starts": [*starts, start]}, indent=1, default=str) + "\n", encoding="utf-8")
    return start


def read_record(path: Path) -> list[dict[str, Any]]:
    """The starts that a `run.json` lists; none where it cannot be read."""
    try:
        starts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return starts


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _without_secrets(command: list[str]) -> list[str]:
    """A command line without the values of options such as --hub_token."""
    joined = [re.sub(r"^(--\w*token)=.*", r"\1=...", word, flags=re.DOTALL) for word in command]
    follows = [False, *(re.fullmatch(r"--\w*token", word) is not None for word in joined[:-1])]
    return ["..." if secret else word for secret, word in zip(follows, joined, strict=True)]


def _devices(args: TrainingArguments) -> list[str]:
    """The names of this machine's devices."""
    if args.device.type == "cuda":
        return [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    return [f"{args.device.type}: {platform.processor() or platform.machine()}, {os.cpu_count()} processors"]


def _commit() -> str | None:
    """The commit of the checkout that dllm was imported from, with "+" if files differ from it; None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    git = ["git", "-c", "safe.directory=*", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * changed
