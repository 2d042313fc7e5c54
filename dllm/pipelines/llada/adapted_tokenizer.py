"""What LLaDA asks of an autoregressive model's tokenizer: a mask token, an end of the document, an end of the turn, a marked
chat template.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dllm.errors import CheckpointError, OptionError, did_you_mean
from dllm.pipelines.llada.marked_template import Rendering, mark_template, source_template
from dllm.pipelines.llada.tokenizer import MARKERS, MASK_SPELLINGS, name_end_of_turn

RESERVED = re.compile(r"[<\[].*(reserved|unused).*[>\]]|\[PAD\d+\]", re.IGNORECASE)
"""Tokens that stand in a vocabulary for nothing yet, such as <|reserved_special_token_0|>, [unused1], or [PAD151665] with which
GGUF files fill a vocabulary up."""
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
"""How the end of a document is spelt where end-of-turn took its place as `eos_token`."""
MEANINGS = ("bos", "eos", "eot", "pad", "unk")
"""Named tokens that the mask cannot be: they are in clean text, or stand for what is no text."""
MASK_CHOICES = ("auto", "reserved", "append")


APPENDED = (*MASK_SPELLINGS, "<|dllm_mask|>")
"""How a new mask is spelt: the first that the vocabulary has not."""


@dataclass(frozen=True)
class MaskToken:
    """Which token became the mask."""

    token: str
    id: int
    how: str
    """declared: the source had a mask; reserved: a token that stood for nothing; appended: a new one; named: by the user."""

    @property
    def untrained(self) -> bool:
        """Whether no training ever gave its row of the embedding a meaning."""
        return self.how in ("reserved", "appended")


def choose_mask(tokenizer: PreTrainedTokenizerBase, wanted: str = "auto") -> MaskToken:
    """Gives a tokenizer its mask token, in place.

    Args:
        tokenizer: a source's.
        wanted: "reserved" takes the first reserved token that has no other meaning; "append" adds one behind the vocabulary;
            "auto" keeps a mask that is declared, else does the first where it can, else the second; anything else is the text
            of a token to take.

    Raises:
        CheckpointError: "reserved", and no token is; "auto", and the declared mask has another meaning; "append", and every
            spelling of a mask is in the vocabulary.
        OptionError: a text that is not one token of the vocabulary, or one that has another meaning.
    """
    vocabulary = tokenizer.get_vocab()
    reserved = sorted(
        (id_, token)
        for token, id_ in vocabulary.items()
        if RESERVED.fullmatch(token) and _meaning(tokenizer, token) is None and token not in _template(tokenizer)
    )
    if wanted == "auto" and tokenizer.mask_token_id is not None:
        if other := _meaning(tokenizer, tokenizer.mask_token):
            raise CheckpointError(
                f"The tokenizer's mask_token {tokenizer.mask_token!r} is its {other}_token too: the mask needs one of its own. "
                f"Write --mask_token append for a new one, or --mask_token TOKEN for one that the model can do without."
            )
        return MaskToken(tokenizer.mask_token, tokenizer.mask_token_id, "declared")
    if wanted == "reserved" and not reserved:
        raise CheckpointError(
            "The tokenizer has no spare id: no token of its vocabulary is reserved or unused by its name and free. Write "
            "--mask_token append for a new one, or --mask_token TOKEN for one that the model can do without."
        )
    if wanted not in MASK_CHOICES:
        _check_named(tokenizer, wanted)
        token, how = wanted, "named"
    elif reserved and wanted != "append":
        token, how = reserved[0][1], "reserved"
    else:
        token, how = _new_spelling(vocabulary), "appended"
    tokenizer.add_special_tokens({"mask_token": token})
    return MaskToken(token, int(tokenizer.convert_tokens_to_ids(token)), how)


def _check_named(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    if token not in tokenizer.get_vocab():
        close = did_you_mean(token, map(str, tokenizer.added_tokens_decoder.values()))
        raise OptionError(
            f"--mask_token {token!r} is no token of the vocabulary: write one that is, or auto, reserved or append."
            f"{close if 'Did you mean' in close else ''}"
        )
    if name := _meaning(tokenizer, token):
        raise OptionError(f"--mask_token {token!r} is the tokenizer's {name}_token: the mask needs one of its own.")
    if token in MARKERS or token in _template(tokenizer):
        raise OptionError(f"--mask_token {token!r} stands in chat templates: the mask needs one that no text has.")


def _meaning(tokenizer: PreTrainedTokenizerBase, token: str) -> str | None:
    """Which named token of a tokenizer it is, but for the mask."""
    return next((name for name in MEANINGS if token == getattr(tokenizer, f"{name}_token", None)), None)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a tokenizer's chat template; empty where it has none, or several."""
    return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""


def _new_spelling(vocabulary: Container[str]) -> str:
    for spelling in APPENDED:
        if spelling not in vocabulary:
            return spelling
    raise CheckpointError(
        f"There is no name for a new mask token: the vocabulary has {', '.join(APPENDED)} already. Take one of them that the "
        f"model can do without: --mask_token {APPENDED[0]!r}."
    )


def choose_ends(tokenizer: PreTrainedTokenizerBase) -> str:
    """Gives a tokenizer its end of document (`eos_token`), end of turn (`eot_token`) and marked template, in place.

    Tuned models often call the end of a turn their `eos_token`; LLaDA knows both. What ends the assistant's turns in the chat
    template is the end of the turn. Where it is the source's `eos_token`, the end of the document is the token of the vocabulary
    that is called so, if there is one; without one, one token is both. Padding is the source's, or the end of the document where
    the source pads with the end of a turn.

    Returns:
        What became of the chat template: "marked" for the source's with marks, "source" for one that could not be marked, "none".

    Raises:
        CheckpointError: there is no end of anything.
    """
    if tokenizer.eos_token is None:
        raise CheckpointError(
            "The source's tokenizer has no end-of-text token (eos_token), and LLaDA joins and pads with it: name one of its "
            "vocabulary in its tokenizer_config.json."
        )
    theirs, template, marked = str(tokenizer.eos_token), source_template(tokenizer), mark_template(tokenizer)
    turn = marked.turn_end.strip() if marked is not None else None
    if template is not None and marked is None and _ends_turns(tokenizer, template, theirs):
        turn = theirs
    document = theirs
    if turn == theirs:
        vocabulary = tokenizer.get_vocab()
        declared = [getattr(tokenizer, f"{name}_token") for name in ("pad", "unk", "bos")]
        known = [*(token for token in declared if token in DOCUMENT_ENDS), *DOCUMENT_ENDS]
        document = next((token for token in known if token in vocabulary and token != turn), theirs)
    if document != theirs:
        tokenizer.add_special_tokens({"eos_token": document})
    if tokenizer.pad_token in (None, turn):
        tokenizer.pad_token = document
    if turn is not None and turn != document:
        name_end_of_turn(tokenizer, turn)
    if marked is not None:
        tokenizer.chat_template = marked.text
        return "marked"
    if template is None:
        return "none"
    if document != theirs and "eos_token" in template:
        template = f"{{%- set eos_token = {theirs!a} -%}}{template}"
    tokenizer.chat_template = template
    return "source"


def _ends_turns(tokenizer: PreTrainedTokenizerBase, template: str, token: str) -> bool:
    """Whether a conversation that the assistant ended ends with the token."""
    text = Rendering(tokenizer, template).text(("user", "assistant"), ("a", "b"))
    return text is not None and text.rstrip().endswith(token)
