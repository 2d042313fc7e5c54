"""LLaDA's sampler, line by line: one row, one step, one position, one token at a time.

Source: LLaDA, arXiv:2502.09992, Algorithms 4 and 5, and the published generate.py, with masks wherever they stand in place
of a tail and noise that is keyed in place of torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from reference import noise

from dllm.sampling.config import SamplingConfig

TOKEN, RANK = 4, 5
Logits = Callable[[list[int]], list[list[float]]]
"""From one row, without padding, to the logits of every position; each number one that fp32 holds."""


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
    return [x / sum(powers) for x in powers]


def guided(conditional: float, unconditional: float, scale: float) -> float:
    """In fp32, as the published sampler computes it: two ways of rounding may choose two tokens."""
    un, cond = np.float32(unconditional), np.float32(conditional)
    return float(un + np.float32(scale + 1) * (cond - un))


def sample_row(
    logits_of: Logits,
    canvas: Sequence[int],
    config: SamplingConfig,
    *,
    mask_token_id: int,
    eos_token_ids: Sequence[int] = (),
    end_token_ids: Sequence[int] = (),
    masked: Sequence[bool] | None = None,
    request: int = 0,
) -> Written:
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

    open_places = set(masks)
    forwards = step = 0
    commits: list[list[tuple[int, int, float]]] = []
    for block, steps in zip(blocks, block_steps, strict=True):
        for count in shares(len(block), steps):
            if count == 0:
                continue
            logits = logits_of(x)
            forwards += 1
            if config.cfg_scale > 0:
                un_x = list(x)
                for place in forgettable:
                    un_x[place] = mask_token_id
                unconditional = logits_of(un_x)
                forwards += 1
                logits = [
                    [guided(c, u, config.cfg_scale) for c, u in zip(*rows, strict=True)]
                    for rows in zip(logits, unconditional, strict=True)
                ]

            candidates = []
            for place in block:
                if place not in open_places:
                    continue
                row = list(logits[place])
                if config.suppress_eos:
                    for token in eos_token_ids:
                        row[token] = -math.inf
                noised = row
                if config.temperature > 0:
                    noised = [
                        value / config.temperature + noise.gumbel(config.seed, TOKEN, request, place, step, token)
                        for token, value in enumerate(row)
                    ]
                token = noised.index(max(noised))
                probability = softmax(row)[token]
                confidence = probability
                if config.remasking == "random":
                    confidence = noise.uniform(config.seed, RANK, request, place, step)
                last = config.eos_last and token in end_token_ids
                candidates.append((last, -confidence, place, token, probability))

            written = []
            for _, _, place, token, probability in sorted(candidates)[:count]:
                x[place] = token
                if token != mask_token_id:
                    open_places.remove(place)
                    written.append((place, token, probability))
            commits.append(sorted(written))
            step += 1
    return Written(x, forwards, step, commits)
