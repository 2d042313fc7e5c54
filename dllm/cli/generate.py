"""`dllm generate`: write after prompts; without a model, solve a puzzle with the one that ships inside."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm.cli.options import Parser, add_settings, given_settings
from dllm.errors import OptionError
from dllm.sampling.config import ALIASES, SamplingConfig

EMBEDDED = "builtin:sudoku9"

_EXAMPLES = """examples:
  dllm generate                                     solve an unseen 9x9 sudoku
  dllm generate 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
  dllm generate --model_name_or_path GSAI-ML/LLaDA-8B-Instruct "Why is the sky blue?" --gen_length 128
  dllm generate --model_name_or_path MODEL --prompts_file prompts.txt --json > answers.jsonl
"""


def main(argv: Sequence[str]) -> None:
    """Parses the command line and prints what the model writes."""
    from argparse import RawDescriptionHelpFormatter

    parser = Parser(
        prog="dllm generate",
        description="Write after prompts. Without --model_name_or_path, solve sudoku with the model that ships inside.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", nargs="*", help="prompts; puzzles (81 characters, . for blanks) without a model")
    parser.add_argument("--model_name_or_path", default=EMBEDDED, help=f"folder, hub id or builtin:NAME ({EMBEDDED})")
    parser.add_argument("--prompts_file", type=Path, help="a file of prompts, one a line; - for standard input")
    parser.add_argument(
        "--raw", action="store_true", help="prompts are plain text, also where there is a chat template"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at a time; changes nothing but speed")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, float32, bfloat16, float16")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the first that is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt, with its statistics")
    parser.add_argument("--quiet", action="store_true", help="do not show the denoising, only the result")
    add_settings(parser, SamplingConfig, ALIASES)
    arguments = parser.parse_args(list(argv))
    options = given_settings(arguments, SamplingConfig)
    SamplingConfig.from_options(**options)  # wrong values are told before seconds of loading
    if arguments.batch_size < 1:
        raise OptionError(f"--batch_size {arguments.batch_size}: it is at least 1.")
    prompts = arguments.prompts + _read_prompts(arguments.prompts_file)
    if arguments.model_name_or_path == EMBEDDED:
        _solve(arguments, prompts, options)
    else:
        _write(arguments, prompts, options)


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    if str(path) == "-":
        lines = sys.stdin.read().splitlines()
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--prompts_file {path} cannot be read: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise OptionError(f"--prompts_file {path} holds no prompt.")
    return prompts


def _load(arguments: Namespace) -> tuple[Any, Any]:
    from transformers.utils import logging

    from dllm.pipelines.llada.loading import best_device, load_model
    from dllm.pipelines.llada.tokenizer import load_tokenizer

    if not sys.stderr.isatty() or arguments.model_name_or_path == EMBEDDED:
        logging.disable_progress_bar()
    device = _device(arguments.device) if arguments.device else best_device()
    model = load_model(arguments.model_name_or_path, dtype=arguments.dtype)
    return model.to(device), load_tokenizer(arguments.model_name_or_path)


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch has one for each way of being absent
        raise OptionError(
            f"--device {name} is not there: say cuda, mps or cpu, or leave it out for the best that is."
        ) from error
    return device


def _solve(arguments: Namespace, puzzles: list[str], options: dict[str, Any]) -> None:
    """Puzzles: blanks are masks, and solving is infilling."""
    from rich.console import Console

    from dllm.cli.display import LiveCanvas, sudoku_grid
    from dllm.data.sudoku import is_solution

    puzzles = _checked_puzzles(puzzles, options)
    from dllm.evaluation.sudoku import fill_puzzles

    model, tokenizer = _load(arguments)
    console = Console(highlight=False)
    live = console.is_terminal and not (arguments.json or arguments.quiet)
    size = 1 if live else arguments.batch_size
    for first in range(0, len(puzzles), size):
        part = puzzles[first : first + size]
        settings = {**options, "requests": range(first, first + len(part))}  # whatever the size of a batch
        if live:
            start = [None if c == "." else c for c in part[0]]
            blanks = start.count(None)
            steps = min(options.get("steps") or blanks, blanks)
            with LiveCanvas(start, lambda i: tokenizer.decode([i]), draw=sudoku_grid, steps=steps) as canvas:
                grids, result = fill_puzzles(model, tokenizer, part, on_step=canvas, **settings)
        else:
            grids, result = fill_puzzles(model, tokenizer, part, **settings)
        forwards = result.nfe // max(1, max(result.steps))  # guidance takes two a step
        for puzzle, grid, steps in zip(part, grids, result.steps, strict=True):
            right, blanks, nfe = is_solution(puzzle, grid), puzzle.count("."), steps * forwards
            if arguments.json:
                record = {"prompt": puzzle, "text": grid, "solved": right, "nfe": nfe, "new_tokens": blanks}
                print(json.dumps(record), flush=True)
                continue
            if not live:
                console.print(sudoku_grid(grid, ["bold" if c != "." else "green" for c in puzzle]), end="")
            print(f"{blanks} blanks, {nfe} forwards: {'solved' if right else 'NOT solved: the model erred'}\n{grid}")


def _checked_puzzles(puzzles: list[str], options: dict[str, Any]) -> list[str]:
    """What the model can be given: puzzles with a dot for a blank, each with a solution; an unseen one if there is none."""
    import random

    from dllm.data.sudoku import puzzles as unseen_puzzles
    from dllm.data.sudoku import solve
    from dllm.errors import DataError

    if "gen_length" in options:
        raise OptionError(
            "--gen_length has no meaning for a puzzle: its blanks say what to write. Name a model for text."
        )
    if not puzzles:
        seed = options.get("seed", random.randrange(10**6))
        puzzles = [unseen_puzzles(9, "test", 1, clues=(36, 45), seed=seed)[0][0]]
    for puzzle in puzzles:
        if len(puzzle) != 81:
            raise DataError(
                f"{puzzle[:90]!r} has {len(puzzle)} characters: the model that ships inside solves 9x9 sudoku, 81 characters in "
                f"row order with . for blanks. To continue text, name a model with --model_name_or_path."
            )
        if not solve(puzzle, limit=1):
            raise DataError(f"The puzzle {puzzle} has no solution.")
    return [puzzle.replace("0", ".").replace("_", ".") for puzzle in puzzles]


def _write(arguments: Namespace, prompts: list[str], options: dict[str, Any]) -> None:
    """Text: chat where the tokenizer has a template and --raw is not given."""
    from rich.console import Console

    from dllm.cli.display import LiveCanvas
    from dllm.pipelines.llada.generate import encode_prompt, generate, generation_config

    if not prompts:
        raise OptionError("Give a prompt, or --prompts_file FILE (- for standard input).")
    config = generation_config(**options)
    model, tokenizer = _load(arguments)
    chat = tokenizer.chat_template is not None and not arguments.raw
    asked: list[Any] = [[{"role": "user", "content": prompt}] if chat else prompt for prompt in prompts]
    console = Console(highlight=False)
    if len(prompts) == 1 and console.is_terminal and not (arguments.json or arguments.quiet):
        start: list[str | None] = [None] * config.gen_length
        given = len(encode_prompt(tokenizer, asked[0]))
        steps = min(config.steps or config.gen_length, config.gen_length)

        def text_of(token: int) -> str:
            return str(tokenizer.decode([token], skip_special_tokens=True))

        with LiveCanvas(start, text_of, steps=steps, seconds=0) as live:
            generate(
                model, tokenizer, asked, on_step=lambda e: live(e._replace(position=e.position - given)), **options
            )
        return
    for first in range(0, len(asked), arguments.batch_size):
        part = slice(first, first + arguments.batch_size)
        requests = range(len(asked))[part]  # so that the size of a batch does not change the noise
        result = generate(model, tokenizer, asked[part], requests=requests, **options)
        rows = zip(prompts[part], result.texts, result.steps, result.new_tokens, strict=True)
        for prompt, text, steps, new_tokens in rows:
            if arguments.json:
                print(
                    json.dumps({"prompt": prompt, "text": text, "steps": steps, "new_tokens": new_tokens}), flush=True
                )
            else:
                console.print(f"[bold]{'>'} [/bold]", end="")
                console.print(prompt, markup=False)
                console.print(text + "\n", markup=False)
