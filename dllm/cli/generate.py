"""`dllm generate`: write after prompts; without a model, solve a puzzle with the one that ships inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dllm.cli.options import Parser, add_settings, given_settings
from dllm.errors import OptionError
from dllm.sampling.config import ALIASES, SamplingConfig

_EXAMPLES = """examples:
  dllm generate                                     solve an unseen 9x9 sudoku
  dllm generate 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
  dllm generate --model_name_or_path GSAI-ML/LLaDA-8B-Instruct "Why is the sky blue?" --gen_length 128
  dllm generate --model_name_or_path MODEL --prompts_file prompts.jsonl --output answers.jsonl
  dllm generate --trace sudoku.html                 a page that shows how it was written
"""


def main(argv: Sequence[str]) -> int:
    """Parses the command line and prints what the model writes; 1 if a row of a file could not be answered."""
    from argparse import RawDescriptionHelpFormatter

    from dllm.cli.batches import add_run_options, run
    from dllm.cli.requests import read_requests
    from dllm.cli.tasks import EMBEDDED, Puzzles, Writing, refuse_lengths

    parser = Parser(
        prog="dllm generate",
        description="Write after prompts. Without --model_name_or_path, solve sudoku with the model that ships inside.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompts",
        nargs="*",
        help="prompts, - for standard input; puzzles (81 characters, . for blanks) without a model",
    )
    parser.add_argument(
        "--raw", action="store_true", help="prompts are plain text, also where there is a chat template"
    )
    add_run_options(parser)
    add_settings(parser, SamplingConfig, ALIASES)
    arguments = parser.parse_args(list(argv))
    options = given_settings(arguments, SamplingConfig)
    config = SamplingConfig.from_options(**options)  # wrong values are told before seconds of loading
    requests = read_requests(arguments.prompts, arguments.prompts_file, arguments.prompts_format)
    settings = {"command": "generate"}
    settings |= {name: getattr(arguments, name) for name in ("model_name_or_path", "dtype", "raw")}
    settings |= dataclasses.asdict(config)
    if arguments.model_name_or_path == EMBEDDED:
        refuse_lengths(options)
        requests = requests or [Puzzles.unseen(options.get("seed"), arguments.output)]
        return run(arguments, Puzzles, requests, options, settings)
    if not requests:
        raise OptionError("Give a prompt, or --prompts_file FILE (- for standard input).")
    from dllm.pipelines.llada.generate import generation_config

    generation_config(**options)
    return run(arguments, Writing, requests, options, settings)
