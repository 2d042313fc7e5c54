"""Sudoku data of 6x6 and 9x9: solved grids, and puzzles with one solution, any number of them.

Grids are drawn from base grids by random symmetries, and train and test share no base grid (`sudoku_bases`). Everything
is keyed: the same arguments give the same rows on every machine, and the first k of n rows are the k rows.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from dllm.data.sudoku_bases import Grids, Indices, base_grids, random_orders, raw_words
from dllm.data.sudoku_solver import Board, board, is_solution, search, solve
from dllm.errors import DataError, OptionError

__all__ = ["DEFAULT_CLUES", "FEWEST_CLUES", "is_solution", "puzzles", "solutions", "solve"]

DEFAULT_CLUES: dict[int, tuple[int, int]] = {6: (12, 18), 9: (30, 50)}
"""Fewest and most clues of a puzzle, by size, both included."""

FEWEST_CLUES: dict[int, int] = {6: 8, 9: 17}
"""No puzzle with fewer clues has only one solution."""

_CHUNK = 4096  # rows that share one generator
_ORDERS = 8  # removal orders tried on one grid before another grid is taken
_GRIDS = 16


def solutions(size: int, split: str, n: int, *, seed: int = 0) -> Grids:
    """Draws solved grids.

    Base grids are taken in a keyed order, all of them before any comes again, and each draw gets a random symmetry: the
    whole group for 9x9, relabelling alone for 6x6.

    Args:
        size: 6 or 9.
        split: `train` or `test`.
        n: how many grids; the first k of n are the k grids.
        seed: another seed gives another order and other symmetries; it moves no base grid between the splits.

    Returns:
        uint8 [n, size * size], digits from 1.

    Raises:
        DataError: the split is unknown.
        OptionError: size is not 6 or 9, or n is negative.
    """
    bases = base_grids(size, split)
    if n < 0:
        raise OptionError(f"n is {n}: the number of grids has to be 0 or more")
    sweeps = -(-n // len(bases))
    order = [random_orders(raw_words(len(bases), "order", size, split, seed, sweep)) for sweep in range(sweeps)]
    which = np.concatenate([np.empty(0, dtype=np.int64), *order])[:n]
    grids = np.empty((n, size * size), dtype=np.uint8)
    for start in range(0, n, _CHUNK):
        part = bases[which[start : start + _CHUNK]]
        grids[start : start + len(part)] = _transform(size, part, "transform", size, split, seed, start)
    return grids


def _transform(size: int, grids: Grids, *key: object) -> Grids:
    """Applies a keyed random symmetry to each of at most `_CHUNK` grids."""
    # All words of a chunk are made whatever its length, so that a row does not depend on how many follow.
    raw = raw_words(_CHUNK * (size + 1), *key).reshape(_CHUNK, size + 1)[: len(grids)]
    digits = random_orders(raw[:, :size])
    if size == 9:
        grids = np.take_along_axis(grids, _cell_order(raw[:, 9]), axis=1)
    return (np.take_along_axis(digits, grids.astype(np.int64) - 1, axis=1) + 1).astype(np.uint8)


def _cell_order(words: npt.NDArray[np.uint64]) -> Indices:
    """Returns int64 [n, 81], for each cell of a moved 9x9 grid the cell it comes from; one random word [n] a grid."""
    orders = np.array(list(itertools.permutations(range(3))), dtype=np.int64)
    picks = []
    for _ in range(8):
        words, pick = np.divmod(words, np.uint64(6))
        picks.append(orders[pick.astype(np.int64)])
    sides = []
    for band, *inside in (picks[:4], picks[4:]):
        lines = 3 * band[:, :, None] + np.stack(inside, axis=1)
        sides.append(lines.reshape(-1, 9))
    cells = 9 * sides[0][:, :, None] + sides[1][:, None, :]
    transpose = (words % np.uint64(2)).astype(bool)[:, None, None]
    return np.where(transpose, cells.transpose(0, 2, 1), cells).reshape(-1, 81)


def puzzles(size: int, split: str, n: int, *, clues: tuple[int, int], seed: int = 0) -> list[tuple[str, str]]:
    """Draws puzzles that have exactly one solution.

    Cells are blanked in a keyed random order, each one if the solution stays the only one, until the number of clues,
    uniform in the range, is reached. Where an order ends too early another is tried, and then another grid.

    Args:
        size: 6 or 9.
        split: `train` or `test`.
        n: how many puzzles; the first k of n are the k puzzles.
        clues: fewest and most clues, both included; `DEFAULT_CLUES[size]` is a good choice.
        seed: another seed gives other puzzles; it moves no base grid between the splits.

    Returns:
        n pairs of a puzzle, with `.` for a blank, and its solution.

    Raises:
        DataError: the split is unknown, or no puzzle with so few clues was found.
        OptionError: size, n or clues is out of range.
    """
    grids = solutions(size, split, n, seed=seed)
    fewest, most = clues
    if not FEWEST_CLUES[size] <= fewest <= most <= size * size:
        raise OptionError(
            f"clues is {clues}: give the fewest and the most, "
            f"from {FEWEST_CLUES[size]} to {size * size} for {size}x{size}"
        )
    rows = []
    for index, grid in enumerate(grids):
        key = ("puzzle", size, split, seed, index)
        wanted = fewest + int(raw_words(1, *key)[0] % np.uint64(most - fewest + 1))
        rows.append(_one_puzzle(size, split, grid, wanted, key))
    return rows


def _one_puzzle(size: int, split: str, grid: Grids, wanted: int, key: tuple[object, ...]) -> tuple[str, str]:
    """Returns a puzzle of a grid with `wanted` clues, or of another grid of the split where this one refuses."""
    for attempt in range(_GRIDS):
        if attempt:
            bases = base_grids(size, split)
            pick = int(raw_words(1, *key, "grid", attempt)[0] % np.uint64(len(bases)))
            grid = _transform(size, bases[pick : pick + 1], *key, "transform", attempt)[0]
        solution = grid.tolist()
        orders = random_orders(raw_words(_ORDERS * len(solution), *key, attempt).reshape(_ORDERS, -1)).tolist()
        for order in orders:
            values = _blank(board(size), solution, order, wanted)
            if values is not None:
                return "".join(str(v) if v else "." for v in values), "".join(map(str, solution))
    raise DataError(
        f"no {size}x{size} puzzle with {wanted} clues and one solution after {_GRIDS * _ORDERS} tries: "
        "ask for more clues"
    )


def _blank(rules: Board, solution: list[int], order: list[int], wanted: int) -> list[int] | None:
    """Blanks cells in the given order, each one if the solution stays unique, until `wanted` clues are left.

    Several cells are tried together and halved on failure: with more clues a unique puzzle stays unique, so this gives
    just what one cell at a time would give.

    Returns:
        The digits with 0 for a blank, or None where the order ends before.
    """
    values = solution.copy()
    left, position, pending = len(values), 0, 0
    while left > wanted:
        if position == len(order):
            return None
        # The fewer clues are left the likelier is a failure; a failed try halves what is taken next.
        size = pending or max(1, min(left - wanted, (left - 3 * rules.size) // 2))
        cells = order[position : position + size]
        for cell in cells:
            values[cell] = 0
        if _is_unique(rules, values):
            left -= len(cells)
            position += len(cells)
            pending = 0
        else:
            for cell in cells:
                values[cell] = solution[cell]
            position += size == 1
            pending = size // 2
    return values


def _is_unique(rules: Board, values: list[int]) -> bool:
    found: list[list[int]] = []
    candidates = [1 << (v - 1) if v else rules.full for v in values]
    search(rules, candidates, [c for c, v in enumerate(values) if v], 2, found)
    return len(found) == 1
