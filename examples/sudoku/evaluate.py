"""How many unseen 9x9 puzzles a model solves exactly, by number of clues and by tokens per forward.

Use:

    python examples/sudoku/evaluate.py --puzzles 1000
"""

import argparse

from dllm.data.sudoku import puzzles
from dllm.evaluation.sudoku import score
from dllm.pipelines import llada

CLUES = ((36, 50), (30, 35))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", default="builtin:sudoku9")
    parser.add_argument("--puzzles", type=int, default=1000, help="of each kind")
    parser.add_argument("--tokens_per_forward", type=float, nargs="+", default=[1, 2, 4, 8, float("inf")])
    arguments = parser.parse_args()
    model = llada.to_device(llada.load_model(arguments.model_name_or_path))
    tokenizer = llada.load_tokenizer(arguments.model_name_or_path)
    print("| clues | tokens per forward | forwards | exact |\n|---|---|---|---|")
    for clues in CLUES:
        unseen = [puzzle for puzzle, _ in puzzles(9, "test", arguments.puzzles, clues=clues)]
        for speed in arguments.tokens_per_forward:
            row = score(model, tokenizer, unseen, tokens_per_forward=speed)
            print(
                f"| {clues[0]} to {clues[1]} | {row.tokens_per_forward:.1f} | {row.nfe:.1f} | {100 * row.exact:.1f} % |",
                flush=True,
            )
