"""The `definitions` part of english.py: for which held-out words a model knows its definition from those of other words."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from english_models import Judge, checkpoints, fingerprint
from measured import Part, Row, Store, table

from dllm.data.wordnet import Sense, definitions
from dllm.diffusion.likelihood import Text
from dllm.diffusion.noise import keyed_permutation
from dllm.evaluation.perplexity import text_nats

CANDIDATES = 4
"""Words of a group, and so definitions to choose from: chance is one in so many."""
CHAT = ("tuned",)
"""Runs that are asked in conversation; the others continue a line of the dictionary."""

Scorer = Callable[[list[tuple[str, str, int]]], list[float]]
"""(prompt, definition, number of the definition) of several -> -log p of each in nats."""


def groups(words: int) -> list[list[Sense]]:
    """Groups of held-out words of one part of speech, in an order that mixes the alphabet."""
    senses = definitions("test")
    of_part: dict[str, list[Sense]] = defaultdict(list)
    made: list[list[Sense]] = []
    for place in keyed_permutation(len(senses), 0).tolist():
        waiting = of_part[senses[place].part]
        waiting.append(senses[place])
        if len(waiting) == CANDIDATES:
            made.append(waiting.copy())
            waiting.clear()
    return made[: words // CANDIDATES]


def line_prompt(sense: Sense) -> str:
    """The beginning of a line of the dictionary, as `builtin:wordnet` has it."""
    return f"{sense.word} ({sense.part}):"


def chat_prompt(tokenizer: Any, sense: Sense) -> str:
    """A question, and the beginning of its answer, as `builtin:wordnet` has them."""
    question = f'What does the {sense.part} "{sense.word}" mean?'
    begun = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return f'{begun}The {sense.part} "{sense.word}" means:'


def choices(nats: Sequence[Sequence[float]]) -> list[int]:
    """Which definition each word of a group gets: the one that the word makes likelier than the other words do.

    Args:
        nats: of each word, -log p(definition | word) of each definition.

    Returns:
        For each word the definition j with the largest log p(j | word) less the mean of log p(j | any word of the group). So a
        definition that is likely after every word, being short or common, gains nothing by that.
    """
    scores = -torch.tensor(nats, dtype=torch.float64)
    return (scores - scores.mean(0)).argmax(1).tolist()


def chosen_right(words: list[list[Sense]], prompt: Callable[[Sense], str], score: Scorer) -> Row:
    right: list[bool] = []
    for number, group in enumerate(words):
        asked = [
            (prompt(word), f" {sense.definition}.", CANDIDATES * number + place)
            for word in group
            for place, sense in enumerate(group)
        ]
        nats = torch.tensor(score(asked)).view(CANDIDATES, CANDIDATES).tolist()
        right += [choice == place for place, choice in enumerate(choices(nats))]
    of_groups = [sum(right[first : first + CANDIDATES]) for first in range(0, len(right), CANDIDATES)]
    return {"right": sum(right) / len(right), "of": len(right), "groups": of_groups}


def masked_scorer(model: Any, tokenizer: Any, samples: int) -> Scorer:
    """A definition has the same masks after every word."""

    def score(asked: list[tuple[str, str, int]]) -> list[float]:
        texts = []
        for prompt, definition, number in asked:
            given, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, definition))
            texts.append(Text(torch.tensor(given + ids), len(given), number))
        return text_nats(model, texts, samples=samples, rows=len(texts) * samples)

    return score


def judge_scorer(judge: Judge) -> Scorer:
    def score(asked: list[tuple[str, str, int]]) -> list[float]:
        texts = [prompt + definition for prompt, definition, _ in asked]
        spans = [(len(prompt), len(prompt) + len(definition)) for prompt, definition, _ in asked]
        return [nats for nats, _ in judge.of_spans(texts, spans)]

    return score


def measure_definitions(arguments: argparse.Namespace, store: Store, judge: Callable[[], Judge]) -> None:
    words = groups(arguments.words)
    part = Part(
        store,
        "definitions",
        arguments.budget["definitions"],
        {"words": CANDIDATES * len(words), "samples": arguments.definition_samples, "candidates": CANDIDATES},
    )
    items: dict[str, Callable[[], Row]] = {}
    weights: dict[str, str] = {}
    for name, folder in reversed(arguments.runs.items()):
        checkpoint = checkpoints(name, folder, 1)[0]
        items[checkpoint.name] = partial(of_checkpoint, name, checkpoint, words, arguments.definition_samples)
        weights[checkpoint.name] = fingerprint(checkpoint.path)
    if arguments.source:
        items["source"] = lambda: chosen_right(words, line_prompt, judge_scorer(judge())) | {"asked": "line"}
    part.measure(items, weights)


def of_checkpoint(name: str, checkpoint: Any, words: list[list[Sense]], samples: int) -> Row:
    model, tokenizer = checkpoint.load()
    prompt = partial(chat_prompt, tokenizer) if name in CHAT else line_prompt
    asked = "question" if name in CHAT else "line"
    return chosen_right(words, prompt, masked_scorer(model, tokenizer, samples)) | {"asked": asked}


def definitions_report(store: Store) -> str:
    rows = store.rows("definitions")
    if not rows:
        return ""
    settings = store.data["definitions"]["settings"]
    lines = []
    for name, row in rows.items():
        per = [right / settings["candidates"] for right in row["groups"]]
        n, mean = len(per), row["right"]
        error = math.sqrt(sum((x - mean) ** 2 for x in per) / max(1, n - 1) / n)
        lines.append([name, row["asked"], f"{100 * mean:.1f} ± {100 * error:.1f} %"])
    return (
        f"## Definitions of held-out words\n\n{settings['words']} words of the test split of builtin:wordnet, none of whose "
        f"senses and definitions training has seen, in groups of {settings['candidates']} of one part of speech. A definition is "
        f"right if, of the group's {settings['candidates']}, the word gets its own: the one whose log-likelihood after this "
        f"word exceeds its mean after the group's words by the most. Chance is {100 / settings['candidates']:.0f} %. The "
        f"likelihood is a mask predictor's bound with {settings['samples']} sets of masks, the same after every word; of the "
        f"source it is exact. 'line': after `word (noun):`, a line of the dictionary; 'question': in the answer to `What does "
        f'the noun "word" mean?`. ± is the standard error over groups.\n\n' + table(["model", "asked", "right"], lines)
    )
