"""Reads, checks and solves one sudoku of 6x6 (boxes of 2 rows by 3 columns) or 9x9.

A puzzle is a string of size * size characters in row order: digits from 1, and `.` for a blank (`0` and `_` are read as
blanks). The solver keeps a candidate set, a bit mask, for each cell; it fills naked and hidden singles and then
branches on the cell with two candidates, else on a digit with two cells in a unit, else on the cell with the fewest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dllm.errors import DataError, OptionError

BOX_HEIGHT = {6: 2, 9: 3}
"""Rows of a box, by size; a box always has 3 columns."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """What the rules say for one size: which cells form a unit and which cells exclude each other."""

    size: int
    full: int
    """A candidate set with every digit: bit d - 1 stands for digit d."""
    units: tuple[tuple[int, ...], ...]
    peers: tuple[tuple[int, ...], ...]


@functools.cache
def board(size: int) -> Board:
    """Returns the board of a size, 6 or 9."""
    if size not in BOX_HEIGHT:
        raise OptionError(f"size is {size!r}: sudoku comes in the sizes 6 and 9")
    height, cells = BOX_HEIGHT[size], range(size * size)
    row, column = [c // size for c in cells], [c % size for c in cells]
    box = [r // height * height + c // 3 for r, c in zip(row, column, strict=True)]
    units = tuple(tuple(c for c in cells if of[c] == u) for of in (row, column, box) for u in range(size))
    peers = tuple(tuple(sorted({p for unit in units if c in unit for p in unit} - {c})) for c in cells)
    return Board(size=size, full=(1 << size) - 1, units=units, peers=peers)


def parse(puzzle: str) -> tuple[Board, list[int]]:
    """Reads a puzzle.

    Args:
        puzzle: 36 or 81 characters.

    Returns:
        The board, and the digit of each cell, 0 for a blank.

    Raises:
        DataError: wrong length, wrong character, or the same digit twice in a unit.
    """
    if len(puzzle) not in (36, 81):
        raise DataError(f"a sudoku has 36 or 81 characters, and this has {len(puzzle)}: {puzzle!r}")
    rules = board(6 if len(puzzle) == 36 else 9)
    values: list[int] = []
    for cell, character in enumerate(puzzle):
        if character in ".0_":
            values.append(0)
        elif character in "123456789"[: rules.size]:
            values.append(int(character))
        else:
            raise DataError(
                f"sudoku: {character!r} at {_place(rules, cell)} is neither a digit from 1 to {rules.size} "
                "nor a blank ('.', '0' or '_')"
            )
    for unit in rules.units:
        held: dict[int, int] = {}
        for cell in unit:
            if values[cell] and held.setdefault(values[cell], cell) != cell:
                first = _place(rules, held[values[cell]])
                raise DataError(f"sudoku: {first} and {_place(rules, cell)} both hold {values[cell]}")
    return rules, values


def _place(rules: Board, cell: int) -> str:
    return f"row {cell // rules.size + 1}, column {cell % rules.size + 1}"


def solve(puzzle: str, *, limit: int = 2) -> list[str]:
    """Finds solutions of a puzzle.

    Args:
        puzzle: 36 or 81 characters.
        limit: stop after this many; 2 are enough to see whether a solution is the only one.

    Returns:
        At most `limit` grids; an empty list where there is none.

    Raises:
        DataError: the puzzle cannot be read, or its clues contradict each other.
        OptionError: limit is below 1.
    """
    if limit < 1:
        raise OptionError(f"limit is {limit}: ask for 1 solution or more")
    rules, values = parse(puzzle)
    candidates = [1 << (v - 1) if v else rules.full for v in values]
    found: list[list[int]] = []
    search(rules, candidates, [c for c, v in enumerate(values) if v], limit, found)
    return ["".join(str(c.bit_length()) for c in grid) for grid in found]


def is_solution(puzzle: str, grid: str) -> bool:
    """Tells whether a grid is complete, valid, and agrees with the clues of a puzzle.

    Args:
        puzzle: 36 or 81 characters; it has to be readable.
        grid: what a model answered: any string.
    """
    _, clues = parse(puzzle)
    if len(grid) != len(puzzle):
        return False
    try:
        _, values = parse(grid)
    except DataError:
        return False
    return all(values) and all(clue in (0, value) for clue, value in zip(clues, values, strict=True))


def search(rules: Board, candidates: list[int], decided: list[int], limit: int, found: list[list[int]]) -> None:
    """Adds solutions to `found` until it holds `limit`; `candidates` and `decided` are used up."""
    if not _propagate(rules, candidates, decided):
        return
    open_cells = [c for c, mask in enumerate(candidates) if mask & (mask - 1)]
    if not open_cells:
        found.append(candidates)
        return
    for cell, bit in _branches(rules, candidates, open_cells):
        if len(found) >= limit:
            return
        branch = candidates.copy()
        branch[cell] = bit
        search(rules, branch, [cell], limit, found)


def _branches(rules: Board, candidates: list[int], open_cells: list[int]) -> list[tuple[int, int]]:
    """Returns (cell, digit bit) choices, exactly one of them right.

    First choice is a cell with two digits, then a digit with two cells in a unit, then the cell with the fewest digits:
    without the second, puzzles with few clues can take a thousand times as long.
    """
    cell = min(open_cells, key=lambda c: candidates[c].bit_count())
    if candidates[cell].bit_count() > 2:
        for unit in rules.units:
            once = twice = thrice = 0
            for c in unit:
                mask = candidates[c]
                thrice |= twice & mask
                twice |= once & mask
                once |= mask
            if pair := twice & ~thrice:
                bit = pair & -pair
                return [(c, bit) for c in unit if candidates[c] & bit]
    return [(cell, 1 << digit) for digit in range(rules.size) if candidates[cell] >> digit & 1]


def _propagate(rules: Board, candidates: list[int], decided: list[int]) -> bool:
    """Fills naked and hidden singles until none is left; False where a cell or a digit has no place."""
    while True:
        while decided:
            cell = decided.pop()
            bit = candidates[cell]
            for peer in rules.peers[cell]:
                mask = candidates[peer]
                if mask & bit:
                    mask ^= bit
                    if not mask:
                        return False
                    candidates[peer] = mask
                    if not mask & (mask - 1):
                        decided.append(peer)
        if not _hidden_singles(rules, candidates, decided):
            return False
        if not decided:
            return True


def _hidden_singles(rules: Board, candidates: list[int], decided: list[int]) -> bool:
    """Decides the cells that alone can hold a digit of a unit; False where a digit has no place or a cell needs two."""
    for unit in rules.units:
        once = twice = 0
        for cell in unit:
            mask = candidates[cell]
            twice |= once & mask
            once |= mask
        if once != rules.full:
            return False
        hidden = once & ~twice
        for cell in unit if hidden else ():
            mask = candidates[cell] & hidden
            if mask and mask != candidates[cell]:
                if mask & (mask - 1):
                    return False
                candidates[cell] = mask
                decided.append(cell)
    return True
