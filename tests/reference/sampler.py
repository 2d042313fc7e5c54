"""LLaDA's sampler, line by line: one row, one step, one position, one token at a time.

With other policies than the published one, whose rules are in `reference.policies`, and with the caches of `reference.caches`.

Source: LLaDA, arXiv:2502.09992, Algorithms 4 and 5, and the published generate.py, with masks wherever they stand in place
of a tail and noise that is keyed in place of torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from reference import noise, policies
from reference.caches import Kept, LogitsAt, positions

from dllm.sampling.config import SamplingConfig

TOKEN, RANK = 4, 5
Logits = Callable[[list[int]], list[list[float]]]
"""From one row, without padding, to the logits of every position; each number one that fp32 holds."""


CachedLogits = Callable[[list[int], list[int], Kept, list[int]], tuple[LogitsAt, LogitsAt]]
"""See `reference.caches.CachedModel`."""


class Candidate(NamedTuple):
    """In the order in which they are committed: end tokens last, the surest first, of equal ones the leftmost."""

    last: bool
    doubt: float
    place: int
    token: int
    probability: float
    chances: list[float]

    @property
    def sureness(self) -> float:
        return policies.single(-self.doubt - 2 * self.last)


class Written(NamedTuple):
    ids: list[int]
    forwards: int
    steps: int
    commits: list[list[tuple[int, int, float]]]
    """(position, token, probability) of what each step wrote, from left to right."""


def shares(total: int, parts: int) -> list[int]:
    """10 in 4 parts: 3, 3, 2, 2."""
    counts = [0] * parts
    for i in range(total):
        counts[i % parts] += 1
    return counts


def softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    powers = [math.exp(x - largest) for x in logits]
    total = sum(powers)
    return [x / total for x in powers]


def guided(conditional: float, unconditional: float, scale: float) -> float:
    """In fp32, as the published sampler computes it: two ways of rounding may choose two tokens."""
    un, cond = np.float32(unconditional), np.float32(conditional)
    return float(un + np.float32(scale + 1) * (cond - un))


def entropy(chances: list[float]) -> float:
    return -sum(p * math.log(p) for p in chances if p > 0)


def divergence(now: list[float], before: list[float] | None) -> float:
    """KL(now || before)."""
    if before is None:
        return math.inf
    return sum(p * math.log(p / q) for p, q in zip(now, before, strict=True) if p > 0)


def ended(x: Sequence[int], masks: list[int], final: set[int], end_token_ids: Sequence[int]) -> bool:
    """Whether an end token was written and all that stands before it will stay."""
    for place in masks:
        if place not in final:
            return False
        if x[place] in end_token_ids:
            return True
    return False


def sample_row(
    logits_of: Logits | None,
    canvas: Sequence[int],
    config: SamplingConfig,
    *,
    mask_token_id: int,
    eos_token_ids: Sequence[int] = (),
    end_token_ids: Sequence[int] = (),
    masked: Sequence[bool] | None = None,
    request: int = 0,
    cached: CachedLogits | None = None,
) -> Written:
    """`cached` in place of `logits_of` is a network that is told what to compute and what is kept."""
    write_here = [token == mask_token_id for token in canvas] if masked is None else list(masked)
    x = [mask_token_id if write else token for token, write in zip(canvas, write_here, strict=True)]
    prompt = [place for place, write in enumerate(write_here) if not write]
    forgettable = [place for place in prompt if x[place] not in config.cfg_keep_tokens]
    masks = [place for place, write in enumerate(write_here) if write]

    width = config.block_length or max(1, len(masks))
    blocks = [masks[start : start + width] for start in range(0, len(masks), width)]
    if config.steps is None:
        block_steps = [len(block) for block in blocks]
    else:
        block_steps = shares(config.steps, len(blocks)) if blocks else []
    never = list(eos_token_ids) if config.suppress_eos else []
    if config.policy != "fixed":
        never.append(mask_token_id)

    open_places = set(masks)
    forwards = step = 0
    commits: list[list[tuple[int, int, float]]] = []
    just_changed: set[int] = set()
    kept: tuple[Kept, Kept] = ({}, {})

    def logits_and_shadows(block: list[int], block_step: int) -> tuple[LogitsAt, LogitsAt]:
        nonlocal forwards
        branches = [list(x)]
        if config.cfg_scale > 0:
            branches.append([mask_token_id if place in forgettable else token for place, token in enumerate(x)])
        looks = []
        for ids, keys_and_values in zip(branches, kept, strict=False):
            forwards += 1
            if cached is None:
                assert logits_of is not None
                looks.append((dict(enumerate(logits_of(ids))), {}))
                continue
            computed = positions(
                config.cache,
                length=len(x),
                block=block,
                open_places=open_places,
                just_committed=just_changed,
                block_step=block_step,
                **{name: value for name, value in config.cache_options.items() if value is not None},
            )
            shadows = [place for place in block if place not in open_places] if config.policy == "wino" else []
            looks.append(cached(ids, computed, keys_and_values, shadows))
        if len(looks) == 1:
            return looks[0]
        both = []
        for conditional, unconditional in zip(*looks, strict=True):
            places = [place for place in conditional if place in block]
            pairs = {place: zip(conditional[place], unconditional[place], strict=True) for place in places}
            both.append({place: [guided(c, u, config.cfg_scale) for c, u in pairs[place]] for place in places})
        return both[0], both[1]

    def without(row: Sequence[float]) -> list[float]:
        return [-math.inf if token in never else value for token, value in enumerate(row)]

    for block, steps in zip(blocks, block_steps, strict=True):
        counts = [count for count in shares(len(block), steps) if count]
        memory = [0.0] * len(block)
        before: dict[int, list[float]] = {}
        block_step = 0
        while block_step < len(counts) if config.policy == "fixed" else open_places & set(block):
            logits, shadow_logits = logits_and_shadows(block, block_step)
            candidates = {}
            for place in block:
                if place not in open_places:
                    continue
                row = without(logits[place])
                noised = row
                if config.temperature > 0:
                    noised = [
                        value / config.temperature + noise.gumbel(config.seed, TOKEN, request, place, step, token)
                        for token, value in enumerate(row)
                    ]
                token = noised.index(max(noised))
                chances = softmax(row)
                probability = chances[token]
                confidence = probability
                if config.remasking == "random":
                    confidence = noise.uniform(config.seed, RANK, request, place, step)
                elif config.remasking == "margin":
                    second, best = sorted(chances)[-2:]
                    confidence = best - second
                elif config.remasking == "entropy":
                    confidence = -entropy(chances)
                last = config.eos_last and token in end_token_ids
                candidates[place] = Candidate(last, -confidence, place, token, probability, chances)

            remask: list[int] = []
            if config.policy == "fixed":
                chosen = [candidate.place for candidate in sorted(candidates.values())[: counts[block_step]]]
            else:
                facts = policies.Row(
                    open=[place in candidates for place in block],
                    confidence=[candidates[p].sureness if p in candidates else -math.inf for p in block],
                    entropy=[entropy(candidates[p].chances) if p in candidates else 0.0 for p in block],
                    change=[
                        divergence(candidates[p].chances, before.get(p)) if p in candidates else 0.0 for p in block
                    ],
                    verified=[softmax(without(shadow_logits[p]))[x[p]] if p in shadow_logits else 0.0 for p in block],
                    committed=[place not in candidates for place in block],
                    position=block,
                    memory=memory,
                    count=counts[block_step] if block_step < len(counts) else len(block) // len(counts),
                )
                outcome = policies.RULES[config.policy](facts, **config.policy_options)
                chosen, memory = [block[i] for i in outcome.commit], outcome.memory
                remask = [block[i] for i in outcome.remask]
            before |= {place: candidate.chances for place, candidate in candidates.items()}

            written = []
            just_changed = set(remask)
            for place in chosen:
                token = x[place] = candidates[place].token
                if token != mask_token_id:
                    open_places.remove(place)
                    just_changed.add(place)
                    written.append((place, token, candidates[place].probability))
            for place in remask:
                x[place] = mask_token_id
                open_places.add(place)
            commits.append(sorted(written))
            step += 1
            block_step += 1
            finished = (
                masks[: masks.index(block[0])] if open_places & set(block) else masks[: masks.index(block[-1]) + 1]
            )
            certain = set(finished) if config.policy in ("wino", "remdm") else set(masks)
            if config.early_stop and ended(x, masks, certain - open_places, end_token_ids):
                for place in open_places:
                    x[place] = [*eos_token_ids, *end_token_ids][0]
                return Written(x, forwards, step, commits)
    return Written(x, forwards, step, commits)
