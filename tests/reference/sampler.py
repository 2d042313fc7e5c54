"""LLaDA's sampler, line by line: one row, one step, one position, one token at a time.

With other policies than the published one, whose rules are in `reference.policies`, with the caches of `reference.caches`,
and with the rules of lengths of `reference.lengths`, which are asked when all that they look at is computed.

Source: LLaDA, arXiv:2502.09992, Algorithms 4 and 5, and the published generate.py, with masks wherever they stand in place
of a tail and noise that is keyed in place of torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from reference import lengths, noise, policies
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
    gap: float

    @property
    def sureness(self) -> float:
        return policies.single(-self.doubt - 2 * self.last)


class Written(NamedTuple):
    ids: list[int]
    forwards: int
    steps: int
    commits: list[list[tuple[int, int, float]]]
    """(position, token, probability) of what each step wrote, from left to right."""
    growth: list[tuple[int, int] | None]
    """(position of a mask, masks put in behind it) after the commits of each step."""
    closest: float = math.inf
    """The least by which the last place that a step of the fixed schedule chose was surer than the next, where they were
    not equal: below what fp32 tells apart, the other choice is as right."""


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
    delimiters: Sequence[int] = (),
) -> Written:
    """`cached` in place of `logits_of` is a network that is told what to compute and what is kept."""
    write_here = [token == mask_token_id for token in canvas] if masked is None else list(masked)
    x = [mask_token_id if write else token for token, write in zip(canvas, write_here, strict=True)]
    prompt = [place for place, write in enumerate(write_here) if not write]
    forgettable = [place for place in prompt if x[place] not in config.cfg_keep_tokens]
    masks = [place for place, write in enumerate(write_here) if write]

    adaptive, growing = config.block_policy == "adablock", config.length_policy == "daedal"
    most = config.gen_length if growing else len(masks)
    width = config.block_length or max(1, most)
    window = math.floor(config.block_options["delimiter_window"] * most) if adaptive else 0
    shares_of_blocks = shares(config.steps, -(-len(masks) // width)) if config.steps is not None and masks else []
    never = list(eos_token_ids) if config.suppress_eos else []
    if config.policy != "fixed":
        never.append(mask_token_id)

    open_places = set(masks)
    forwards = step = 0
    commits: list[list[tuple[int, int, float]]] = []
    just_changed: set[int] = set()
    kept: tuple[Kept, Kept] = ({}, {})
    moved = False
    growth: list[tuple[int, int] | None] = []
    closest = math.inf

    def computed_now(block: list[int], block_step: int) -> list[int]:
        return positions(
            config.cache,
            length=len(x),
            block=block,
            open_places=open_places,
            just_committed=just_changed,
            block_step=0 if moved else block_step,
            **{name: value for name, value in config.cache_options.items() if value is not None},
        )

    def logits_and_shadows(block: list[int], computed: list[int]) -> tuple[LogitsAt, LogitsAt]:
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
            shadows = [place for place in block if place not in open_places] if config.policy == "wino" else []
            looks.append(cached(ids, computed, keys_and_values, shadows))
        if len(looks) == 1:
            return looks[0]
        both = []
        for conditional, unconditional in zip(*looks, strict=True):
            places = list(conditional)
            pairs = {place: zip(conditional[place], unconditional[place], strict=True) for place in places}
            both.append({place: [guided(c, u, config.cfg_scale) for c, u in pairs[place]] for place in places})
        return both[0], both[1]

    def without(row: Sequence[float]) -> list[float]:
        return [-math.inf if token in never else value for token, value in enumerate(row)]

    def candidate_at(place: int, logits: LogitsAt) -> Candidate:
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
        second_logit, best_logit = sorted(row)[-2:]
        return Candidate(last, -confidence, place, token, probability, chances, best_logit - second_logit)

    def lengthen(after: int, count: int) -> None:
        """Puts masks in behind one that is there."""
        nonlocal x, masks, open_places, before, moved

        def new(place: int) -> int:
            return place + count if place > after else place

        x = x[: after + 1] + [mask_token_id] * count + x[after + 1 :]
        added = list(range(after + 1, after + 1 + count))
        masks = sorted([new(place) for place in masks] + added)
        open_places = {new(place) for place in open_places} | set(added)
        before = {new(place): chances for place, chances in before.items()}
        moved = True

    def over(final: int) -> bool:
        """Whether all up to the first end token is final; of a policy that takes back, only the first places are."""
        for number, place in enumerate(masks):
            if place in open_places or (config.policy in ("wino", "remdm") and number >= final):
                return False
            if x[place] in end_token_ids:
                return True
        return False

    start, block_number, answered = 0, 0, False
    while start < len(masks) and not answered:
        end = min(start + width, len(masks))
        memory = [0.0] * (end - start)
        before: dict[int, list[float]] = {}
        block_step = 0
        while True:
            block = masks[start:end]
            options = config.length_options
            tail = masks[-int(options["eos_window"]) :] if options else []
            computed = computed_now(block, block_step)
            moved = False
            logits, shadow_logits = logits_and_shadows(block, computed)
            candidates = {place: candidate_at(place, logits) for place in open_places if place in logits}
            tail_seen = all(place in logits for place in tail if place in open_places)
            ended = []
            if tail_seen:
                for place in tail:
                    if place in open_places:
                        ended.append(sum(candidates[place].chances[token] for token in eos_token_ids))
                    else:
                        ended.append(1.0 if x[place] in eos_token_ids else 0.0)
            if growing:
                factor = int(options["expansion_factor"])
                room = most - len(masks)
                more = lengths.growth(ended, room, eos_threshold=options["eos_threshold"], expansion_factor=factor)
                if more:
                    growth.append((masks[-1], more))
                    commits.append([])
                    step += 1
                    lengthen(masks[-1], more)
                    end = min(start + width, len(masks))
                    memory = [0.0] * (end - start)
                    continue
                growing = False
            if adaptive and block_step == 0:
                ahead = [candidates[place] for place in masks[start : start + max(window, width)]]
                length = lengths.block_length(
                    [candidate.token for candidate in ahead],
                    [policies.single(candidate.probability) for candidate in ahead],
                    window,
                    config.delimiters or delimiters,
                    delimiter_threshold=config.block_options["delimiter_threshold"],
                    block_length=width,
                )
                end = start + length
                block, memory = masks[start:end], memory[:length] + [0.0] * (length - len(memory))
            steps = shares_of_blocks[block_number] if shares_of_blocks else len(block)
            counts = [count for count in shares(len(block), steps) if count]

            here = {place: candidate for place, candidate in candidates.items() if place in block}
            remask: list[int] = []
            if config.policy == "fixed":
                order, count = sorted(here.values()), counts[block_step]
                chosen = [candidate.place for candidate in order[:count]]
                for last, following in zip(order[count - 1 :], order[count : count + 1], strict=False):
                    if last.last == following.last and last.doubt < following.doubt:
                        closest = min(closest, following.doubt - last.doubt)
            else:
                facts = policies.Row(
                    open=[place in here for place in block],
                    confidence=[here[p].sureness if p in here else -math.inf for p in block],
                    entropy=[entropy(here[p].chances) if p in here else 0.0 for p in block],
                    change=[divergence(here[p].chances, before.get(p)) if p in here else 0.0 for p in block],
                    verified=[softmax(without(shadow_logits[p]))[x[p]] if p in shadow_logits else 0.0 for p in block],
                    committed=[place not in here for place in block],
                    position=block,
                    memory=memory,
                    count=counts[block_step] if block_step < len(counts) else len(block) // len(counts),
                )
                outcome = policies.RULES[config.policy](facts, **config.policy_options)
                chosen, memory = [block[i] for i in outcome.commit], outcome.memory
                remask = [block[i] for i in outcome.remask]
            before |= {place: candidate.chances for place, candidate in here.items()}
            if config.early_answer == "prophet":
                rest = sorted(place for place in masks[start:] if place in open_places)
                if all(place in logits for place in rest):
                    progress = policies.single(sum(place not in open_places for place in masks) / len(masks))
                    gaps = [candidates[place].gap for place in rest]
                    answered = lengths.answer_known(gaps, progress, **config.early_answer_options)
                    if answered:
                        chosen, remask = rest, []

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
            growth.append(None)
            step += 1
            block_step += 1
            complete = not open_places & set(block) or (config.policy == "fixed" and block_step >= len(counts))
            if config.early_stop and over(end if complete else start):
                x = [
                    [*eos_token_ids, *end_token_ids][0] if place in open_places else token
                    for place, token in enumerate(x)
                ]
                answered = True
            if complete or answered:
                break
            if options and tail_seen:
                after, more = lengths.expansion(
                    {place: policies.single(here[place].probability) for place in here if place in open_places},
                    ended,
                    most - len(masks),
                    expand_threshold=options["expand_threshold"],
                    expand_eos_threshold=options["expand_eos_threshold"],
                    expansion_factor=int(options["expansion_factor"]),
                )
                if after is not None and more:
                    growth[-1] = (after, more)
                    place = block.index(after) + 1
                    memory = memory[:place] + [0.0] * more + memory[place:]
                    lengthen(after, more)
                    end += more
        start, block_number = end, block_number + 1
    return Written(x, forwards, step, commits, growth, closest)
