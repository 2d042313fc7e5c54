"""Tokenizers: each special token is one id, the chat template is LLaDA's, and text comes back as it went in."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dllm.errors import CheckpointError
from dllm.pipelines import llada
from dllm.pipelines.llada.tokenizer import (
    BOS,
    EOS,
    EOT,
    MASK,
    MASK_SPELLINGS,
    SPECIAL_TOKENS,
    bpe_tokenizer,
    char_tokenizer,
    name_end_of_turn,
    prepare_tokenizer,
)

PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " \n"
CHAR, BPE = char_tokenizer(), bpe_tokenizer(["the cat sat on the mat, the rat sat on the hat. " * 5], 275)
made = pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def base_like(
    tokens: tuple[str, ...] = SPECIAL_TOKENS,
    extra: tuple[str, ...] = (MASK,),
    eos: str | None = EOS,
    mask: str | None = None,
) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer as Base checkpoints have: all of `tokens` in the vocabulary, and few of them declared."""
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(entries)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, mask_token=mask, extra_special_tokens=list(extra)
    )


def assert_ready(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    for token in SPECIAL_TOKENS:
        assert ids_of(tokenizer, token) == [vocabulary[token]], token
        assert ids_of(tokenizer, f"a{token}b") == [*ids_of(tokenizer, "a"), vocabulary[token], *ids_of(tokenizer, "b")]
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.eot_token_id)
    assert named == tuple(vocabulary[token] for token in (BOS, EOS, MASK, EOT))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.eot_token == EOT


@made
def test_special_tokens_are_one_id_each(tokenizer: PreTrainedTokenizerBase) -> None:
    assert_ready(tokenizer)
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(6))
    assert tokenizer.decode(list(range(6)), skip_special_tokens=True) == ""


def test_the_embedded_tokenizer_is_ready() -> None:
    tokenizer = llada.load_tokenizer("builtin:sudoku9")
    assert_ready(tokenizer)
    assert tokenizer.get_vocab() == CHAR.get_vocab()


CONVERSATION = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": " 2 "},
    {"role": "user", "content": "\n2+1?"},
    {"role": "assistant", "content": "3, or\nso"},
]


@made
def test_the_chat_template_is_lladas(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert text == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n3, or\nso<|eot_id|>"
    )
    assert ids_of(tokenizer, text) == tokenizer.apply_chat_template(CONVERSATION, tokenize=True)["input_ids"]


@made
def test_the_generation_prompt_comes_when_it_is_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = CONVERSATION[:2]
    plain = tokenizer.apply_chat_template(turns, tokenize=False)
    assert plain == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == plain + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    longer = tokenizer.apply_chat_template(CONVERSATION[:3], tokenize=False)
    assert longer.startswith(asked), "what is generated continues exactly what training has seen"


@made
def test_the_assistant_mask_covers_content_and_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    done = tokenizer.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said, run = [], []
    for token, ours in zip([*done["input_ids"], 0], [*done["assistant_masks"], 0], strict=True):
        if ours:
            run.append(token)
        elif run:
            said.append(tokenizer.decode(run))
            run = []
    assert said == ["2<|eot_id|>", "3, or\nso<|eot_id|>"]


@given(text=st.text(PRINTABLE, max_size=80))
def test_characters_round_trip(text: str) -> None:
    ids = ids_of(CHAR, text)
    assert CHAR.decode(ids) == text
    assert len(ids) == len(text) or "<|" in text  # a special token written out is one id
    assert CHAR.unk_token_id not in ids


@given(text=st.text(st.characters(exclude_characters=PRINTABLE, exclude_categories=["Cs"]), min_size=1, max_size=8))
def test_a_character_that_is_not_there_is_unknown(text: str) -> None:
    assert ids_of(CHAR, text) == [CHAR.unk_token_id] * len(text)


@given(text=st.text(max_size=60))
def test_bpe_round_trips_any_text(text: str) -> None:
    assert BPE.decode(ids_of(BPE, text)) == text


def test_bpe_learns_the_words_of_its_texts() -> None:
    assert len(BPE) == 275
    assert len(ids_of(BPE, " the cat sat")) < 6
    assert len(ids_of(BPE, " qzj xkv wpf")) > 10


def test_bpe_has_room_for_all_bytes_or_says_so() -> None:
    smallest = bpe_tokenizer(["a b"], 262)
    assert smallest.decode(ids_of(smallest, "naïve 💡")) == "naïve 💡"
    with pytest.raises(CheckpointError, match=r"bpe:261 is too small: 262 entries hold the bytes and special tokens"):
        bpe_tokenizer(["a b"], 261)


@made
def test_a_saved_tokenizer_loads_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = llada.load_tokenizer(str(tmp_path))
    assert_ready(again)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    text = f"The cat, 12 + 3 = 15.\n\n  x{EOT}ü"
    assert ids_of(again, text) == ids_of(tokenizer, text)
    assert again.decode(ids_of(again, text)) == tokenizer.decode(ids_of(tokenizer, text))
    assert llada.load_tokenizer(tmp_path).get_vocab() == again.get_vocab()


def test_a_template_and_an_end_of_turn_of_its_own_stay(tmp_path: Path) -> None:
    own = base_like((*SPECIAL_TOKENS, "<|done|>"), (MASK, EOT))
    own.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}<|done|>{% endgeneration %}{% endfor %}"
    )
    name_end_of_turn(own, "<|done|>")
    own.save_pretrained(tmp_path)
    again = llada.load_tokenizer(tmp_path)
    assert (again.eot_token, again.eot_token_id) == ("<|done|>", own.get_vocab()["<|done|>"])
    assert again.chat_template == own.chat_template


def test_a_base_tokenizer_is_repaired(tmp_path: Path) -> None:
    base = base_like()
    base.chat_template = "{{ messages }}"
    assert base.mask_token_id is None
    assert len(ids_of(base, EOT)) > 1, "the marker splits into subwords, which is what is to be repaired"
    before = base.get_vocab()
    base.save_pretrained(tmp_path / "base")
    repaired = llada.load_tokenizer(str(tmp_path / "base"))
    assert_ready(repaired)
    assert repaired.get_vocab() == before, "no token is added and none moves: they have embeddings"
    assert repaired.chat_template == CHAR.chat_template
    repaired.save_pretrained(tmp_path / "again")
    assert_ready(llada.load_tokenizer(str(tmp_path / "again")))


def test_a_mask_that_is_declared_nowhere_becomes_one_token() -> None:
    tokenizer = prepare_tokenizer(base_like(extra=()), "x")
    assert_ready(tokenizer)


@pytest.mark.parametrize("spelling", MASK_SPELLINGS)
def test_the_mask_is_found_however_it_is_spelt(spelling: str) -> None:
    tokenizer = prepare_tokenizer(base_like((EOS, spelling), ()), "x")
    assert tokenizer.mask_token == spelling
    assert ids_of(tokenizer, f"a{spelling}")[1:] == [tokenizer.get_vocab()[spelling]]


def test_a_declared_mask_is_kept() -> None:
    tokenizer = prepare_tokenizer(base_like((*SPECIAL_TOKENS, "<blank>"), (), mask="<blank>"), "x")
    assert tokenizer.mask_token_id == tokenizer.get_vocab()["<blank>"]


def test_without_chat_markers_the_template_is_left_alone() -> None:
    base = base_like((EOS, MASK), ())
    base.chat_template = "{{ messages }}"
    tokenizer = prepare_tokenizer(base, "x")
    assert tokenizer.chat_template == "{{ messages }}"
    assert getattr(tokenizer, "eot_token_id", None) is None
    assert set(tokenizer.get_vocab()) == set(base_like((EOS, MASK), ()).get_vocab())


def test_a_tokenizer_without_an_end_token_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"of 'some/model' has no end-of-text token \(eos_token\)"):
        prepare_tokenizer(base_like(eos=None), "some/model")


def test_a_tokenizer_without_a_mask_is_an_error() -> None:
    with pytest.raises(CheckpointError) as error:
        prepare_tokenizer(base_like((BOS, EOS), ()), "some/model")
    text = str(error.value)
    assert "The tokenizer of 'some/model' has no mask token" in text
    assert all(spelling in text for spelling in MASK_SPELLINGS)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere"])
def test_a_folder_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"No tokenizer could be loaded from '{name}'"):
        llada.load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada", "d_model": 64}), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"No tokenizer could be loaded from '.*': the folder has no tokenizer\.json"
    ):
        llada.load_tokenizer(str(tmp_path))


def test_a_mixture_ends_its_turns_with_role_end_and_keeps_its_template() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "<|mask|>": 1, "<|role_end|>": 2, "a": 3, "?": 4}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="?")
    made.chat_template = "{{ messages[0]['content'] }}"
    ready = prepare_tokenizer(made, "a mixture")
    assert (ready.mask_token_id, ready.eos_token_id, ready.pad_token_id, ready.eot_token_id) == (1, 0, 0, 2)
    assert ready("a<|role_end|><|mask|>", add_special_tokens=False)["input_ids"] == [3, 2, 1]
    assert ready.chat_template == "{{ messages[0]['content'] }}"
