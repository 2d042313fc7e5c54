"""The `fluency` part of english.py: what the autoregressive source makes of what was written, by policy, steps and cache."""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from english_models import Judge, checkpoints, fingerprint
from english_texts import spans
from measured import Part, Row, Store, of_task, table
from torch import Tensor
from turns import CACHES

from dllm.pipelines.llada import generate, infilling

Setting = tuple[str, str, dict[str, Any]]
"""Policy, cache, options."""


def settings_of(blank: int, policies: dict[str, dict[str, Any]], cached: Sequence[str]) -> list[Setting]:
    """Each policy without a cache and with `dual`; those in `cached` with every cache."""
    made: list[Setting] = []
    for cache in CACHES:
        for policy, options in policies.items():
            if cache == "none":
                made.append((policy, cache, options))
            elif cache == "dual" or policy in cached:
                made.append((policy, cache, {**options, "cache": cache}))
    return made


def fixed(blank: int, a_forward: int, **options: Any) -> dict[str, Any]:
    """Policy fixed, that many tokens a forward."""
    return {"steps": -(-blank // a_forward), **options}


def infilling_settings(blank: int) -> list[Setting]:
    policies = {
        **{f"fixed, {n}": fixed(blank, n) for n in (1, 2, 4, 8, blank)},
        "threshold 0.9": dict(threshold=0.9),
        "threshold 0.5": dict(threshold=0.5),
        "entropy_bound 0.1": dict(policy="entropy_bound"),
        "factor 1": dict(policy="factor"),
        "fixed, 1, random": fixed(blank, 1, remasking="random"),
        "fixed, 4, random": fixed(blank, 4, remasking="random"),
        "fixed, 1, margin": fixed(blank, 1, remasking="margin"),
        "klass": dict(policy="klass"),
        "hierarchical": dict(policy="hierarchical"),
        "remdm, 2": fixed(blank, 2, policy="remdm"),
        "wino": dict(policy="wino"),
    }
    return settings_of(blank, policies, ("fixed, 1", "fixed, 4", "threshold 0.5"))


def continuation_settings(blank: int) -> list[Setting]:
    policies = {
        **{f"fixed, {n}": fixed(blank, n) for n in (1, 2, 4, 8)},
        "threshold 0.9": dict(threshold=0.9),
        "threshold 0.5": dict(threshold=0.5),
        "fixed, 1, random": fixed(blank, 1, remasking="random"),
    }
    return settings_of(blank, policies, ())


class Written(NamedTuple):
    """A text, and which characters of it were written, or stand there in the original."""

    text: str
    begin: int
    end: int


def written(tokenizer: Any, ids: Tensor, begin: int, end: int) -> Written:
    """Decodes a row whose tokens [begin, end) were written."""
    before, until, whole = (
        tokenizer.decode(part.tolist(), skip_special_tokens=True) for part in (ids[:begin], ids[:end], ids)
    )
    return Written(whole, min(len(before), len(until)), len(until))


def judged(judge: Judge, texts: Sequence[Written]) -> Row:
    """Nats per token of what was written, of what follows it, and how varied it is."""
    inside = judge.of_spans([t.text for t in texts], [(t.begin, t.end) for t in texts])
    behind = judge.of_spans([t.text for t in texts], [(t.end, len(t.text)) for t in texts])
    row = {"nats": [nats for nats, _ in inside], "tokens": [tokens for _, tokens in inside]}
    row |= {"nats_behind": sum(n for n, _ in behind), "tokens_behind": sum(t for _, t in behind)}
    return row | variety([t.text[t.begin : t.end] for t in texts])


def variety(texts: Sequence[str]) -> Row:
    """distinct_2: different pairs of words over all pairs, of all texts together; entropy: of a text's words, the mean."""
    words = [text.lower().split() for text in texts]
    pairs = [pair for row in words for pair in pairwise(row)]
    entropies = [-sum(n / len(row) * math.log(n / len(row)) for n in Counter(row).values()) for row in words if row]
    return {
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0,
        "entropy": statistics.mean(entropies) if entropies else 0.0,
        "sample": texts[0],
    }


def measure_fluency(arguments: argparse.Namespace, store: Store, judge: Callable[[], Judge]) -> None:
    name = arguments.fluent
    if not arguments.source or name not in arguments.runs:
        return
    checkpoint = checkpoints(name, arguments.runs[name], 1)[0]
    given, blank = arguments.given, arguments.blank
    part = Part(
        store,
        "fluency",
        arguments.budget["fluency"],
        {"model": checkpoint.name, "windows": arguments.windows, "given": given, "blank": blank},
    )
    model, tokenizer = checkpoint.load()
    rows = windows(tokenizer, arguments.windows, 2 * given + blank)
    items: dict[str, Callable[[], Row]] = {}
    for task, settings in (("infilling", infilling_settings(blank)), ("continuation", continuation_settings(blank))):
        known = [row if task == "infilling" else row[: given + blank] for row in rows]
        original = [written(tokenizer, row, given, given + blank) for row in known]
        items[f"{task} | real text | -"] = partial(lambda texts: judged(judge(), texts), original)
        for policy, cache, options in settings:
            items[f"{task} | {policy} | {cache}"] = partial(
                sampled, model, tokenizer, judge, task, known, given, blank, options
            )
    part.measure(items, dict.fromkeys((name for name in items if not name.endswith("-")), fingerprint(checkpoint.path)))


def windows(tokenizer: Any, n: int, tokens: int) -> list[Tensor]:
    """n stretches of `tokens` tokens of held-out text."""
    texts = spans(n, 12 * tokens)
    return [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]) for text in texts]


def sampled(
    model: Any,
    tokenizer: Any,
    judge: Callable[[], Judge],
    task: str,
    rows: list[Tensor],
    given: int,
    blank: int,
    options: dict[str, Any],
) -> Row:
    """Writes the tokens [given, given + blank) of each row, and has them judged."""
    if task == "infilling":
        inputs = [row.clone() for row in rows]
        for row in inputs:
            row[given : given + blank] = int(model.config.mask_token_id)
        result = infilling(model, None, inputs, suppress_eos=True, **options)
    else:
        shape = dict(gen_length=blank, block_length=blank, suppress_eos=True)
        result = generate(model, None, [row[:given] for row in rows], **shape, **options)
    texts = [written(tokenizer, canvas, given, given + blank) for canvas in result.sequences]
    return judged(judge(), texts) | {
        "tokens_per_forward": result.tokens_per_forward,
        "forwards": statistics.mean(result.steps),
    }


def per_token(row: Row) -> tuple[float, float]:
    """Nats per token of what was written, and the standard error over the samples, as a ratio of two sums."""
    nats, tokens = row["nats"], row["tokens"]
    n, ratio = len(nats), sum(nats) / sum(tokens)
    squares = sum((x - ratio * t) ** 2 for x, t in zip(nats, tokens, strict=True))
    return ratio, math.sqrt(squares * n / max(1, n - 1)) / sum(tokens)


def fluency_report(store: Store) -> str:
    rows = store.rows("fluency")
    if not rows:
        return ""
    settings = store.data["fluency"]["settings"]
    given, blank = settings["given"], settings["blank"]
    text = (
        f"## Fluency\n\nWhat {settings['model']} writes in {settings['windows']} stretches of held-out text, as the source "
        f"judges it from left to right: nats per token of what was written, in the source's own tokens. Infilling: "
        f"{given} tokens of the original before and {given} behind a blank of {blank}, in one block; 'behind' is what the source "
        f"gives the original's {given} tokens after it. Continuation: {given} tokens of the original, then {blank} in one block. "
        f"Temperature 0, no end of text. 'fixed, 4' commits four tokens a forward. distinct-2: different pairs of words over all "
        f"pairs, of all samples together; entropy: of a sample's words, in nats. Low nats with low distinct-2 are repetition. ± "
        f"is the standard error over the stretches.\n"
    )
    for task in ("infilling", "continuation"):
        lines = []
        for policy, cache, row in of_task(rows, task):
            nats, error = per_token(row)
            lines.append(
                [
                    policy,
                    cache,
                    f"{row['tokens_per_forward']:.2f}" if "tokens_per_forward" in row else "",
                    f"{nats:.2f} ± {error:.2f}",
                    f"{row['nats_behind'] / row['tokens_behind']:.2f}" if row["tokens_behind"] else "",
                    f"{row['distinct_2']:.2f}",
                    f"{row['entropy']:.2f}",
                ]
            )
        header = ["policy", "cache", "tokens/forward", "nats/token", "behind", "distinct-2", "entropy"]
        if lines:
            text += f"\n### {task.capitalize()}\n\n" + table(header, lines)
    return text
