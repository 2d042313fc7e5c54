"""The `bits` part of english.py: bits per character on held-out text, against minutes of training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from english_models import Checkpoint, Judge, checkpoints, fingerprint
from english_texts import spans
from measured import Part, Row, Store, table

from dllm.evaluation.perplexity import bits_per_character, summarise


def measure_bits(arguments: argparse.Namespace, store: Store, judge: Callable[[], Judge]) -> None:
    texts = spans(arguments.spans, arguments.characters)
    settings = {
        "spans": len(texts),
        "characters": arguments.characters,
        "samples": arguments.samples,
        "row_tokens": arguments.row_tokens,
    }
    part = Part(store, "bits", arguments.budget["bits"], settings)
    items: dict[str, Callable[[], Row]] = {}
    weights: dict[str, str] = {}
    if arguments.source:
        items["source"] = lambda: of_source(judge(), texts)
    for name, folder in arguments.runs.items():
        for checkpoint in reversed(
            checkpoints(name, folder, arguments.checkpoints)
        ):  # the last is the first to be known
            items[checkpoint.name] = partial(of_checkpoint, checkpoint, texts, arguments)
            weights[checkpoint.name] = fingerprint(checkpoint.path)
    part.measure(items, weights)


def of_source(judge: Judge, texts: list[str]) -> Row:
    found = judge.nats(texts)
    nats = [float(scores.sum()) for scores, _ in found]
    return asdict(summarise(nats, [len(text) for text in texts], sum(len(scores) for scores, _ in found)))


def of_checkpoint(checkpoint: Checkpoint, texts: list[str], arguments: argparse.Namespace) -> Row:
    model, tokenizer = checkpoint.load()
    bits = bits_per_character(
        model,
        tokenizer,
        texts,
        samples=arguments.samples,
        row_tokens=arguments.row_tokens,
        rows=max(8, arguments.samples),
    )
    row = {"minutes": checkpoint.minutes, "training_tokens": checkpoint.tokens, "parameters": model.num_parameters()}
    return asdict(bits) | row


def bits_report(store: Store) -> str:
    rows = store.rows("bits")
    if not rows:
        return ""
    settings = store.data["bits"]["settings"]
    lines = [
        [
            name,
            f"{row['minutes']:.1f}" if "minutes" in row else "",
            f"{row['training_tokens']:,}" if row.get("training_tokens") else "",
            f"{row['per_character']:.3f} ± {row['standard_error']:.3f}",
            f"{row['nats_per_token']:.3f}",
        ]
        for name, row in sorted(rows.items(), key=lambda item: (item[0].split()[0], item[1].get("minutes", 0)))
    ]
    header = ["model", "minutes of training", "tokens of training", "bits per character", "nats per token"]
    return (
        f"## Bits per character\n\nOf {settings['spans']} spans of {settings['characters']} characters of the test split of "
        f"builtin:text, each by itself; the same characters for all models. A mask predictor's figure is an upper bound, by "
        f"Monte Carlo with {settings['samples']} sets of masks a span, the same for all models of one tokenizer "
        f"(`dllm/diffusion/likelihood.py`; LLaDA, eq. 6); that of the source, left to right, is exact. A span of more than "
        f"{settings['row_tokens']} tokens is seen in equal parts. ± is the standard error over spans; what two rows differ by "
        f"is known better, as both saw the same spans. Minutes are those of the run's own clock.\n\n"
        + table(header, lines)
    )
