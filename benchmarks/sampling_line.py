"""The `line` section of sampling.py: rows that make room as they are done, against batches that wait for their last row."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from turns import CACHES, Run, cached, heading, in_turns

from dllm.data.sudoku import puzzles
from dllm.evaluation.sudoku import puzzle_text
from dllm.pipelines.llada import Engine, infilling, load_model, load_tokenizer

PROMPTS, CLUES = 64, (30, 75)
OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "fixed, blocks of 9": {"block_length": 9},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.9, blocks of 9": {"threshold": 0.9, "block_length": 9},
}


def line_section(arguments: argparse.Namespace) -> str:
    """The texts of many puzzles of different numbers of blanks, both ways; they have to be the same."""
    model, tokenizer = load_model("builtin:sudoku9").eval(), load_tokenizer("builtin:sudoku9")
    asked = [puzzle_text(tokenizer, puzzle) for puzzle, _ in puzzles(9, "test", PROMPTS, clues=CLUES, seed=3)]

    def batches(rows: int, options: dict[str, Any]) -> tuple[list[str], int]:
        done = [
            infilling(model, tokenizer, asked[first : first + rows], **options) for first in range(0, PROMPTS, rows)
        ]
        return [text for one in done for text in one.texts], sum(one.nfe for one in done)

    def engine(rows: int, options: dict[str, Any]) -> tuple[list[str], int]:
        with Engine(model, tokenizer, max_rows=rows) as running:
            tickets = [running.submit_infilling(text, **options) for text in asked]
            return [str(ticket.answer().text) for ticket in tickets], running.scheduler.nfe

    lines = [
        "| rows | policy | cache | forwards in batches | in a line | seconds in batches | in a line | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows in (size for size in arguments.batches if size > 1):
        for name, options in OPTIONS.items():
            for cache in (cache for cache in arguments.caches if cache in CACHES):
                given = options | cached(cache)
                runs: dict[str, Run] = {
                    "batches": partial(batches, rows, given),
                    "engine": partial(engine, rows, given),
                }
                timed = in_turns(runs, arguments.rounds)
                (texts, forwards), (other, fewer) = timed["batches"].last, timed["engine"].last
                assert texts == other, "a row's tokens depend on its company"
                one, two = timed["batches"].seconds, timed["engine"].seconds
                lines.append(
                    f"| {rows} | {name} | {cache} | {forwards} | {fewer} | {one:.2f} | {two:.2f} | {one / two:.2f} |"
                )
                print(lines[-1], flush=True)
    what = (
        f"{PROMPTS} unseen puzzles of {CLUES[0]} to {CLUES[1]} clues, the sudoku model that ships inside, in batches of so many "
        f"rows, each until its last row is done, and through an engine of so many rows, where a row that is done makes room for "
        f"the next. Texts are the same."
    )
    return heading("Batches and a line", what) + "\n".join(lines) + "\n"
