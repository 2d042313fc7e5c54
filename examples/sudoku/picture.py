"""Draws the model that ships inside filling in a puzzle that it has never seen: the picture in README.md.

Use:

    python examples/sudoku/picture.py docs/denoising.png
"""

import argparse
from pathlib import Path

from dllm.data.sudoku import is_solution, puzzles
from dllm.evaluation.plots import plot_denoising
from dllm.evaluation.sudoku import fill_puzzles
from dllm.pipelines import llada

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--model_name_or_path", default="builtin:sudoku9")
    parser.add_argument("--seed", type=int, default=7, help="which puzzle")
    arguments = parser.parse_args()
    model = llada.load_model(arguments.model_name_or_path)
    tokenizer = llada.load_tokenizer(arguments.model_name_or_path)
    puzzle, _ = puzzles(9, "test", 1, clues=(30, 32), seed=arguments.seed)[0]
    (grid,), result = fill_puzzles(model, tokenizer, [puzzle], trace=True)
    if result.trace is None or not is_solution(puzzle, grid):
        raise SystemExit(f"The model erred on this puzzle; try another --seed.\n{puzzle}\n{grid}")
    print(plot_denoising(puzzle, result.trace, grid, arguments.path, shares=(0, 0.3, 0.65, 1)))
