"""Addition problems: `123+456=` and `579`, any number of them, train and test apart.

The two orders of one sum, a+b and b+a, always lie in the same split, so a test sum was never seen from the other side.
Problems are drawn without replacement: a keyed permutation of all ordered pairs, walked from its start, so the first k
of n problems are the k problems. When all pairs of a split are used up, a new permutation begins.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dllm.errors import DataError, OptionError, did_you_mean

TEST_ONE_IN = 10
"""One unordered pair in this many, on average, is a test pair."""

MAX_DIGITS = 9
"""Longest operands: a pair of them still fits the 64 bits that the permutation works on."""

_ROUNDS = 6
_CHUNK = 1 << 14

_U64 = npt.NDArray[np.uint64]


def problems(split: str, n: int, *, digits: int = 3, seed: int = 0) -> list[tuple[str, str]]:
    """Draws addition problems.

    Args:
        split: `train` or `test`.
        n: how many problems.
        digits: length of both operands, 1 to 9; the first digit is never 0.
        seed: another seed gives another order of the same problems; it moves none between the splits.

    Returns:
        n pairs of a question such as `123+456=` and its answer `579`.

    Raises:
        DataError: the split is unknown.
        OptionError: n is negative, or digits is out of range.
    """
    if split not in ("train", "test"):
        raise DataError(f"addition has no split {split!r}.{did_you_mean(split, ('train', 'test'))}")
    if n < 0:
        raise OptionError(f"n is {n}: the number of problems has to be 0 or more")
    if not 1 <= digits <= MAX_DIGITS:
        raise OptionError(f"digits is {digits}: operands can have 1 to {MAX_DIGITS} digits")
    rows: list[tuple[str, str]] = []
    for a, b in _pairs(digits, seed):
        keep = is_test_pair(a, b) == (split == "test")
        a_list, b_list = a[keep].tolist(), b[keep].tolist()
        rows.extend((f"{x}+{y}=", str(x + y)) for x, y in zip(a_list, b_list, strict=True))
        if len(rows) >= n:
            break
    return rows[:n]


def is_test_pair(a: _U64, b: _U64) -> npt.NDArray[np.bool_]:
    """Tells which sums belong to the test split; the order of the operands makes no difference.

    Args:
        a: uint64 [n], left operands.
        b: uint64 [n], right operands.

    Returns:
        bool [n].
    """
    low, high = np.minimum(a, b), np.maximum(a, b)
    is_test: npt.NDArray[np.bool_] = _mix(_mix(low) ^ high) % np.uint64(TEST_ONE_IN) == 0
    return is_test


def _pairs(digits: int, seed: int) -> Iterator[tuple[_U64, _U64]]:
    """Yields chunks of all ordered pairs of operands, shuffled; again and again, in another order each time."""
    low = 10 ** (digits - 1)
    count = 10**digits - low
    half_bits = ((count * count - 1).bit_length() + 1) // 2
    size = 1 << (2 * half_bits)
    sweep = 0
    while True:
        keys = _round_keys(digits, seed, sweep)
        for start in range(0, size, _CHUNK):
            index = _permute(np.arange(start, min(start + _CHUNK, size), dtype=np.uint64), half_bits, keys)
            index = index[index < count * count]
            yield index // np.uint64(count) + np.uint64(low), index % np.uint64(count) + np.uint64(low)
        sweep += 1


def _round_keys(digits: int, seed: int, sweep: int) -> _U64:
    """Returns uint64 [rounds] keys that differ for every (digits, seed, sweep)."""
    key = np.array([digits], dtype=np.uint64)
    for part in (seed, sweep):
        key = _mix(key ^ np.uint64(part % (1 << 64)))
    rounds: _U64 = np.arange(_ROUNDS, dtype=np.uint64)
    return _mix(key + rounds)


def _permute(index: _U64, half_bits: int, keys: _U64) -> _U64:
    """Maps 0 to 4**half_bits - 1 onto itself, one to one, by a balanced Feistel network."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = index >> shift, index & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: _U64) -> _U64:
    """Scrambles 64-bit words, one to one: add, then shift-xor and multiply by odd constants, as in SplitMix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
