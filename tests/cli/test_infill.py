"""`dllm infill`: blanks anywhere in a text are filled, and what is given stays."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from system.workshop import save_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm.cli import batches
from dllm.cli.main import main
from dllm.errors import OptionError
from dllm.pipelines.llada import infilling, load_model, load_tokenizer
from dllm.pipelines.llada.tokenizer import MASK, bpe_tokenizer, char_tokenizer
from dllm.sampling.blanks import brings_spaces, expand_blanks

TEXTS = ["the sea is grey and the sky is wide", "why is the sky blue?"]
BLANKS = "the [MASK:3] is grey and the [MASK:2]."
GRID = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
NOISY = ["--temperature", "1", "--suppress_eos"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", texts=TEXTS))


def records(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    assert main(["infill", *arguments, "--json"]) == code
    shown = capsys.readouterr()
    assert shown.err == ""
    return [json.loads(line) for line in shown.out.splitlines()]


parts = st.lists(st.text("ab [:]M.\n", max_size=8).filter(lambda text: "[M" not in text), min_size=1, max_size=5)


@given(parts, st.data())
def test_a_blank_is_its_number_of_masks_wherever_it_stands(texts: list[str], data: st.DataObject) -> None:
    written, expected = texts[0], texts[0]
    for text in texts[1:]:
        count = data.draw(st.integers(1, 12))
        written += f"[MASK:{count}]{text}"
        expected += "<m>" * count + text
    assert expand_blanks(written, "<m>") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a [MASK:0] b", r"\[MASK:0\] is no blank: its number of tokens is from 1 to 100000"),
        ("a [MASK:1000000] b", "its number of tokens is from 1 to 100000"),
        ("a [mask:3] b", r"'\[mask:3\]' is no blank\. Did you mean '\[MASK:3\]'"),
        ("a [MASK: 3] b", r"'\[MASK: 3\]' is no blank"),
        ("a [MASK:three] b", r"'\[MASK:three\]' is no blank"),
        ("a [MASK3] b [MASK:2]", r"'\[MASK3\]' is no blank"),
        ("a [MASK:-1] b", r"'\[MASK:-1\]' is no blank"),
        ("a [MASK] b", r"'\[MASK\]' is no token of this tokenizer\. Did you mean '\[MASK:1\]'"),
    ],
)
def test_what_was_meant_to_be_a_blank_is_an_error(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        expand_blanks(text, MASK)


@pytest.mark.parametrize("text", ["[masked] men", "unmask [it]", "x[MASKS]", "[a:3]"])
def test_words_are_words(text: str) -> None:
    assert expand_blanks(text, MASK) == text


def test_a_tokenizer_whose_mask_is_spelt_so_keeps_it() -> None:
    assert expand_blanks("a [MASK] [MASK:2]", "[MASK]") == "a [MASK] [MASK][MASK]"


def test_the_spans_are_filled_and_the_rest_stays(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    run = ["--model_name_or_path", model, *NOISY]
    plain = BLANKS.replace("[MASK:3]", MASK * 3).replace("[MASK:2]", MASK * 2)
    expected = infilling(loaded, tokenizer, [plain], temperature=1.0, suppress_eos=True)
    capsys.readouterr()  # loading shows a bar
    (row,) = records(capsys, *run, BLANKS)
    assert row["prompt"] == BLANKS
    assert row["text"] == expected.texts[0]
    assert (row["steps"], row["nfe"], row["new_tokens"]) == (5, 5, 5)
    ids = expected.sequences[0].tolist()
    holes = [place for place, token in enumerate(tokenizer(plain)["input_ids"]) if token == tokenizer.mask_token_id]
    assert row["spans"] == [tokenizer.decode([ids[place] for place in part]) for part in (holes[:3], holes[3:])]
    (same,) = records(capsys, *run, plain)
    assert (same["text"], same["spans"]) == (row["text"], row["spans"])


def test_texts_come_from_words_standard_input_and_files(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--model_name_or_path", model, *NOISY]
    texts = [BLANKS, "[MASK:1] sea", f"why {MASK}?"]
    expected = [row["text"] for row in records(capsys, *run, *texts)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    assert [row["text"] for row in records(capsys, *run, "-", "--batch_size", "2")] == expected
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"prompt": text, "id": text[:3]}) + "\n" for text in texts))
    rows = records(capsys, *run, "--prompts_file", str(tmp_path / "t.jsonl"))
    assert [row["text"] for row in rows] == expected
    assert [row["id"] for row in rows] == [text[:3] for text in texts]


def test_blanks_may_stand_in_a_conversation(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "it [MASK:2] is"}]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": turns}))
    (row,) = records(capsys, "--model_name_or_path", model, *NOISY, "--prompts_file", str(tmp_path / "t.jsonl"))
    assert row["new_tokens"] == 2
    assert len(row["spans"]) == 1
    assert row["text"] == f"user\n\nwhy?assistant\n\nit {row['spans'][0]} is"


def test_a_text_without_a_blank_fails_alone_in_a_file_and_ends_the_command_as_a_word(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("no blank here\n[MASK:1] sea\n[MASK:x] sea\n")
    run = ["--model_name_or_path", model, *NOISY]
    first, second, third = records(capsys, *run, "--prompts_file", str(tmp_path / "t.txt"), code=1)
    assert first["error"] == ("'no blank here' has no blank: write [MASK:3] for three tokens, or <|mdm_mask|> for one.")
    assert second["new_tokens"] == 1
    assert "'[MASK:x]' is no blank" in third["error"]
    assert main(["infill", *run, "no blank here"]) == 2
    assert "'no blank here' has no blank" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a text with blanks"),
        (["a [MASK:1]", "--gen_length", "3"], "--gen_length has no meaning for puzzles and texts with blanks"),
        (["a [MASK:1]", "--no-early_stop"], "--early_stop has no meaning for puzzles and texts with blanks"),
        (["a [MASK:1]", "--max_tokens", "3"], "--gen_length has no meaning for puzzles and texts with blanks"),
        (["a [mask:1]"], r"Did you mean '\[MASK:3\]'"),
        (["a [MASK:1]", "--raw"], "There is no option '--raw'"),
        (["a [MASK:1]", "--output", "nowhere/a.jsonl"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batches, "load", lambda arguments: pytest.fail("the model was loaded"))
    assert main(["infill", "--model_name_or_path", "here", *arguments]) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err)
    assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_without_a_model_texts_are_puzzles(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = records(capsys, GRID[:72] + "[MASK:9]")
    assert (row["prompt"], row["text"], row["solved"]) == (GRID[:72] + "." * 9, GRID, True)
    (row,) = records(capsys, GRID[:5] + "[MASK:2]" + GRID[7:40] + "." + GRID[41:])
    assert (row["text"], row["new_tokens"]) == (GRID, 3)
    (unseen,) = records(capsys, "--seed", "1", "--steps", "1")
    assert unseen["prompt"].count(".") > 30
    assert main(["infill", "[MASK:3]"]) == 2
    assert "'...' has 3 characters" in capsys.readouterr().err


def test_for_people_the_filled_text_is_printed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--model_name_or_path", model, *NOISY, BLANKS, "[bold][MASK:1]"]
    rows = records(capsys, *run)
    assert main(["infill", *run]) == 0
    assert capsys.readouterr().out == "".join(row["text"] + "\n" for row in rows)


def test_on_a_terminal_one_text_fills_up_and_its_spans_stand_out(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    run = ["--model_name_or_path", model, "--suppress_eos", BLANKS]
    (row,) = records(capsys, *run)
    assert main(["infill", *run]) == 0
    shown = capsys.readouterr().out
    plain = CONTROL.sub("", shown)
    assert [step for step in range(9) if f"step {step} of 5" in plain] == [0, 1, 2, 3, 4, 5]
    assert "the ··· is grey and the ··." in plain
    for span in row["spans"]:
        assert f"\x1b[32m{span}\x1b[0m" in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was [MASK:2] and [MASK:1].", "It was<m><m> and<m>."),
        ("It was[MASK:1]  [MASK:1] end", "It was<m> <m> end"),
        ("[MASK:1] [MASK:2]", "<m> <m><m>"),  # a space between two blanks keeps them apart
        (" [MASK:1]\n[MASK:1]", "<m>\n<m>"),
        ("a <m> b", "a <m> b"),
        ("as in [1] [MASK:2].", "as in [1]<m><m>."),
        ("<m> [MASK:1] <m>", "<m> <m> <m>"),
    ],
)
def test_the_space_before_a_blank_belongs_to_it_where_words_bring_theirs(text: str, expected: str) -> None:
    assert expand_blanks(text, "<m>", take_space=True) == expected


def test_words_of_byte_level_bpe_bring_their_space_and_characters_do_not() -> None:
    assert brings_spaces(bpe_tokenizer(["the sky is blue and a bird sings"] * 50, 300))
    assert not brings_spaces(char_tokenizer())
    pieces = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")]))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert brings_spaces(PreTrainedTokenizerFast(tokenizer_object=pieces))  # as Llama 2 and Mistral have it
