"""How many sudoku puzzles a model solves exactly, and how that depends on the tokens written per forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.data.sudoku import is_solution
from dllm.pipelines.llada.generate import infilling
from dllm.pipelines.llada.result import SamplingResult


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of a table of accuracy against speed."""

    puzzles: int
    exact: float
    """The share of puzzles filled without a fault."""
    tokens_per_forward: float
    nfe: float
    """Forwards a puzzle, the mean."""


def fill_puzzles(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, puzzles: Sequence[str], **options: Any
) -> tuple[list[str], SamplingResult]:
    """Fills puzzles in.

    A grid is text as the model saw it in pretraining: its cells in row order, then end-of-text. Blanks become masks, so
    solving is infilling.

    Args:
        model: pretrained on solved grids.
        tokenizer: one token a character.
        puzzles: digits, and `.`, `0` or `_` for blanks; all of one size.
        **options: of `infilling`.

    Returns:
        (the filled grids as digits, what `infilling` gave).
    """
    result = infilling(model, tokenizer, [puzzle_text(tokenizer, puzzle) for puzzle in puzzles], **options)
    return [text[: len(puzzle)] for text, puzzle in zip(result.texts, puzzles, strict=True)], result


def puzzle_text(tokenizer: PreTrainedTokenizerBase, puzzle: str) -> str:
    """A puzzle as the model reads it: masks for blanks (`.`, `0` or `_`), then end-of-text."""
    blanks = str.maketrans(dict.fromkeys(".0_", str(tokenizer.mask_token)))
    return puzzle.translate(blanks) + str(tokenizer.eos_token)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    puzzles: Sequence[str],
    *,
    tokens_per_forward: float = 1,
    batch_size: int = 100,
    on_batch: Callable[[int], None] | None = None,
    **options: Any,
) -> Score:
    """The share of puzzles that come out exact.

    Args:
        model: see `fill_puzzles`.
        tokenizer: see `fill_puzzles`.
        puzzles: each with one solution.
        tokens_per_forward: how many cells to fill per forward, about; infinity for all at once.
        batch_size: puzzles at a time; it changes nothing but the speed.
        on_batch: called with the number of puzzles done.
        **options: of `infilling`.
    """
    right = steps = written = 0
    by_blanks = sorted(puzzles, key=lambda p: sum(not c.isdigit() or c == "0" for c in p))
    for start in range(0, len(by_blanks), batch_size):
        batch = by_blanks[start : start + batch_size]
        most = max(sum(not c.isdigit() or c == "0" for c in puzzle) for puzzle in batch)
        grids, result = fill_puzzles(
            model, tokenizer, batch, steps=max(1, -int(-most // tokens_per_forward)), **options
        )
        right += sum(is_solution(puzzle, grid) for puzzle, grid in zip(batch, grids, strict=True))
        steps += sum(result.steps)
        written += sum(result.new_tokens)
        if on_batch is not None:
            on_batch(len(batch))
    return Score(
        puzzles=len(puzzles), exact=right / len(puzzles), tokens_per_forward=written / steps, nfe=steps / len(puzzles)
    )
