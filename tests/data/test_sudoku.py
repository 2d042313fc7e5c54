"""Sudoku: the solver, the split by base grid, and the data drawn from it."""

from __future__ import annotations

import hashlib
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data import sudoku_bases
from dllm.data.sudoku import DEFAULT_CLUES, is_solution, puzzles, solutions, solve
from dllm.data.sudoku_solver import board
from dllm.errors import DataError, OptionError

HARD = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
HARD_SOLUTION = "812753649943682175675491283154237896369845721287169534521974368438526917796318452"
SEVENTEEN_CLUES = "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......"


def all_valid(grids: np.ndarray) -> bool:
    """Tells whether every unit of every grid holds every digit once; the units are spelt out again here."""
    n, cells = grids.shape
    size = int(cells**0.5)
    height = size // 3
    square = grids.reshape(n, size, size)
    boxes = square.reshape(n, size // height, height, size // 3, 3).transpose(0, 1, 3, 2, 4).reshape(n, size, size)
    digits = np.arange(1, size + 1)
    return all(bool((np.sort(lines, axis=2) == digits).all()) for lines in (square, square.transpose(0, 2, 1), boxes))


def count_by_brute_force(puzzle: str) -> int:
    """Counts the solutions of a 6x6 puzzle cell by cell, with no deduction at all."""
    cells = [int(c) if c != "." else 0 for c in puzzle]

    def fits(cell: int, digit: int) -> bool:
        row, column = divmod(cell, 6)
        for other, value in enumerate(cells):
            r, c = divmod(other, 6)
            if value == digit and (r == row or c == column or (r // 2 == row // 2 and c // 3 == column // 3)):
                return False
        return True

    def count(start: int) -> int:
        for cell in range(start, 36):
            if not cells[cell]:
                total = 0
                for digit in range(1, 7):
                    if fits(cell, digit):
                        cells[cell] = digit
                        total += count(cell + 1)
                        cells[cell] = 0
                return total
        return 1

    return count(0)


def relabelled_to_first_row(grids: np.ndarray) -> set[bytes]:
    """Names 6x6 grids up to relabelling: the digits renamed so that the first row is 1 to 6."""
    rename = np.argsort(grids[:, :6].astype(np.int64), axis=1) + 1
    named = np.take_along_axis(rename, grids.astype(np.int64) - 1, axis=1)
    return {row.astype(np.uint8).tobytes() for row in named}


# --- solver ---


def test_solves_hard_puzzles() -> None:
    assert solve(HARD) == [HARD_SOLUTION]
    (grid,) = solve(SEVENTEEN_CLUES)
    assert is_solution(SEVENTEEN_CLUES, grid)


def test_solves_an_open_puzzle_without_a_long_search() -> None:
    """Naked and hidden singles alone, with branching on cells only, take a long time over this one."""
    puzzle = ".....6....59.....82....8....45........3........6..3.54...325..6.................."
    assert len(solve(puzzle)) == 2


def test_reads_zero_and_underscore_as_blank() -> None:
    assert solve(HARD.replace(".", "0")) == solve(HARD.replace(".", "_")) == [HARD_SOLUTION]


def test_ambiguous_puzzle_has_several_solutions() -> None:
    # 1 and 2 can be exchanged in the first and last two rows: no clue holds them.
    grid = str(solutions(9, "train", 1).tobytes().translate(bytes([0, *b"123456789", *range(10, 256)])), "ascii")
    puzzle = grid.replace("1", ".").replace("2", ".")
    found = solve(puzzle)
    assert len(found) == 2
    assert all(is_solution(puzzle, g) for g in found)
    assert len(solve(puzzle, limit=1)) == 1
    assert len(solve("." * 36, limit=50)) == len(set(solve("." * 36, limit=50))) == 50


def test_unsolvable_puzzle_has_no_solution() -> None:
    # The last cell of the first row can only be 9, and 9 stands below it.
    assert solve("12345678." + "........9" + "." * 63) == []
    assert solve("12345." + ".....6" + "." * 24) == []


def test_finds_all_6x6_grids_with_a_given_row_and_box() -> None:
    puzzle = "123456" + "456123" + "." * 24
    assert len(solve(puzzle, limit=10_000)) == count_by_brute_force(puzzle)


@pytest.mark.parametrize(
    ("puzzle", "message"),
    [
        ("1234", "a sudoku has 36 or 81 characters, and this has 4"),
        ("." * 10 + "7" + "." * 25, "'7' at row 2, column 5 is neither a digit from 1 to 6 nor a blank"),
        ("." * 80 + "x", "'x' at row 9, column 9 is neither a digit from 1 to 9"),
        ("5" + "." * 7 + "5" + "." * 72, "row 1, column 1 and row 1, column 9 both hold 5"),
        ("." * 7 + "3" + "." * 27 + ".", None),
        ("3" + "." * 6 + "." + "3" + "." * 27, "row 1, column 1 and row 2, column 3 both hold 3"),
        ("." * 5 + "2" + "." * 29 + "2", "row 1, column 6 and row 6, column 6 both hold 2"),
    ],
)
def test_says_what_is_wrong_and_where(puzzle: str, message: str | None) -> None:
    if message is None:
        assert solve(puzzle, limit=1)
        return
    with pytest.raises(DataError, match=re.escape(message)):
        solve(puzzle)


def test_is_solution_rejects_everything_else() -> None:
    assert is_solution(HARD, HARD_SOLUTION)
    other = "".join(str(10 - int(c)) for c in HARD_SOLUTION)
    assert not is_solution(HARD, other)  # a valid grid with other clues
    assert not is_solution("." * 36, HARD_SOLUTION)
    assert not is_solution(HARD, HARD_SOLUTION[:-1] + ".")
    assert not is_solution(HARD, HARD_SOLUTION[:-1] + "1")
    assert not is_solution(HARD, "no answer")
    assert not is_solution(HARD, "")


@pytest.mark.parametrize("size", [6, 9])
def test_board_has_the_right_units(size: int) -> None:
    rules = board(size)
    assert len(rules.units) == 3 * size
    assert all(len(set(unit)) == size for unit in rules.units)
    assert {len(p) for p in rules.peers} == {20 if size == 9 else 12}


# --- base grids and the split ---


def symmetry(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a random 9x9 symmetry: where each cell comes from, and the new digits."""
    rng = np.random.default_rng(seed)

    def lines() -> list[int]:
        return [3 * int(band) + int(i) for band in rng.permutation(3) for i in rng.permutation(3)]

    rows, columns = lines(), lines()
    cells = np.array([[9 * r + c for c in columns] for r in rows])
    if rng.integers(2):
        cells = cells.T
    return cells.ravel(), np.concatenate([[0], rng.permutation(9) + 1]).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 1999), seed=st.integers(0, 2**32 - 1))
def test_fingerprint_survives_every_symmetry(index: int, seed: int) -> None:
    grid = sudoku_bases.base_grids(9, "train")[index : index + 1]
    cells, digits = symmetry(seed)
    moved = digits[grid[:, cells]]
    assert all_valid(moved)
    assert sudoku_bases.fingerprint(moved) == sudoku_bases.fingerprint(grid)


def test_fingerprint_tells_grids_apart() -> None:
    grids = np.concatenate([sudoku_bases.base_grids(9, split) for split in ("train", "test")])
    assert all_valid(grids)
    prints = sudoku_bases.fingerprint(grids)
    assert len(set(prints)) == len(prints)
    assert len(grids) > 10_000


def test_cycle_types_have_different_codes() -> None:
    codes = set()
    for lengths in [(9,), (7, 2), (6, 3), (5, 4), (5, 2, 2), (4, 3, 2), (3, 3, 3), (3, 2, 2, 2)]:
        step, start = np.zeros(9, dtype=np.int64), 0
        for length in lengths:
            step[start : start + length] = start + (np.arange(length) + 1) % length
            start += length
        codes.add(int(sudoku_bases._cycle_type(step)))
    assert len(codes) == 8


def test_9x9_train_and_test_share_no_class() -> None:
    train = set(sudoku_bases.fingerprint(solutions(9, "train", 13_000, seed=3)))
    test = set(sudoku_bases.fingerprint(solutions(9, "test", 3_000, seed=4)))
    assert not train & test
    assert len(train) == len(sudoku_bases.base_grids(9, "train"))
    assert all(map(sudoku_bases.is_test_fingerprint, test))
    assert not any(map(sudoku_bases.is_test_fingerprint, train))


def test_6x6_base_grids_are_all_grids_up_to_relabelling() -> None:
    train, test = (sudoku_bases.base_grids(6, split) for split in ("train", "test"))
    assert all_valid(train)
    assert all_valid(test)
    assert len({g.tobytes() for g in np.concatenate([train, test])}) == len(train) + len(test) == 39_168
    assert len(test) == 3_916


def test_6x6_train_and_test_share_no_base_grid() -> None:
    train = relabelled_to_first_row(solutions(6, "train", 40_000))
    test = relabelled_to_first_row(solutions(6, "test", 8_000))
    assert len(train) == 35_252
    assert len(test) == 3_916
    assert not train & test


# --- solved grids ---


@pytest.mark.parametrize(("size", "split"), list(itertools.product([6, 9], ["train", "test"])))
def test_solutions_are_valid_and_prefix_stable(size: int, split: str) -> None:
    grids = solutions(size, split, 5_000, seed=1)
    assert grids.shape == (5_000, size * size)
    assert grids.dtype == np.uint8
    assert all_valid(grids)
    for n in (0, 1, 100, 4_096, 4_097):
        np.testing.assert_array_equal(solutions(size, split, n, seed=1), grids[:n])
    assert (solutions(size, split, 100, seed=2) != grids[:100]).any()


def test_a_test_set_within_the_pool_repeats_no_base_grid() -> None:
    assert len(set(sudoku_bases.fingerprint(solutions(9, "test", 1_000)))) == 1_000
    assert len(relabelled_to_first_row(solutions(6, "test", 3_916))) == 3_916


def test_symmetries_move_digits_and_cells_evenly() -> None:
    grids = solutions(9, "train", 9_000)
    for cell in (0, 40, 80):
        counts = np.bincount(grids[:, cell], minlength=10)[1:]
        assert counts.min() > 850
        assert counts.max() < 1_150


PINNED = {
    (6, "train"): ("444612b234c22599", "b8e75d4580036d78"),
    (6, "test"): ("185bbb1143e17ced", "28eb8a995a61cce0"),
    (9, "train"): ("c899c026d6a5f022", "8a0a3a622c15dcbb"),
    (9, "test"): ("51fba9ec27ee9fb8", "a5a78da30edbc477"),
}


@pytest.mark.parametrize(("size", "split"), PINNED)
def test_rows_never_change(size: int, split: str) -> None:
    """Published results name these rows: a change here is a change of the data set."""
    grids = hashlib.sha256(solutions(size, split, 64).tobytes()).hexdigest()
    dug = hashlib.sha256(repr(puzzles(size, split, 8, clues=DEFAULT_CLUES[size])).encode()).hexdigest()
    assert (grids[:16], dug[:16]) == PINNED[size, split]


# --- puzzles ---


@pytest.mark.parametrize(
    ("size", "clues", "n"), [(6, (12, 18), 60), (6, (9, 9), 10), (9, (30, 50), 60), (9, (25, 26), 8)]
)
def test_puzzles_have_one_solution_and_the_right_clues(size: int, clues: tuple[int, int], n: int) -> None:
    rows = puzzles(size, "train", n, clues=clues)
    for puzzle, solution in rows:
        assert clues[0] <= len(puzzle) - puzzle.count(".") <= clues[1]
        assert is_solution(puzzle, solution)
        assert solve(puzzle) == [solution]
    assert rows[: n // 2] == puzzles(size, "train", n // 2, clues=clues)
    assert len(set(rows)) == n


def test_6x6_puzzles_are_unique_by_brute_force() -> None:
    assert [count_by_brute_force(p) for p, _ in puzzles(6, "test", 25, clues=(10, 18))] == [1] * 25


def test_every_clue_count_of_the_range_occurs() -> None:
    counts = [36 - p.count(".") for p, _ in puzzles(6, "train", 200, clues=(12, 18))]
    assert set(counts) == set(range(12, 19))


def test_puzzles_blank_the_solved_grids() -> None:
    """With clues to spare no grid refuses, so puzzle i belongs to solved grid i."""
    grids = solutions(9, "test", 30)
    same = [s == "".join(map(str, g)) for (_, s), g in zip(puzzles(9, "test", 30, clues=(30, 50)), grids, strict=True)]
    assert all(same)


def test_blanking_together_equals_blanking_one_by_one() -> None:
    from dllm.data.sudoku import _blank, _is_unique

    rules = board(6)
    for seed, grid in enumerate(solutions(6, "train", 20).tolist()):
        order = np.random.default_rng(seed).permutation(36).tolist()
        values, wanted = list(grid), 11
        for cell in order:
            if sum(map(bool, values)) == wanted:
                break
            values[cell] = 0
            if not _is_unique(rules, values):
                values[cell] = grid[cell]
        expected = values if sum(map(bool, values)) == wanted else None
        assert _blank(rules, list(grid), order, wanted) == expected


def test_a_grid_that_refuses_is_replaced_inside_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm.data.sudoku._ORDERS", 1)  # nine clues are rare, so one order often ends too early
    rows = puzzles(6, "test", 12, clues=(9, 9))
    grids = np.array([[int(c) for c in s] for _, s in rows], dtype=np.uint8)
    assert (grids != solutions(6, "test", 12)).any()
    assert relabelled_to_first_row(grids) <= relabelled_to_first_row(sudoku_bases.base_grids(6, "test"))
    assert all(p.count(".") == 27 and solve(p) == [s] for p, s in rows)


# --- refusals ---


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(DataError, match=r"sudoku has no split 'tset'. Did you mean 'test'"):
        solutions(9, "tset", 1)
    with pytest.raises(OptionError, match="size is 4: sudoku comes in the sizes 6 and 9"):
        solutions(4, "train", 1)
    with pytest.raises(OptionError, match="n is -1"):
        solutions(6, "train", -1)
    with pytest.raises(OptionError, match="limit is 0"):
        solve(HARD, limit=0)
    for clues in ((16, 30), (40, 30), (30, 82)):
        with pytest.raises(OptionError, match="give the fewest and the most, from 17 to 81 for 9x9"):
            puzzles(9, "train", 1, clues=clues)


def test_too_few_clues_are_given_up_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm.data.sudoku._GRIDS", 1)
    monkeypatch.setattr("dllm.data.sudoku._ORDERS", 2)
    with pytest.raises(
        DataError, match="no 9x9 puzzle with 17 clues and one solution after 2 tries: ask for more clues"
    ):
        puzzles(9, "train", 1, clues=(17, 17))
