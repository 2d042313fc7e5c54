"""A small model whose answers are several blocks long and can be checked: many sums in one canvas.

Use:

    python benchmarks/sums.py --output_dir runs/sums

trains it; `python benchmarks/sampling.py --sums runs/sums/checkpoint-final` measures with it.

A question is 8 problems of `dllm.data.addition`, 6 characters each (`12+34;`). Its answer has the sums, as wide
(`00046;`, without the last semicolon): with the end of the turn 48 tokens, three blocks of 16.
No test sum, in either order, is seen in training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dllm.data.addition import problems
from dllm.pipelines.llada.loading import fresh_model
from dllm.pipelines.llada.tokenizer import char_tokenizer

DIGITS, SUMS, WIDTH = 2, 8, 6
GEN_LENGTH, BLOCK_LENGTH = SUMS * WIDTH, 16
RECIPE = {
    "--max_length": "128",
    "--optimizer": "muon",
    "--muon_learning_rate": "0.02",
    "--learning_rate": "3e-3",
    "--lr_scheduler_type": "linear",
    "--warmup_steps": "50",
    "--weight_decay": "0.01",
    "--per_device_train_batch_size": "64",
    "--logging_steps": "20",
    "--save_strategy": "no",
    "--report_to": "none",
}


def questions(split: str, n: int) -> list[tuple[str, str]]:
    """n questions and their answers."""
    pairs = [(question[:-1], answer.zfill(WIDTH - 1)) for question, answer in problems(split, n * SUMS, digits=DIGITS)]
    rows = [pairs[start : start + SUMS] for start in range(0, len(pairs), SUMS)]
    return [(";".join(q for q, _ in row) + ";", ";".join(a for _, a in row)) for row in rows]


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def right(texts: Sequence[str], answers: Sequence[str]) -> float:
    """The share of sums that are right; an answer that is too short has wrong ones."""
    found = [[*text.split(";"), *[""] * SUMS][:SUMS] for text in texts]
    expected = [answer.split(";") for answer in answers]
    good = sum(a == b for row, other in zip(found, expected, strict=True) for a, b in zip(row, other, strict=True))
    return good / (SUMS * len(answers))


def train(folder: Path, rows: int, steps: int, overrides: str) -> None:
    """From nothing, by `dllm sft` on rows written to a file."""
    from dllm.pipelines.llada.trainer import sft

    torch.manual_seed(0)
    tokenizer = char_tokenizer()
    with tempfile.TemporaryDirectory() as place:
        data, start = Path(place) / "sums.jsonl", Path(place) / "start"
        messages = [[*conversation(q), {"role": "assistant", "content": a}] for q, a in questions("train", rows)]
        data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages), encoding="utf-8")
        fresh_model("tiny", tokenizer, overrides).save_pretrained(start)
        tokenizer.save_pretrained(start)
        words = [word for pair in RECIPE.items() for word in pair]
        words += [
            "--model_name_or_path",
            str(start),
            "--dataset_args",
            f"{data}[train:{rows}]",
            "--max_steps",
            str(steps),
        ]
        sft([*words, "--output_dir", str(folder)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8000, help="conversations of 8 sums")
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--config_overrides", default="d_model=96,n_layers=3,mlp_hidden_size=256")
    arguments = parser.parse_args()
    train(arguments.output_dir, arguments.rows, arguments.max_steps, arguments.config_overrides)


if __name__ == "__main__":
    main()
