"""Sampling: our loop, its policies and its caches against the published loop, speed and accuracy side by side.

Use:

    python benchmarks/sampling.py random --output benchmarks/results/sampling_random_cpu_DATE.md
    python benchmarks/sampling.py tasks --output benchmarks/results/sampling_tasks_cpu_DATE.md
    python benchmarks/sampling.py line --output benchmarks/results/sampling_line_cpu_DATE.md
    python benchmarks/sampling.py steps --device cuda --preset 8b --output benchmarks/results/sampling_steps_8b_DEVICE_DATE.md

The baseline is `tests/reference/published.py`, the published loop over the same model: only the loop differs. Variants take
turns within one process, so that a machine that others use slows all of them, and a variant's figure is the median of its
rounds. With one thread seconds are those of the process on the CPU, which other programs do not lengthen; otherwise they
are the clock's.

`random` has random weights, a body of 34 M parameters or of the embedded model's shape, and ragged prompts, and checks that
the exact variants write the published loop's tokens. `tasks` has answers that can be checked: the sudoku model that ships
inside, on puzzles (masks between given tokens) and on grids to be completed (a prompt and a tail of blocks), with its own
vocabulary and with ones widened to the size of a public checkpoint's. `line` runs prompts of many lengths in batches that
wait for their last row, and through the engine, where rows make room for others. `steps` is for a GPU:
milliseconds a step of a shape against reading its weights once, tokens/s by batch, and how often the host waits for the device.

The floor of a variant is what its schedule cannot do without, from parts that are timed alone before the loops are: the body
at every position that is computed, and the head (V x D products) at every position that is asked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from sampling_line import line_section
from sampling_random import random_section
from sampling_steps import steps_section
from sampling_tasks import POLICIES, tasks_section
from turns import CACHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["random", "tasks", "steps", "line"])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[126_464, 32_768, 8_192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--body", choices=["large", "embedded"], default="large", help="random: the size of the model")
    parser.add_argument("--gen_length", type=int, default=128)
    parser.add_argument("--block_length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=128, help="random: of the whole answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference_rows", type=int, default=4, help="rows of a batch that the published loop runs")
    parser.add_argument(
        "--at_once", type=int, default=1, help="random: of those, rows of one batch, padded on the left"
    )
    parser.add_argument(
        "--task_vocabularies", nargs="+", type=int, default=[0, 32_768, 126_464], help="0 is a model's own"
    )
    parser.add_argument("--puzzles", type=int, default=100)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES, help="tasks, line")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), help="tasks")
    parser.add_argument("--tasks", default="", help="tasks: only those whose name begins so")
    parser.add_argument("--device", default="cuda", help="steps: where")
    parser.add_argument("--preset", default="8b", help="steps: 8b or moe-7b")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="steps: bytes a second; an H100's by default")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sections = {"random": random_section, "tasks": tasks_section, "steps": steps_section, "line": line_section}
    text = sections[arguments.section](arguments)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
