"""Mask, end of document and end of turn, as tokenizers of known models have them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pipelines.llada.test_marked_template import LLAMA_3, MISTRAL, QWEN_2
from reference import autoregressive
from transformers import PreTrainedTokenizerBase

from dllm.errors import CheckpointError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada.adapted_tokenizer import APPENDED, choose_ends, choose_mask
from dllm.pipelines.llada.tokenizer import CHAT_TEMPLATE, MASK, name_end_of_turn, prepare_tokenizer

LLAMA_3_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
RESERVED = "<|reserved_special_token_0|>"

LIKE: dict[str, tuple[tuple[str, ...], str | None, dict[str, str], tuple[str, ...]]] = {
    # tokens, template, named ones; then: eos, eot, pad, mask, what became of the template
    "Llama 3": (
        LLAMA_3_TOKENS, None, dict(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"),
        ("<|end_of_text|>", "<|eot_id|>", "<|end_of_text|>", RESERVED, "none"),
    ),
    "Llama 3 Instruct": (
        LLAMA_3_TOKENS, LLAMA_3, dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        ("<|end_of_text|>", "<|eot_id|>", "<|end_of_text|>", RESERVED, "marked"),
    ),
    "Qwen2.5": (
        QWEN_TOKENS, QWEN_2, dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>"),
        ("<|endoftext|>", "<|im_end|>", "<|endoftext|>", MASK, "marked"),
    ),
    "Qwen2.5 Instruct": (
        QWEN_TOKENS, QWEN_2, dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        ("<|endoftext|>", "<|im_end|>", "<|endoftext|>", MASK, "marked"),
    ),
    "SmolLM2 Instruct": (
        QWEN_TOKENS, autoregressive.CHATML,
        dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"),
        ("<|endoftext|>", "<|im_end|>", "<|endoftext|>", MASK, "marked"),
    ),
    "Mistral Instruct": (
        ("<s>", "</s>"), MISTRAL, dict(bos_token="<s>", eos_token="</s>"), ("</s>", "", "</s>", MASK, "marked"),
    ),
    "a base model": (
        ("<s>", "</s>", "<pad>"), None, dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>"),
        ("</s>", "", "<pad>", MASK, "none"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE)
def test_ends_and_mask_come_back_with_the_tokenizer(name: str, tmp_path: Path) -> None:
    tokens, template, named, (eos, eot, pad, mask, kind) = LIKE[name]
    words = autoregressive.tokenizer(*tokens, template=template, **named)
    before = words.get_vocab()
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = words.apply_chat_template(talk, tokenize=False) if template else None
    assert choose_ends(words) == kind
    assert choose_mask(words).token == mask
    prepare_tokenizer(words, name).save_pretrained(tmp_path)
    again = llada.load_tokenizer(tmp_path)
    for found in (words, again):
        assert (found.eos_token, getattr(found, "eot_token", ""), found.pad_token, found.mask_token) == (
            eos,
            eot,
            pad,
            mask,
        )
        assert getattr(found, "eot_token_id", None) == (before[eot] if eot else None)
        assert found.mask_token_id == before.get(mask, len(before))
        assert {token: found.get_vocab()[token] for token in before} == before
        assert found.bos_token == named.get("bos_token")
        assert found(f"a{mask}b", add_special_tokens=False)["input_ids"].count(found.mask_token_id) == 1
    if text is not None:
        assert again.apply_chat_template(talk, tokenize=False) == text
    elif name == "Llama 3":  # LLaDA's markers are in its vocabulary
        assert again.chat_template == CHAT_TEMPLATE
    else:
        assert again.chat_template is None


def words_with(*tokens: str, **named: str) -> PreTrainedTokenizerBase:
    return autoregressive.tokenizer("</s>", *tokens, **{"eos_token": "</s>", **named})


MASKS: list[tuple[tuple[str, ...], dict[str, Any], str, tuple[str, str]]] = [
    (("[unused1]", "[unused2]"), {}, "auto", ("[unused1]", "reserved")),
    (("<unused7>",), {}, "reserved", ("<unused7>", "reserved")),
    (("[PAD12]", "[PAD]"), {}, "auto", ("[PAD12]", "reserved")),
    (("[PAD]",), {}, "auto", (MASK, "appended")),
    (("[unused1]",), {}, "append", (MASK, "appended")),
    (("reserved",), {}, "auto", (MASK, "appended")),  # a word, and no special token
    (("<|mine|>",), dict(mask_token="<|mine|>"), "auto", ("<|mine|>", "declared")),
    (("<|mine|>", "<unused0>"), dict(mask_token="<|mine|>"), "reserved", ("<unused0>", "reserved")),
    (("<|fim|>",), {}, "<|fim|>", ("<|fim|>", "named")),
    ((MASK,), {}, "append", ("<|mask|>", "appended")),
    (("<|mine|>",), dict(mask_token="<|mine|>"), "append", (MASK, "appended")),
    ((MASK,), dict(mask_token=MASK), "append", ("<|mask|>", "appended")),
    *(
        (("<unused0>", "<unused1>"), {f"{name}_token": "<unused0>"}, "auto", ("<unused1>", "reserved"))
        for name in ("bos", "eos", "pad", "unk")
    ),
    (("<unused0>",), dict(pad_token="<unused0>"), "auto", (MASK, "appended")),
    (("<pad>",), dict(pad_token="<pad>", mask_token="<pad>"), "append", (MASK, "appended")),
]


@pytest.mark.parametrize(("tokens", "named", "wanted", "expected"), MASKS)
def test_which_token_becomes_the_mask(
    tokens: tuple[str, ...], named: dict[str, Any], wanted: str, expected: tuple[str, str]
) -> None:
    words = words_with(*tokens, **named)
    known = len(words)
    mask = choose_mask(words, wanted)
    assert (mask.token, mask.how) == expected
    assert mask.id == words.mask_token_id
    assert (mask.id == known) is (mask.how == "appended")
    assert mask.untrained is (mask.how in ("reserved", "appended"))


def test_what_ends_a_turn_is_no_mask() -> None:
    words = words_with("<unused0>", "<unused1>")
    name_end_of_turn(words, "<unused0>")
    assert choose_mask(words).token == "<unused1>"


@pytest.mark.parametrize("name", ["bos", "eos", "pad", "unk"])
def test_a_declared_mask_with_another_meaning_is_refused(name: str) -> None:
    words = words_with("<|two|>", **{f"{name}_token": "<|two|>", "mask_token": "<|two|>"})
    message = (
        rf"mask_token '<\|two\|>' is its {name}_token too: the mask needs one of its own\. Write --mask_token append"
    )
    with pytest.raises(CheckpointError, match=message):
        choose_mask(words)


def test_a_reserved_token_that_has_a_meaning_is_not_spare() -> None:
    words = words_with("<unused0>", pad_token="<unused0>")
    with pytest.raises(CheckpointError, match="no token of its vocabulary is reserved or unused by its name and free"):
        choose_mask(words, "reserved")
    with pytest.raises(OptionError, match="'<unused0>' is the tokenizer's pad_token"):
        choose_mask(words, "<unused0>")


@pytest.mark.parametrize(
    ("name", "token"),
    [("Llama 3", "<|eot_id|>"), ("Llama 3", "<|start_header_id|>"), ("Qwen2.5", "<|im_start|>"), ("Qwen2.5", "a")],
)
def test_what_stands_in_chat_templates_is_no_mask(name: str, token: str) -> None:
    tokens, template, named, _ = LIKE[name]
    words = autoregressive.tokenizer(*tokens, template=template, **named)
    choose_ends(words)
    with pytest.raises(OptionError, match=f"{re.escape(token)}' stands in chat templates"):
        choose_mask(words, token)


def test_a_reserved_token_that_opens_turns_is_no_mask() -> None:
    words = words_with("<unused0>", "<unused1>")
    words.chat_template = "{% for m in messages %}<unused0>{{ m['content'] }}</s>{% endfor %}"
    assert choose_mask(words).token == "<unused1>"


def test_no_name_is_left_for_a_new_mask() -> None:
    words = words_with(*APPENDED)
    message = r"no name for a new mask token: the vocabulary has <\|mdm_mask\|>, .* --mask_token '<\|mdm_mask\|>'"
    with pytest.raises(CheckpointError, match=message):
        choose_mask(words, "append")


def test_no_end_at_all() -> None:
    with pytest.raises(CheckpointError, match="has no end-of-text token"):
        choose_ends(autoregressive.tokenizer("<s>", bos_token="<s>"))
