"""`dllm demo`: from nothing to solved puzzles in some minutes: train, evaluate, watch, plot."""

from __future__ import annotations

import shutil
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from dllm.cli.options import Parser

RECIPE = {
    "--model_name_or_path": "tiny",
    "--dataset_args": "builtin:sudoku6[train:200_000,test:500]",
    "--max_length": "37",  # 36 cells and the end of the text
    "--optimizer": "muon",
    "--learning_rate": "3e-3",
    "--weight_decay": "0.01",
    "--warmup_steps": "30",
    "--random_length": "0",
    "--logging_steps": "10",
    "--eval_strategy": "steps",
    "--eval_steps": "100",
    "--save_steps": "100",
    "--per_device_train_batch_size": "256",
    "--per_device_eval_batch_size": "250",
}
"""Options of `dllm pretrain`, less the steps and the folder."""

PER_FORWARD = (1, 2, 4, 8, float("inf"))


def main(argv: Sequence[str]) -> None:
    """Runs the demonstration."""
    parser = Parser(
        prog="dllm demo",
        description="Train a small LLaDA from scratch on 6x6 sudoku, then let it solve unseen puzzles.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sudoku6"), help="where everything goes")
    parser.add_argument("--max_steps", type=int, default=450, help="training steps of 256 grids")
    parser.add_argument("--puzzles", type=int, default=500, help="unseen puzzles to evaluate on")
    arguments = parser.parse_args(list(argv))
    folder: Path = arguments.output_dir
    final = folder / "checkpoint-final"

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    console = Console(highlight=False)
    began = time.monotonic()
    console.rule("1. train")
    there = final.exists()
    if there:
        console.print(f"{final} is there already: nothing to train (delete {folder} to start anew).")
    else:
        command = [word for pair in RECIPE.items() for word in pair]
        command += ["--max_steps", str(arguments.max_steps), "--output_dir", str(folder)]
        command += ["--resume_from_checkpoint", "auto"]
        console.print("A LLaDA with 1.3 million weights learns to fill in masked cells of solved 6x6 grids:\n")
        shown = "  dllm pretrain " + " ".join(f'"{word}"' if "[" in word else word for word in command)
        console.print(shown + "\n", markup=False, soft_wrap=True)  # a hard break would be copied into the shell
        from dllm.pipelines.llada.trainer import pretrain

        pretrain(command)
    trained = "" if there else f"Trained in {time.monotonic() - began:.0f} s; "

    from dllm.cli.display import LiveCanvas, sudoku_grid
    from dllm.data.sudoku import DEFAULT_CLUES, is_solution, puzzles
    from dllm.evaluation.plots import plot_run
    from dllm.evaluation.sudoku import fill_puzzles, score
    from dllm.pipelines.llada.loading import load_model, to_device
    from dllm.pipelines.llada.tokenizer import load_tokenizer
    from dllm.training.callbacks import hide_bars, read_log

    hide_bars(everywhere=True)  # training hid them already, if there was any

    console.rule("2. evaluate")
    clues = DEFAULT_CLUES[6]
    console.print(
        f"{arguments.puzzles} puzzles with {clues[0]} to {clues[1]} clues, none of whose grids it has seen. A mask may be filled "
        f"at any place and many at once; the fewer forwards, the faster and the bolder:"
    )
    model, tokenizer = to_device(load_model(str(final))), load_tokenizer(str(final))
    unseen = [puzzle for puzzle, _ in puzzles(6, "test", arguments.puzzles, clues=clues)]
    scores = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("solving", total=len(unseen) * len(PER_FORWARD))
        for speed in PER_FORWARD:
            scores.append(
                score(model, tokenizer, unseen, tokens_per_forward=speed, on_batch=lambda n: progress.advance(task, n))
            )
    table = Table("tokens per forward", "forwards a puzzle", "solved exactly")
    for row in scores:
        table.add_row(f"{row.tokens_per_forward:.1f}", f"{row.nfe:.1f}", f"{100 * row.exact:.1f} %")
    console.print(table)

    console.rule("3. watch")
    puzzle = unseen[0]
    start = [None if c == "." else c for c in puzzle]
    with LiveCanvas(start, tokenizer.decode, draw=sudoku_grid, console=console) as live:
        (grid,), _ = fill_puzzles(model, tokenizer, [puzzle], on_step=live)
    console.print("solved" if is_solution(puzzle, grid) else "NOT solved: the model erred")

    console.rule("4. picture")
    picture = plot_run(
        read_log(folder / "log.jsonl"), scores, "LLaDA on 6x6 sudoku, from scratch", folder / "sudoku6.png"
    )
    console.print(f"Loss curve, and accuracy against tokens per forward: [bold]{picture}[/bold]")
    activate = Path(sys.prefix, "bin", "activate")
    # `make demo` runs in an environment that the user's shell has not entered
    enter = "" if shutil.which("dllm") or not activate.exists() else f"  source {activate}\n"
    console.print(
        f"\n{trained}{100 * scores[0].exact:.1f} % of {arguments.puzzles} unseen puzzles solved exactly.\n\n"
        f"[bold]Next[/bold]\n"
        f"{enter}"
        f"  dllm generate                        the model that ships inside, on a 9x9 puzzle\n"
        f"  dllm sft --model_name_or_path {final} --dataset_args builtin:addition \\\n"
        f"      --max_length 64 --max_steps 300 --learning_rate 1e-3 --output_dir runs/addition\n"
        f"                                       fine-tuning, shown on sums (that it adds right takes far longer)\n"
        f"  dllm pretrain --help                 your own text: --dataset_args my.jsonl\n"
        f"  examples/llada/README.md             the same on GPUs, with LLaDA-8B",
        soft_wrap=True,
    )
