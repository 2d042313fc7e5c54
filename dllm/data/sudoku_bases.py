"""The sudoku grids that all others are drawn from, and which of them are test grids.

- 9x9: a base grid is a class under the whole symmetry group (relabelling, permuting bands, stacks, the rows and columns
  inside them, transposing). `fingerprint` is the same for all grids of a class, and it alone says train or test.
- 6x6: a base grid is a grid up to relabelling; there are 39,168, all enumerated, and one in ten is a test grid.
"""

from __future__ import annotations

import functools
import hashlib
import itertools

import numpy as np
import numpy.typing as npt

from dllm.data.sudoku_solver import board, search
from dllm.errors import DataError, did_you_mean

TEST_ONE_IN = 10
"""One base grid in this many, on average, is a test grid."""

_POOL = 12_288  # base grids of 9x9, train and test together
_POOL_SEEDS = 256  # of them, made by search; the others are walked to from these
_POOL_STEPS = 40

Grids = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


def raw_words(count: int, *key: object) -> npt.NDArray[np.uint64]:
    """Returns uint64 [count] random words for a key: raw ones, which numpy keeps the same in all its versions."""
    digest = hashlib.blake2b("|".join(map(str, ("sudoku", *key))).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(count)


def random_orders(raw: npt.NDArray[np.uint64]) -> Indices:
    """Returns a random order along the last axis."""
    return np.argsort(raw, axis=-1, kind="stable")


def fingerprint(grids: Grids) -> list[bytes]:
    """Names the symmetry class of 9x9 grids: equal for equivalent grids, and seldom equal for others.

    Two rows define a permutation of the digits, upper onto lower; its cycle type survives relabelling and any order of
    the columns. The cycle types of all pairs of rows, sorted inside each band and each pair of bands, and these sorted
    too, do not depend on the order of rows and bands. The same for columns, and the two descriptions sorted, takes care
    of transposing.

    Args:
        grids: uint8 [n, 81], digits 1 to 9.

    Returns:
        n digests of 8 bytes.
    """
    square = grids.reshape(-1, 9, 9).astype(np.int64) - 1
    sides = [_line_types(lines) for lines in (square, square.transpose(0, 2, 1))]
    digests = []
    for pair in zip(*(side.tolist() for side in sides), strict=True):
        low, high = sorted(pair)
        digests.append(hashlib.blake2b(bytes(low + high), digest_size=8).digest())
    return digests


def _line_types(lines: Indices) -> npt.NDArray[np.uint8]:
    """Returns uint8 [n, 72]: the cycle types of all pairs of rows of int64 [n, 9, 9], sorted as `fingerprint` says."""
    groups = []
    where = np.argsort(lines, axis=-1)  # [n, row, digit]: the column that holds the digit
    for first, second in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
        pairs = [(3 * first + i, 3 * second + j) for i in range(3) for j in range(3) if first < second or i < j]
        upper, lower = [p[0] for p in pairs], [p[1] for p in pairs]
        step = np.take_along_axis(lines[:, lower], where[:, upper], axis=-1)
        groups.append(np.sort(_cycle_type(step), axis=-1))
    ordered = []
    for part in (groups[:3], groups[3:]):
        # Words of 3 or 9 bytes, sorted as strings: a void view would not sort.
        words = np.stack(part, axis=1)
        keys = np.lexsort(np.moveaxis(words[:, :, ::-1], -1, 0), axis=-1)
        ordered.append(np.take_along_axis(words, keys[:, :, None], axis=1).reshape(len(lines), -1))
    return np.concatenate(ordered, axis=1)


def _cycle_type(step: Indices) -> npt.NDArray[np.uint8]:
    """Returns a code [...] for the cycle type of permutations int64 [..., 9] without fixed points.

    How many digits return after 2, 3 and 5 steps tells the eight types apart: 9, 7+2, 6+3, 5+4, 5+2+2, 4+3+2, 3+3+3,
    3+2+2+2.
    """
    home = np.arange(9)
    twice = np.take_along_axis(step, step, axis=-1)
    thrice = np.take_along_axis(step, twice, axis=-1)
    five = np.take_along_axis(twice, thrice, axis=-1)
    returned = [(power == home).sum(axis=-1) for power in (twice, thrice, five)]
    code = returned[0] + 8 * returned[1] + 80 * (returned[2] > 0)
    return np.asarray(code, dtype=np.uint8)


@functools.cache
def base_grids(size: int, split: str) -> Grids:
    """Returns all base grids of one split, uint8 [bases, size * size]; the same for every seed."""
    board(size)
    if split not in ("train", "test"):
        raise DataError(f"sudoku has no split {split!r}.{did_you_mean(split, ('train', 'test'))}")
    if size == 6:
        grids = _enumerate_6x6()
        order = random_orders(raw_words(len(grids), "split", 6))
        tests = len(grids) // TEST_ONE_IN
        return grids[order[:tests] if split == "test" else order[tests:]]
    grids = _pool_9x9()
    first: dict[bytes, int] = {}
    for index, digest in enumerate(fingerprint(grids)):
        first.setdefault(digest, index)
    keep = [i for digest, i in first.items() if is_test_fingerprint(digest) == (split == "test")]
    return grids[keep]


def is_test_fingerprint(digest: bytes) -> bool:
    """Tells whether the 9x9 grids with this fingerprint are test grids."""
    return int.from_bytes(digest, "big") % TEST_ONE_IN == 0


def _enumerate_6x6() -> Grids:
    """Returns all 6x6 grids whose first row is 1 to 6, uint8 [39168, 36], in lexicographic order.

    A row is one word: six bits for each of its columns, and six for the digits in its left and in its right box. A row
    may follow where its word shares no bit with what is used; the box bits are cleared when a new band begins.
    """
    rows = np.array(list(itertools.permutations(range(6))), dtype=np.uint64)
    bits = np.uint64(1) << rows
    shifts = np.arange(6, dtype=np.uint64) * np.uint64(6)
    words = (
        (bits << shifts).sum(axis=1)
        | bits[:, :3].sum(axis=1) << np.uint64(36)
        | bits[:, 3:].sum(axis=1) << np.uint64(42)
    )
    columns_only = np.uint64((1 << 36) - 1)
    chosen, used = np.zeros((1, 1), dtype=np.int64), words[:1]
    for row in range(1, 6):
        if row % 2 == 0:
            used = used & columns_only
        parts = [np.nonzero(used[i : i + 2048, None] & words == 0) for i in range(0, len(used), 2048)]
        parents = np.concatenate([p[0] + 2048 * i for i, p in enumerate(parts)])
        picks = np.concatenate([p[1] for p in parts])
        chosen = np.concatenate([chosen[parents], picks[:, None]], axis=1)
        used = used[parents] | words[picks]
    return (rows[chosen].reshape(-1, 36) + np.uint64(1)).astype(np.uint8)


@functools.cache
def _pool_9x9() -> Grids:
    """Returns uint8 [_POOL, 81] varied grids: some found by search, the others reached from them by many random trades.

    A trade takes two digits and swaps them in a smallest set of rows where columns and boxes allow it. It is no
    symmetry unless the set is all rows, so a walk of trades wanders through the classes; all walks advance together.
    """
    seeds = np.array([_random_9x9(i) for i in range(_POOL_SEEDS)], dtype=np.uint8)
    grids = np.tile(seeds, (_POOL // _POOL_SEEDS, 1)).reshape(_POOL, 9, 9)
    row = np.arange(9)
    for step in range(_POOL_STEPS):
        raw = raw_words(3 * _POOL, "trade", step).reshape(3, _POOL)
        one = (raw[0] % np.uint64(9)).astype(np.uint8) + 1
        other = (one + (raw[1] % np.uint64(8)).astype(np.uint8)) % 9 + 1
        at_one = (grids == one[:, None, None]).argmax(axis=2)
        at_other = (grids == other[:, None, None]).argmax(axis=2)
        box_one, box_other = row // 3 * 3 + at_one // 3, row // 3 * 3 + at_other // 3
        linked = (at_one[:, :, None] == at_other[:, None, :]) | (box_one[:, :, None] == box_other[:, None, :])
        linked |= linked.transpose(0, 2, 1) | np.eye(9, dtype=bool)
        reach = linked.astype(np.float32)
        for _ in range(3):  # paths of up to 8 links
            reach = np.minimum(reach @ reach, 1)
        start = (raw[2] % np.uint64(9)).astype(np.int64)
        swap_row = reach[np.arange(_POOL), start] > 0
        total = (one + other)[:, None, None]
        involved = ((grids == one[:, None, None]) | (grids == other[:, None, None])) & swap_row[:, :, None]
        grids = np.where(involved, total - grids, grids)
    return grids.reshape(_POOL, 81)


def _random_9x9(index: int) -> list[int]:
    """Returns a solved grid: the three boxes on the diagonal filled at random, the rest by search."""
    rules = board(9)
    candidates = [rules.full] * 81
    boxes = [rules.units[18 + box] for box in (0, 4, 8)]
    digits = random_orders(raw_words(27, "diagonal", index).reshape(3, 9)).tolist()
    for box, order in zip(boxes, digits, strict=True):
        for cell, digit in zip(box, order, strict=True):
            candidates[cell] = 1 << digit
    found: list[list[int]] = []
    search(rules, candidates, [cell for box in boxes for cell in box], 1, found)
    return [mask.bit_length() for mask in found[0]]
