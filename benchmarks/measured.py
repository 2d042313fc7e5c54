"""Measurements on the disk, each taken once: a benchmark that was stopped, or that ran out of its time, goes on with the rest."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import processor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import dllm
from dllm.disk import written_beside

Row = dict[str, Any]


class Store:
    """A JSON file: part -> settings, seconds, and rows by their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(self.path) as beside:
            beside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")

    def rows(self, part: str) -> dict[str, Row]:
        return self.data.get(part, {}).get("rows", {})


class Part:
    """One part of the benchmark: rows that are there are not measured again, and none is begun once its time is up."""

    def __init__(self, store: Store, name: str, minutes: float, settings: dict[str, Any]) -> None:
        """Opens the part.

        Args:
            store: where its rows go.
            name: its name there.
            minutes: for which it may begin new rows, this time.
            settings: on which its rows depend; a part whose rows came of others is refused.
        """
        settings = json.loads(json.dumps(settings))
        kept = store.data.setdefault(name, {"settings": settings, "rows": {}, "seconds": 0.0})
        if kept["settings"] != settings:
            differing = {key for key in kept["settings"] | settings if kept["settings"].get(key) != settings.get(key)}
            sys.exit(
                f"{store.path} holds rows of part {name!r} with other settings ({', '.join(sorted(differing))}): give the same "
                f"ones to go on, or another --output, or delete its part {name!r}."
            )
        kept["command"] = " ".join(["python", "benchmarks/english.py", *map(shlex.quote, sys.argv[1:])])
        kept["machine"] = machine()
        self.store, self.name, self.kept = store, name, kept
        self.until = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def measure(self, items: dict[str, Callable[[], Row]], weights: Mapping[str, str] | None = None) -> None:
        """Takes the measurements that are not there yet, in their order, and shows how far it is.

        Args:
            items: the name of each, and what takes it.
            weights: the name of some, and the fingerprint of the model that is measured: a row of another model is taken anew.
        """
        weights = weights or {}
        columns = (
            TextColumn("{task.fields[part]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(items), part=self.name)
            for name, take in items.items():
                progress.update(task, description=name)
                made_of = {"weights": weights[name]} if name in weights else {}
                there = self.kept["rows"].get(name)
                if there is None or there.get("weights") != made_of.get("weights"):
                    if time.monotonic() > self.until:
                        self.left_out.append(name)
                    else:
                        began = time.monotonic()
                        self.kept["rows"][name] = take() | made_of
                        self.kept["seconds"] += time.monotonic() - began
                        self.store.save()
                progress.advance(task)
        if self.left_out:
            print(
                f"{self.name}: its time is up, {len(self.left_out)} of {len(items)} rows are left for another run of the same "
                f"command: {', '.join(self.left_out)}",
                file=sys.stderr,
            )


def of_task(rows: dict[str, Row], task: str) -> Iterator[tuple[str, str, Row]]:
    """(policy, cache, measurement) of the rows that are called `task | policy | cache`."""
    for name, row in rows.items():
        of, policy, cache = name.split(" | ")
        if of == task:
            yield policy, cache, row


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return (
        f"{torch.get_num_threads()} threads of a {device}, dllm {dllm.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
