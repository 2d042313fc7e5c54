"""`dllm COMMAND ...`: finds the command, and turns errors into one line each."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from dllm import __version__
from dllm.errors import DllmError, did_you_mean

COMMANDS = {
    "demo": "train a small model on sudoku from scratch, watch it solve unseen puzzles (3 minutes)",
    "english": "make a small LLaDA that writes English of an autoregressive model, and talk with it (15 minutes)",
    "convert": "write a checkpoint anew: another dtype, other shards, an adapter merged",
    "adapt": "make a LLaDA checkpoint of an autoregressive one: Llama, Qwen2, GGUF files",
    "generate": "write after prompts, or solve a puzzle with the model that ships inside",
    "infill": "fill blanks that stand anywhere in a text, or those of a puzzle",
    "chat": "talk with a model in the terminal, and see its answers take shape",
    "info": "what a checkpoint is: architecture, parameters, tokens, memory",
    "prepare": "turn data into rows of tokens once, for many runs",
    "pretrain": "pretrain a model on plain text",
    "sft": "fine-tune a model on conversations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 2 for an error that the user can put right, 1 if some rows failed."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, and not when Python ends, where a broken pipe could not be caught
    except BrokenPipeError:  # the reader of a pipe left: nothing is wrong here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed in the end
        return 0


def _run(argv: Sequence[str] | None) -> int:
    # before torch is loaded: threads that spin while they wait stand still as soon as something else runs on the machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"dllm {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"dllm: there is no command {name!r}.{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(f"dllm.cli.{name}").main(rest) or 0)
    except DllmError as error:
        print(f"dllm {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ndllm {name}: stopped.", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        f"dllm {__version__}: masked-diffusion language models (LLaDA)\n\n"
        f"usage: dllm COMMAND [options]\n\n{lines}\n\n"
        f"dllm COMMAND --help says what a command can do."
    )


if __name__ == "__main__":
    sys.exit(main())
