"""The rules of lengths as their papers put them: one row, Python numbers that fp32 holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reference.policies import single


def block_length(
    tokens: Sequence[int],
    confidence: Sequence[float],
    window: int,
    delimiters: Sequence[int],
    *,
    delimiter_threshold: float,
    block_length: int,
) -> int:
    """AdaBlock: tokens and confidences of all places from the block's start to the end of the answer."""
    best: int | None = None
    for place in range(min(window, len(tokens))):
        if tokens[place] in delimiters and (best is None or confidence[place] > confidence[best]):
            best = place
    if best is not None and confidence[best] >= single(delimiter_threshold):
        return best + 1
    return min(block_length, len(tokens))


def mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def growth(tail_eos: Sequence[float], room: int, *, eos_threshold: float, expansion_factor: int) -> int:
    """DAEDAL, stage 1: masks to add at the end."""
    if mean(tail_eos) >= eos_threshold:
        return 0
    return max(0, min(room, expansion_factor))


def expansion(
    confidence: dict[int, float],
    tail_eos: Sequence[float],
    room: int,
    *,
    expand_threshold: float,
    expand_eos_threshold: float,
    expansion_factor: int,
) -> tuple[int | None, int]:
    """DAEDAL, stage 2: from {open place: confidence} to (the place that is expanded, masks added beside it)."""
    added = min(room, expansion_factor - 1)
    if not confidence or added < 1 or mean(tail_eos) >= expand_eos_threshold:
        return None, 0
    least = min(confidence, key=lambda place: (confidence[place], place))
    if confidence[least] >= single(expand_threshold):
        return None, 0
    return least, added


def answer_known(
    gaps: Sequence[float], progress: float, *, early_gap: float, middle_gap: float, late_gap: float
) -> bool:
    """Prophet: whether all may be committed, from the gaps of the answer's logits."""
    if not gaps:
        return False
    least = late_gap
    if progress < single(2 / 3):
        least = middle_gap
    if progress < single(1 / 3):
        least = early_gap
    return mean(gaps) >= single(least)
