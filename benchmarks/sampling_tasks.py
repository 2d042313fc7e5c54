"""The `tasks` section of sampling.py: trained models, every policy with every cache, accuracy beside speed."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from reference.published import fill, published_generate
from torch import Tensor
from turns import CACHES, Run, cached, exists, heading, in_turns, logits_of

from dllm.data.sudoku import is_solution, puzzles, solutions
from dllm.pipelines.llada import generate, infilling, load_model, load_tokenizer

POLICIES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "threshold 0.9": dict(policy="threshold", threshold=0.9),
    "threshold 0.999, all anew every 2nd step": dict(policy="threshold", threshold=0.999, cache_refresh=2),
    "factor 1": dict(policy="factor", factor=1.0),
    "entropy_bound 0.1": dict(policy="entropy_bound", gamma=0.1),
    "klass": dict(policy="klass"),
    "wino": dict(policy="wino"),
    "hierarchical": dict(policy="hierarchical"),
    "remdm": dict(policy="remdm"),
    "fixed, margin": dict(remasking="margin"),
    "fixed, entropy": dict(remasking="entropy"),
}


class Task(NamedTuple):
    """Questions, how each loop answers them, and what is right."""

    name: str
    model: Any
    questions: int
    published: Callable[[int], list[Tensor]]
    """From a number of questions to the canvases that the published loop makes of them, one token a step."""
    ours: Callable[..., Any]
    """From a number of questions and options to our result."""
    right: Callable[[Sequence[Tensor]], float]
    """The share of right answers."""
    written: Callable[[Sequence[Tensor]], int]
    """Tokens before the end."""


def widen(model: Any, rows: int, unused: int) -> None:
    """Adds rows to the vocabulary. In the head they are twice that of a token which training never showed, so, as in a model
    that was trained with them, they take no probability.
    """
    before = len(model.get_input_embeddings().weight)
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            head = model.get_output_embeddings().weight
            head[before:] = 2 * head[unused]


def sudoku_task(vocabulary: int, questions: int, block_length: int | None) -> Task:
    """Unseen puzzles with 36 to 50 clues; the published loop, which knows no blocks of scattered masks, has one block."""
    model, tokenizer = load_model("builtin:sudoku9"), load_tokenizer("builtin:sudoku9")
    widen(model, vocabulary, tokenizer.unk_token_id)
    mask = int(tokenizer.mask_token_id)
    unseen = [puzzle for puzzle, _ in puzzles(9, "test", questions, clues=(36, 50))]
    texts = [puzzle.replace(".", str(tokenizer.mask_token)) + str(tokenizer.eos_token) for puzzle in unseen]
    rows = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    blanks = [int((row == mask).sum()) for row in rows]

    def published(n: int) -> list[Tensor]:
        # a row with fewer blanks than steps fills one at each of its first steps, as if it were alone
        options = dict(mask_token_id=mask, steps=max(blanks[:n]), block_length=82)
        return list(fill(partial(logits_of, model), torch.stack(rows[:n]), 0, **options)[0])

    def right(canvases: Sequence[Tensor]) -> float:
        grids = [tokenizer.decode(canvas[:81].tolist()) for canvas in canvases]
        return sum(is_solution(p, g) for p, g in zip(unseen, grids, strict=False)) / len(grids)

    return Task(
        f"sudoku9, {f'blocks of {block_length} masks' if block_length else 'one block'}",
        model,
        questions,
        published,
        lambda n, **options: infilling(model, None, rows[:n], block_length=block_length, **options),
        right,
        lambda canvases: sum(blanks[: len(canvases)]),
    )


def grids_task(vocabulary: int, questions: int, given: int, block_length: int) -> Task:
    """Writes a grid to its end from its first cells: a prompt and a tail of blocks; any grid without a fault is right."""
    model, tokenizer = load_model("builtin:sudoku9"), load_tokenizer("builtin:sudoku9")
    widen(model, vocabulary, tokenizer.unk_token_id)
    starts = [
        "".join(map(str, grid)) for grid in solutions(9, "test", questions).reshape(questions, 81)[:, :given].tolist()
    ]
    rows = [torch.tensor(ids) for ids in tokenizer(starts, add_special_tokens=False)["input_ids"]]
    gen_length = 82 - given  # the end of the text too
    shape = dict(gen_length=gen_length, block_length=block_length)

    def published(n: int) -> list[Tensor]:
        options = dict(mask_token_id=int(tokenizer.mask_token_id), steps=gen_length, at_once=n, **shape)
        return published_generate(partial(logits_of, model), rows[:n], **options).canvases

    def right(canvases: Sequence[Tensor]) -> float:
        grids = [tokenizer.decode(canvas[:81].tolist()) for canvas in canvases]
        asked = [start.ljust(81, ".") for start in starts]
        return sum(is_solution(a, g) for a, g in zip(asked, grids, strict=False)) / len(grids)

    return Task(
        f"grids from {given} cells, {gen_length // block_length} blocks of {block_length}",
        model,
        questions,
        published,
        lambda n, **options: generate(model, None, rows[:n], **shape, **options),
        right,
        lambda canvases: (81 - given) * len(canvases),
    )


def tasks_section(arguments: argparse.Namespace) -> str:
    lines = [
        "| task | V | policy | cache | right | tokens/forward | forwards of a row | seconds | tokens/s | against published |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    missing = [name for name, options in POLICIES.items() if not any(exists({**cached(c), **options}) for c in CACHES)]
    missing += [f"cache {cache}" for cache in CACHES if not exists(cached(cache))]
    few = arguments.reference_rows
    for vocabulary in arguments.task_vocabularies:
        made = [sudoku_task(vocabulary, arguments.puzzles, block) for block in (None, 16)]
        made += [grids_task(vocabulary, arguments.puzzles, given, 16) for given in (34, 18)]
        for task in (task for task in made if task.name.startswith(arguments.tasks)):
            runs: dict[str, Run] = {"published | -": partial(task.published, few)}
            whole: dict[str, Run] = {}
            for policy, options in ((name, POLICIES[name]) for name in arguments.policies):
                for cache in arguments.caches:
                    if exists(chosen := {**cached(cache), **options}):
                        runs[f"{policy} | {cache}"] = partial(task.ours, few, **chosen)
                        whole[f"{policy} | {cache}"] = partial(task.ours, task.questions, **chosen)
            width = len(task.model.get_output_embeddings().weight)
            timed = in_turns(runs, arguments.rounds)
            theirs = timed["published | -"]
            base = task.written(theirs.last) / theirs.seconds
            for name, (seconds, done) in timed.items():
                speed = task.written(done if isinstance(done, list) else done.sequences) / seconds
                accuracy, per_forward, forwards = "that of fixed, none", "1.00", ""
                if name in whole:
                    result = whole[name]()
                    accuracy = f"{100 * task.right(result.sequences):.1f} %"
                    per_forward, forwards = f"{result.tokens_per_forward:.2f}", f"{statistics.mean(result.steps):.1f}"
                lines.append(
                    f"| {task.name} | {width:,} | {name} | {accuracy} | {per_forward} | {forwards} "
                    f"| {seconds:.2f} | {speed:.0f} | {speed / base:.2f} |"
                )
                print(lines[-1], flush=True)
    what = (
        f"the sudoku model that ships inside, fp32, {arguments.puzzles} unseen puzzles of 36 to 50 clues, and as many grids to "
        f"be completed. Seconds and tokens/s are those of the first {few} in one batch, for every loop; the published loop "
        f"commits a token a step, and its tokens are those of policy fixed without a cache. V above 103: the head widened by "
        f"rows that take no probability."
    )
    absent = f"\nNot in this version: {', '.join(missing)}.\n" if missing else ""
    return heading("Sampling from trained models", what) + "\n".join(lines) + "\n" + absent
