"""The slow twin of the corruption plan: one sample, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reference import noise

from dllm.diffusion.corruption import CorruptionPlan

TIME, ORDER, MASK = 1, 2, 3


def signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 1 << 63 else bits


def time_of(plan: CorruptionPlan, sample: int) -> float:
    if plan.times == "independent":
        t = noise.uniform(plan.seed, TIME, sample)
    else:
        step, place = divmod(sample, plan.group)
        order = sorted(range(plan.group), key=lambda i: signed(noise.bits(plan.seed, ORDER, step, i)))
        t = (noise.uniform(plan.seed, TIME, step) + order[place] / plan.group) % 1.0
    return plan.min_time + (plan.max_time - plan.min_time) * t


def masks_of(plan: CorruptionPlan, maskable: Sequence[bool], sample: int) -> dict[int, float]:
    """The weight of each place that becomes a mask."""
    t = time_of(plan, sample)
    places = [place for place, can in enumerate(maskable) if can]
    chance = {place: noise.uniform(plan.seed, MASK, sample, place) for place in places}
    if plan.masking == "bernoulli":
        p = (1 - plan.eps) * t + plan.eps
        return {place: 1 / p for place in places if chance[place] < p}
    k = min(len(places), math.floor(t * len(places)) + 1)
    return {place: len(places) / k for place in sorted(places, key=chance.__getitem__)[:k]}
