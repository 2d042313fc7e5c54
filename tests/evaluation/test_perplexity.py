"""Bits per character: sums over characters, whatever the tokenizer, and no text that sees another."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from dllm.diffusion.likelihood import Text
from dllm.errors import DataError, OptionError
from dllm.evaluation.perplexity import bits_per_character, summarise, text_nats
from dllm.pipelines import llada
from dllm.pipelines.llada.tokenizer import bpe_tokenizer, char_tokenizer

TEXTS = ["In the beginning", "God", "the earth was without form, and void"]
SHAPE = "n_layers=1,d_model=16,n_heads=2,mlp_hidden_size=16"


def made(tokenizer: Any) -> Any:
    return llada.fresh_model("tiny", tokenizer, SHAPE).eval()


def flat(model: Any) -> Any:
    """Every token as likely as any other: its bits are known."""
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return model


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_flat_model_has_the_bits_of_its_vocabulary(kind: str) -> None:
    tokenizer = char_tokenizer() if kind == "char" else bpe_tokenizer(TEXTS * 20, 280)
    model = flat(made(tokenizer))
    bits = bits_per_character(model, tokenizer, TEXTS, samples=2)
    tokens = sum(map(len, tokenizer(TEXTS, add_special_tokens=False)["input_ids"]))
    characters = sum(map(len, TEXTS))
    rows = len(model.get_output_embeddings().weight)
    assert (bits.texts, bits.characters, bits.tokens) == (3, characters, tokens)
    assert bits.nats_per_token == pytest.approx(math.log(rows), rel=1e-5)
    assert bits.per_character == pytest.approx(tokens * math.log2(rows) / characters, rel=1e-5)
    if kind == "char":
        assert bits.standard_error == pytest.approx(0, abs=1e-5)  # every character costs the same


def test_texts_and_parts_are_seen_by_themselves_and_the_mode_comes_back() -> None:
    tokenizer = char_tokenizer()
    model = made(tokenizer).train()
    together = bits_per_character(model, tokenizer, TEXTS, samples=3, row_tokens=20, rows=100)
    few = bits_per_character(model, tokenizer, TEXTS, samples=3, row_tokens=20, rows=1)
    assert together.per_character == pytest.approx(few.per_character, rel=1e-5)
    assert model.training
    ids = torch.tensor(tokenizer(TEXTS[2], add_special_tokens=False)["input_ids"])
    halves = [Text(part, number=2 + place) for place, part in enumerate(ids.tensor_split(2))]
    texts = [Text(torch.tensor(tokenizer(text)["input_ids"]), number=place) for place, text in enumerate(TEXTS[:2])]
    nats = text_nats(model, [*texts, *halves], samples=3)
    assert together.nats_per_token * together.tokens == pytest.approx(sum(nats), rel=1e-5)


def test_what_stands_before_a_text_is_seen() -> None:
    tokenizer = char_tokenizer()
    model = made(tokenizer)
    ids = torch.tensor(tokenizer("abcdef")["input_ids"])
    one, other, alone = text_nats(model, [Text(ids, 3), Text(ids.roll(1), 3), Text(ids[3:])], samples=4)
    assert one != other != alone != one


def test_the_error_is_that_of_a_ratio() -> None:
    bits = summarise([math.log(2) * x for x in (10.0, 30.0, 20.0)], [10, 20, 20], 25)
    assert bits.per_character == pytest.approx(1.2)
    # residues 10 - 12, 30 - 24, 20 - 24; sum of squares 56, times n / (n - 1), over the characters
    assert bits.standard_error == pytest.approx(math.sqrt(56 * 3 / 2) / 50)
    assert math.isnan(summarise([1.0], [3], 1).standard_error)


@pytest.mark.parametrize("texts", [[], ["a", ""]])
def test_nothing_to_measure(texts: list[str]) -> None:
    tokenizer = char_tokenizer()
    with pytest.raises(
        OptionError, match=re.escape("Bits per character need at least one text, and none that is empty.")
    ):
        bits_per_character(made(tokenizer), tokenizer, texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(samples=0), "samples=0 is less than 1: give it 1 or more."),
        (dict(rows=0), "rows=0 is less than 1: give it 1 or more."),
        (dict(row_tokens=0), "row_tokens=0 is less than 1: give it 1 or more, and row_tokens=None cuts no text."),
        (dict(row_tokens=-5), "row_tokens=-5 is less than 1"),
    ],
)
def test_a_number_that_is_too_small(options: dict[str, int], message: str) -> None:
    tokenizer = char_tokenizer()
    with pytest.raises(OptionError, match=re.escape(message)):
        bits_per_character(made(tokenizer), tokenizer, TEXTS, **options)


def test_texts_that_cannot_be_measured_are_named_before_any_is() -> None:
    tokenizer, seen = char_tokenizer(), []
    model = made(tokenizer)
    model.config.max_sequence_length = 20
    long = re.escape(f"Text 2 (counted from 0), {TEXTS[2][:12]!r}"[:-1])  # its middle is left out
    with pytest.raises(DataError, match=rf"^{long}.* 36 tokens at a time, .* context is 20: cut it with row_tokens=20"):
        bits_per_character(model, tokenizer, TEXTS, on_text=seen.append)
    assert not seen
    # two parts of 18, though 30 is more than 20
    assert bits_per_character(model, tokenizer, TEXTS, samples=1, row_tokens=30).tokens == sum(map(len, TEXTS))
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(DataError, match=r"^Text 1 \(counted from 0\), '  ', becomes 0 tokens: leave it out"):
        bits_per_character(model, tokenizer, ["a", "  "], row_tokens=8)


def test_progress_counts_texts() -> None:
    tokenizer, seen = char_tokenizer(), []
    bits_per_character(made(tokenizer), tokenizer, TEXTS, samples=2, rows=4, on_text=seen.append)
    assert seen == [2, 3]
