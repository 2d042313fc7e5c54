"""Scoring on sudoku: a small model that knows one grid by heart is right on its puzzles and on no other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dllm.data.sudoku import is_solution, puzzles
from dllm.evaluation.sudoku import Score, fill_puzzles, score
from dllm.pipelines import llada
from dllm.pipelines.llada.tokenizer import char_tokenizer

PAIRS = puzzles(6, "test", 5, clues=(20, 30), seed=1)
KNOWN = PAIRS[0][1]
OTHERS = [puzzle for puzzle, _ in PAIRS[1:]]


def with_blanks(*counts: int) -> list[str]:
    """Puzzles of the grid that is known."""
    return ["." * count + KNOWN[count:] for count in counts]


@pytest.fixture(scope="module")
def knows_one() -> tuple[Any, Any]:
    tokenizer = char_tokenizer()
    torch.manual_seed(0)
    model = llada.fresh_model("tiny", tokenizer, "n_layers=2,d_model=64,n_heads=2,mlp_hidden_size=128")
    ids = torch.tensor(tokenizer(KNOWN + tokenizer.eos_token)["input_ids"])[None].expand(8, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(200):
        masked = (torch.arange(37) < torch.randint(1, 14, (8, 1))) & (torch.rand(8, 37) < torch.rand(8, 1) + 0.1)
        noisy = ids.masked_fill(masked, tokenizer.mask_token_id)
        cross_entropy(model(input_ids=noisy, logits_to_keep=masked).logits, ids[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def test_puzzles_are_filled_and_the_clues_are_kept(knows_one: tuple[Any, Any]) -> None:
    few, many = with_blanks(3, 12)
    grids, result = fill_puzzles(*knows_one, [few, many.replace(".", "0"), many.replace(".", "_"), OTHERS[0]])
    assert grids[:3] == [KNOWN] * 3
    assert result.new_tokens == [3, 12, 12, OTHERS[0].count(".")]
    assert all(clue in (".", digit) for clue, digit in zip(OTHERS[0], grids[3], strict=True))


def test_the_right_grids_count_and_no_other(knows_one: tuple[Any, Any]) -> None:
    done: list[int] = []
    mixed = [*with_blanks(4, 12), *OTHERS]
    result = score(*knows_one, mixed, batch_size=4, on_batch=done.append)
    right = sum(is_solution(p, grid) for p, grid in zip(mixed, fill_puzzles(*knows_one, mixed)[0], strict=True))
    assert right == 2  # what the model knows, and nothing else
    assert (result.puzzles, result.exact) == (6, 2 / 6)
    assert done == [4, 2]


def test_the_tokens_of_a_forward_are_the_blanks_over_the_steps(knows_one: tuple[Any, Any]) -> None:
    three = with_blanks(4, 8, 12)
    one_by_one = score(*knows_one, three, batch_size=1)
    assert one_by_one == Score(puzzles=3, exact=1.0, tokens_per_forward=1.0, nfe=8.0)
    four = score(*knows_one, three, batch_size=1, tokens_per_forward=4)
    assert four == Score(puzzles=3, exact=1.0, tokens_per_forward=4.0, nfe=2.0)
    at_once = score(*knows_one, three, tokens_per_forward=math.inf)
    assert at_once == Score(puzzles=3, exact=1.0, tokens_per_forward=8.0, nfe=1.0)


def test_options_reach_the_loop(knows_one: tuple[Any, Any]) -> None:
    noisy = {fill_puzzles(*knows_one, with_blanks(30), temperature=3.0, seed=seed)[0][0] for seed in range(3)}
    assert len(noisy) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_the_batch_size_changes_no_answer(knows_one: tuple[Any, Any], batch_size: int) -> None:
    assert score(*knows_one, [*with_blanks(4, 12), *OTHERS], batch_size=batch_size).exact == 2 / 6
