"""`dllm info`: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from dllm.cli.options import Parser


def main(argv: Sequence[str]) -> None:
    """Prints a checkpoint's architecture, parameters, tokens and memory."""
    parser = Parser(
        prog="dllm info",
        description="What a checkpoint is: architecture, parameters, special tokens, memory. No weight is loaded.",
    )
    parser.add_argument("model_name_or_path", help="folder, hub id, builtin:NAME or preset (8b, moe-7b, ...)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(list(argv))

    from dllm.pipelines.llada.inspection import inspect

    info = inspect(arguments.model_name_or_path)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(info), "memory_gb": info.memory()}))
        return

    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("model", info.name)
    table.add_row("architecture", info.architecture)
    for name, value in info.sizes.items():
        table.add_row(name, f"{value:,}")
    table.add_row("parameters", f"{info.parameters:,}")
    if info.active_parameters != info.parameters:
        table.add_row("active a token", f"{info.active_parameters:,}")
    table.add_row("of them embedding and head", f"{info.embedding_parameters:,}")
    if info.stored_bytes is not None:
        table.add_row("stored", f"{info.dtype}, {decimal(info.stored_bytes)}")
    for name, (text, id_) in info.special_tokens.items():
        table.add_row(f"{name} token", f"{id_}" if text is None else f"{id_}  {text}")
    for name, size in info.memory().items():
        table.add_row(f"memory for {name}", decimal(round(size * 1e9)))
    console = Console(highlight=False)
    console.print(table, markup=False)
    console.print("Memory is that of weights, gradients and optimiser state; activations come on top.", style="dim")
