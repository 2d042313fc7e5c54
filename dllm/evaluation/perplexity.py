"""Bits per character of texts: what a model makes of text that it has not seen, whatever its tokenizer."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.diffusion.likelihood import MaskPredictor, Text, likelihood
from dllm.errors import DataError, OptionError


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Bits per character of some texts; for a mask predictor at most that many."""

    per_character: float
    standard_error: float
    """Of `per_character`: over the texts, as a ratio of two sums; the masks' share is in it. NaN of a single text."""
    nats_per_token: float
    texts: int
    characters: int
    tokens: int


def summarise(nats: Sequence[float], characters: Sequence[int], tokens: int) -> Bits:
    """The ratio of two sums, and its error.

    Args:
        nats: -log p of each text.
        characters: of each text.
        tokens: of all of them.
    """
    bits = [x / math.log(2) for x in nats]
    n, total = len(bits), sum(characters)
    ratio = sum(bits) / total
    squares = sum((b - ratio * c) ** 2 for b, c in zip(bits, characters, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / total if n > 1 else math.nan
    return Bits(
        per_character=ratio,
        standard_error=error,
        nats_per_token=sum(nats) / tokens,
        texts=n,
        characters=total,
        tokens=tokens,
    )


def bits_per_character(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    samples: int = 4,
    row_tokens: int | None = None,
    rows: int = 16,
    seed: int = 0,
    on_text: Callable[[int], None] | None = None,
) -> Bits:
    """Bounds the bits per character of texts, each seen by itself.

    Two models see the same characters; with one tokenizer they see the same masks.

    Args:
        model: a LLaDA model; it is put into evaluation mode for the time being.
        tokenizer: its own.
        texts: of at most the model's context in tokens, or of any length with `row_tokens`; none empty.
        samples: sets of masks of each text (of each part of one).
        row_tokens: a text of more tokens is cut into parts of equal length, which do not see each other; at least 1, and None
            cuts none.
        rows: how many rows go through the model at a time.
        seed: of the masks.
        on_text: called with the number of texts that were begun.

    Raises:
        OptionError: there is no text, or an empty one; or a number that is less than 1.
        DataError: a text without a token, or one that does not fit into the model's context.
    """
    for name, number in (("samples", samples), ("rows", rows), ("row_tokens", row_tokens)):
        if number is not None and number < 1:
            uncut = ", and row_tokens=None cuts no text" if name == "row_tokens" else ""
            raise OptionError(f"{name}={number} is less than 1: give it 1 or more{uncut}.")
    if not texts or not all(texts):
        raise OptionError("Bits per character need at least one text, and none that is empty.")
    ids: list[Tensor] = []
    parts: list[Text] = []
    of_text: list[int] = []
    for place, text in enumerate(texts):
        ids.append(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
        cut = ids[-1].tensor_split(max(1, -(-len(ids[-1]) // row_tokens)) if row_tokens else 1)
        _check_text(text, place, len(cut[0]), model.config.max_position_embeddings)
        for part in cut:
            of_text.append(place)
            parts.append(Text(part, number=len(parts)))
    nats = [0.0] * len(texts)
    for first in range(0, len(parts), max(1, rows // samples)):
        here = slice(first, first + max(1, rows // samples))
        for place, found in zip(
            of_text[here], text_nats(model, parts[here], samples=samples, rows=rows, seed=seed), strict=True
        ):
            nats[place] += found
        if on_text is not None:
            on_text(of_text[here][-1] + 1)
    return summarise(nats, [len(text) for text in texts], sum(map(len, ids)))


def _check_text(text: str, place: int, tokens: int, context: int) -> None:
    """Whether its longest part, of so many tokens, can be measured."""
    what = f"Text {place} (counted from 0), {reprlib.repr(text)},"
    if not tokens:
        raise DataError(f"{what} becomes 0 tokens: leave it out.")
    if tokens > context:
        raise DataError(
            f"{what} would be seen {tokens} tokens at a time, and the model's context is {context}: cut it with "
            f"row_tokens={context} or fewer, or leave it out."
        )


def text_nats(
    model: PreTrainedModel, texts: Sequence[Text], *, samples: int = 128, rows: int = 16, seed: int = 0
) -> list[float]:
    """-log p(text | prompt) of each text in nats, at most; arguments as of `dllm.diffusion.likelihood.likelihood`."""
    on_device = [text._replace(ids_L=text.ids_L.to(model.device)) for text in texts]
    was_training = model.training
    model.eval()
    try:
        found = likelihood(
            mask_predictor(model), on_device, int(model.config.mask_token_id), samples=samples, rows=rows, seed=seed
        )
    finally:
        model.train(was_training)
    return found.mean(1).tolist()


def mask_predictor(model: PreTrainedModel) -> MaskPredictor:
    """A LLaDA model as the likelihood sees it."""

    @torch.inference_mode()
    def predict(xt_RL: Tensor, masked_RL: Tensor, targets_M: Tensor, real_RL: Tensor) -> Tensor:
        padding = None if bool(real_RL.all()) else real_RL
        return model(input_ids=xt_RL, attention_mask=padding, logits_to_keep=masked_RL, targets=targets_M).nll

    return predict
