"""Each policy's rule as its paper puts it: one row, one place at a time, in Python numbers.

Confidences, probabilities and options are numbers that fp32 holds, as in the fast ones (`single`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """The places of one row's current block, from left to right."""

    open: list[bool]
    confidence: list[float]
    entropy: list[float]
    change: list[float]
    verified: list[float]
    committed: list[bool]
    position: list[int]
    memory: list[float]
    count: int

    def masks(self) -> list[int]:
        return [place for place, is_open in enumerate(self.open) if is_open]

    def written(self) -> list[int]:
        return [place for place, is_committed in enumerate(self.committed) if is_committed]


class Outcome(NamedTuple):
    commit: list[int]
    remask: list[int]
    memory: list[float]


def single(x: float) -> float:
    return float(np.float32(x))


def surest_first(row: Row, places: list[int]) -> list[int]:
    """Python's sort keeps the order of what is equal: the leftmost comes first."""
    return sorted(places, key=lambda place: -row.confidence[place])


def at_least_the_surest(row: Row, accepted: list[int]) -> list[int]:
    return sorted(accepted or surest_first(row, row.masks())[:1])


def without_ends(row: Row) -> list[int]:
    """Candidates that come last were lowered by 2, below 0."""
    return [place for place in row.masks() if row.confidence[place] >= 0] or row.masks()


def fixed(row: Row) -> Outcome:
    return Outcome(sorted(surest_first(row, row.masks())[: max(1, row.count)]), [], row.memory)


def threshold(row: Row, *, threshold: float) -> Outcome:
    accepted = [place for place in row.masks() if row.confidence[place] >= single(threshold)]
    return Outcome(at_least_the_surest(row, accepted), [], row.memory)


def factor(row: Row, *, factor: float) -> Outcome:
    order = surest_first(row, without_ends(row))
    largest = 1
    for n in range(1, len(order) + 1):
        least = np.float32(row.confidence[order[n - 1]])
        if np.float32(n + 1) * (np.float32(1) - least) < np.float32(factor):
            largest = n
    return Outcome(sorted(order[:largest]), [], row.memory)


def entropy_bound(row: Row, *, gamma: float) -> Outcome:
    order = sorted(without_ends(row), key=lambda place: row.entropy[place])
    largest = 1
    for k in range(1, len(order) + 1):
        total = most = 0.0
        for place in order[:k]:
            total += row.entropy[place]
            most = max(most, row.entropy[place])
        if total - most <= gamma:
            largest = k
    return Outcome(sorted(order[:largest]), [], row.memory)


def klass(row: Row, *, threshold: float, kl_threshold: float, kl_steps: int) -> Outcome:
    memory = [0.0] * len(row.open)
    accepted = []
    for place in row.masks():
        if row.change[place] < single(kl_threshold):
            memory[place] = row.memory[place] + 1
        if memory[place] >= kl_steps and row.confidence[place] > single(threshold):
            accepted.append(place)
    return Outcome(at_least_the_surest(row, accepted), [], memory)


def wino(row: Row, *, threshold: float, verify_threshold: float) -> Outcome:
    accepted = [place for place in row.masks() if row.confidence[place] > single(threshold)]
    commit = at_least_the_surest(row, accepted)
    remask: list[int] = []
    for place in sorted(row.written(), key=lambda place: row.verified[place]):
        if row.verified[place] < single(verify_threshold) and len(remask) + 1 < len(commit):
            remask.append(place)
    return Outcome(commit, sorted(remask), row.memory)


def hierarchical(row: Row, *, threshold: float, low_threshold: float) -> Outcome:
    runs: list[list[int]] = []
    for place in row.masks():
        if runs and runs[-1][-1] == place - 1 and row.position[place] == row.position[place - 1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    accepted = set()
    for run in runs:
        accepted |= {place for place in run if row.confidence[place] > single(threshold)}
        surest = surest_first(row, run)[0]
        if row.confidence[surest] > single(low_threshold):
            accepted.add(surest)
    return Outcome(at_least_the_surest(row, list(accepted)), [], row.memory)


def remdm(row: Row, *, eta: float) -> Outcome:
    masks, written = row.masks(), row.written()
    count = max(1, row.count)
    again = max(0, min(math.floor(np.float32(len(written)) * np.float32(eta)), len(masks) - count))
    commit = surest_first(row, masks)[: count + again]
    remask = sorted(written, key=lambda place: row.memory[place])[:again]
    memory = list(row.memory)
    for place in remask:
        memory[place] = 0.0
    for place in commit:
        memory[place] = row.confidence[place]
    return Outcome(sorted(commit), sorted(remask), memory)


RULES: dict[str, Callable[..., Outcome]] = {
    "fixed": fixed,
    "threshold": threshold,
    "factor": factor,
    "entropy_bound": entropy_bound,
    "klass": klass,
    "wino": wino,
    "hierarchical": hierarchical,
    "remdm": remdm,
}
