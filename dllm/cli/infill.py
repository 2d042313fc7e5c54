"""`dllm infill`: fill blanks that stand anywhere in a text; without a model, those of a puzzle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dllm.cli.options import Parser, add_settings, given_settings
from dllm.errors import OptionError
from dllm.sampling.config import ALIASES, SamplingConfig

_EXAMPLES = """examples:
  dllm infill --model_name_or_path GSAI-ML/LLaDA-8B-Base "The capital of France is [MASK:1], and it lies on the [MASK:2]."
  dllm infill --model_name_or_path MODEL --prompts_file texts.jsonl --output filled.jsonl
  dllm infill 534678912672195348198342567859761423426853791713924856961537284287419635[MASK:9]
"""


def main(argv: Sequence[str]) -> int:
    """Parses the command line and prints the filled texts; 1 if a row of a file could not be filled."""
    from argparse import RawDescriptionHelpFormatter

    from dllm.cli.batches import add_run_options, run
    from dllm.cli.requests import read_requests
    from dllm.cli.tasks import EMBEDDED, Blanks, Puzzles, refuse_lengths

    parser = Parser(
        prog="dllm infill",
        description="Fill blanks in texts: [MASK:n] stands for n tokens, and a text may have several; the tokenizer's mask "
        "token is one. Where words bring their own space, the space before [MASK:n] is a part of the blank. Without "
        "--model_name_or_path, the texts are sudoku puzzles.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("texts", nargs="*", help="texts with blanks, - for standard input")
    add_run_options(parser)
    add_settings(parser, SamplingConfig, ALIASES)
    arguments = parser.parse_args(list(argv))
    options = given_settings(arguments, SamplingConfig)
    refuse_lengths(options)
    config = SamplingConfig.from_options(**options, early_stop=False)
    requests = read_requests(arguments.texts, arguments.prompts_file, arguments.prompts_format)
    settings = {"command": "infill"}
    settings |= {name: getattr(arguments, name) for name in ("model_name_or_path", "dtype")}
    settings |= {name: value for name, value in dataclasses.asdict(config).items() if name != "gen_length"}
    if arguments.model_name_or_path == EMBEDDED:
        requests = requests or [Puzzles.unseen(options.get("seed"), arguments.output)]
        return run(arguments, Puzzles, requests, options, settings)
    if not requests:
        raise OptionError(
            'Give a text with blanks, as "It was [MASK:3].", or --prompts_file FILE (- for standard input).'
        )
    return run(arguments, Blanks, requests, options, settings)
