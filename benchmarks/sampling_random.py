"""The `random` section of sampling.py: our exact loop and our caches on random weights, by vocabulary, dtype and batch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from reference.published import published_generate
from torch import Tensor
from turns import CACHES, WHOLE, Run, cached, exists, heading, in_turns, logits_of

from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM, generate

BODIES: dict[str, dict[str, Any]] = {
    "large": dict(d_model=512, n_layers=8, n_heads=8, mlp_hidden_size=2048, max_sequence_length=1024),
    "embedded": dict(d_model=128, n_layers=8, n_heads=4, mlp_hidden_size=384, max_sequence_length=1024),
}
"""The second has the shape of the model that ships inside."""
VICINITY = 16
"""Positions on either side that a vicinity cache computes at each step; its default."""


def random_model(body: str, vocabulary: int, dtype: torch.dtype) -> LLaDAModelLM:
    """Random weights whose logits lie well apart, and which never proposes the mask."""
    torch.manual_seed(0)
    model = LLaDAModelLM(
        LLaDAConfig(vocab_size=vocabulary, mask_token_id=1, eos_token_id=2, pad_token_id=2, **BODIES[body])
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
        model.get_output_embeddings().weight[1] = 0.0
    return model.to(dtype)


def ragged(rows: int, shortest: int, longest: int) -> list[Tensor]:
    """Prompts whose lengths halve the range again and again, so that the first few are as long as all are on average."""
    generator = torch.Generator().manual_seed(1)
    fractions = [sum((row + 1 >> bit & 1) / 2 ** (bit + 1) for bit in range(8)) for row in range(rows)]
    return [
        torch.randint(3, 500, (shortest + round(part * (longest - shortest)),), generator=generator)
        for part in fractions
    ]


class Parts(NamedTuple):
    """Seconds a position, each timed alone."""

    body: float
    head: float
    published: float
    """Argmax, and softmax in fp64 over the vocabulary."""


def published_statistics(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1).gather(-1, logits.argmax(-1, keepdim=True))


@torch.no_grad()
def parts_of(model: Any, length: int, asked: int, rounds: int) -> Parts:
    """The body at `length` positions, the head at `asked` and the published statistics at `asked`, for each position."""
    ids = torch.randint(3, 500, (1, length))
    hidden = model.model(ids).last_hidden_state[0, :asked]
    head = model.get_output_embeddings()
    logits = head(hidden)
    runs: dict[str, Run] = {
        "body": lambda: model.model(ids).last_hidden_state,
        "head": lambda: torch.nn.functional.linear(hidden, head.weight),
        "published": lambda: published_statistics(logits),
    }
    in_turns(runs, 1)
    timed = in_turns(runs, rounds)
    return Parts(timed["body"].seconds / length, timed["head"].seconds / asked, timed["published"].seconds / asked)


def floor(parts: Parts, cache: str, prompts: Sequence[int], gen: int, block: int, steps: int) -> float | None:
    """Seconds that one fixed schedule over all rows cannot do without; None where this script has no count of it."""
    if cache == "delayed":
        return None
    blocks, each = gen // block, steps // (gen // block)
    total = 0.0
    for prompt in prompts:
        length = prompt + gen
        for b in range(blocks):
            begin = prompt + b * block
            around = min(length, begin + block + VICINITY) - max(0, begin - VICINITY)
            later = {"none": length, "prefix": length - begin, "dual": block, "vicinity": around}[cache]
            total += parts.body * (length + (each - 1) * later)
            total += parts.head * sum(block - step * block // each for step in range(each))
    return total


def published_time(parts: Parts, prompts: Sequence[int], gen: int, steps: int) -> float:
    return sum((prompt + gen) * steps for prompt in prompts) * sum(parts)


class Case(NamedTuple):
    """One batch of one model."""

    label: str
    model: Any
    prompts: list[Tensor]
    few: list[Tensor]
    """Those that the published loop runs."""
    must_agree: bool
    """In fp32 the exact loop writes the published one's tokens, all of them."""


def lines_of(case: Case, parts: Parts, settings: dict[str, int], at_once: int, rounds: int) -> list[str]:
    """The lines of the table: the published loop, and ours with every cache that there is."""
    gen, block, steps = (settings[key] for key in ("gen_length", "block_length", "steps"))
    logits = partial(logits_of, case.model)
    published = partial(published_generate, logits, case.few, mask_token_id=1, at_once=at_once, **settings)
    runs: dict[str, Run] = {"published": published}
    for cache in CACHES:
        if exists(cached(cache)):
            runs[cache] = partial(generate, case.model, None, case.prompts, **settings, **WHOLE, **cached(cache))
    timed = in_turns(runs, rounds)
    taken, theirs = timed["published"]
    few, lengths = len(case.few), [len(row) for row in case.prompts]
    base, least = taken / few, published_time(parts, lengths[:few], gen, steps)
    cells = f"{theirs.nfe} | {1000 * taken / theirs.nfe:.0f} | {taken:.2f} | {gen / base:.1f} | 1.00"
    lines = [f"| {case.label} | published | {cells} | {least:.2f} | {taken / least:.2f} | |"]
    for loop, (seconds, done) in timed.items():
        if loop == "published":
            continue
        needed = floor(parts, loop, lengths, gen, block, steps)
        same = agreement(done.sequences, theirs.canvases, gen, must=case.must_agree and loop == "none")
        rate, ratio = len(lengths) * gen / seconds, base * len(lengths) / seconds
        cells = f"{done.nfe} | {1000 * seconds / done.nfe:.0f} | {seconds:.2f} | {rate:.1f} | {ratio:.2f}"
        against = " | " if needed is None else f"{needed:.2f} | {seconds / needed:.2f}"
        lines.append(f"| {case.label} | {'exact' if loop == 'none' else loop} | {cells} | {against} | {same} |")
    return lines


def random_section(arguments: argparse.Namespace) -> str:
    gen, steps = arguments.gen_length, arguments.steps
    settings = dict(gen_length=gen, block_length=arguments.block_length, steps=steps)
    columns = "loop | forwards | ms each | seconds | tokens/s | against published | floor, s | of it | same tokens"
    lines = [f"| V | dtype | batch | {columns} |"]
    alone = ["| V | dtype | body, ms | head, ms | published statistics, ms | predicted ratio, exact |"]
    for table in (lines, alone):
        table.append("|" + "---|" * (table[0].count("|") - 1))
    for vocabulary in arguments.vocabularies:
        for name in arguments.dtypes:
            model = random_model(arguments.body, vocabulary, getattr(torch, name))
            prompts = ragged(max(arguments.batches), 32, 160)
            typical = sum(map(len, prompts)) // len(prompts)
            parts = parts_of(model, typical + gen, arguments.block_length, 5)
            exact = floor(parts, "none", [typical], gen, arguments.block_length, steps)
            assert exact is not None
            ratio = published_time(parts, [typical], gen, steps) / exact
            alone.append(f"| {vocabulary:,} | {name} | {' | '.join(f'{1000 * x:.3f}' for x in parts)} | {ratio:.2f} |")
            print(alone[-1], flush=True)
            for batch in arguments.batches:
                few = prompts[: min(batch, arguments.reference_rows)]
                label = f"{vocabulary:,} | {name} | {batch}"
                case = Case(label, model, prompts[:batch], few, name == "float32")
                found = lines_of(case, parts, settings, arguments.at_once, arguments.rounds)
                lines += found
                print(*found, sep="\n", flush=True)
    body = BODIES[arguments.body]
    what = (
        f"random weights, a body of {body_size(body):.1f} M parameters (d_model {body['d_model']}, {body['n_layers']} layers), "
        f"prompts of 32 to 160 tokens, gen_length {gen}, block_length {arguments.block_length}, {steps} steps. The published "
        f"loop runs the first {arguments.reference_rows} rows of a batch, {arguments.at_once} at a time; the floor in its line "
        f"is what its parts take alone."
    )
    missing = [cache for cache in CACHES if not exists(cached(cache))]
    absent = f"\nNot in this version: {', '.join(missing)}.\n" if missing else ""
    first = "A position, each part timed alone before the loops, and what follows from them for one row:\n\n"
    tables = first + "\n".join(alone) + "\n\nThe loops:\n\n" + "\n".join(lines) + "\n"
    return heading("Sampling with random weights", what) + tables + absent


def body_size(body: dict[str, Any]) -> float:
    d, hidden = body["d_model"], body["mlp_hidden_size"]
    return body["n_layers"] * (4 * d * d + 3 * d * hidden) / 1e6


def agreement(ours: Sequence[Tensor], theirs: Sequence[Tensor], gen: int, *, must: bool) -> str:
    """The share of equal tokens among the last `gen`, over the rows that both have."""
    same = [
        a[-gen:] == b[-gen:].cpu() for a, b in zip(ours, theirs, strict=False)
    ]  # the published loop ran the first rows alone
    share = float(torch.cat(same).float().mean())
    if must and share < 1:
        raise SystemExit(f"The exact loop wrote other tokens than the published one: {share:.4f} of them are the same.")
    return "all" if share == 1 else f"{100 * share:.1f} %"
