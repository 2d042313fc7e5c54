"""`dllm chat`: a conversation whose history the model sees, its commands, and what is left out when the context is full."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from system.workshop import save_tiny_model

from dllm.cli import batches
from dllm.cli.chat import COMMANDS
from dllm.cli.main import main
from dllm.pipelines.llada import generate, load_model, load_tokenizer

TEXTS = ["the sea is grey and the sky is wide", "why is the sky blue?"]
OPTIONS: dict[str, Any] = {"gen_length": 6, "temperature": 1.0, "suppress_eos": True}
WORDS = ["--gen_length", "6", "--temperature", "1", "--suppress_eos"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its context is of 512 tokens."""
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", texts=TEXTS))


class Talk:
    """What was said to a `dllm chat` whose input is a pipe: its answers, its notes, its status."""

    def __init__(self, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.capsys, self.monkeypatch = model, capsys, monkeypatch

    def __call__(self, *lines: str, options: list[str] = WORDS, code: int = 0) -> tuple[str, list[str]]:
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", "--model_name_or_path", self.model, *options]) == code
        shown = self.capsys.readouterr()
        return shown.out, shown.err.splitlines()

    def answers(self, *conversation: str, system: str | None = None, **changes: Any) -> list[str]:
        """What the model says to each of these, one after the other, by the library."""
        loaded, tokenizer = load_model(self.model), load_tokenizer(self.model)
        messages = [] if system is None else [{"role": "system", "content": system}]
        found = []
        for turn, content in enumerate(conversation):
            messages.append({"role": "user", "content": content})
            found += generate(loaded, tokenizer, [messages], requests=[turn], **{**OPTIONS, **changes}).texts
            messages.append({"role": "assistant", "content": found[-1]})
        return found


@pytest.fixture
def talk(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    return Talk(model, capsys, monkeypatch)


def printed(answers: list[str]) -> str:
    return "".join(answer + "\n" for answer in answers)


def test_the_model_sees_the_conversation(talk: Talk) -> None:
    shown, notes = talk(TEXTS[0], "", "  ", TEXTS[1], TEXTS[1])
    expected = talk.answers(TEXTS[0], TEXTS[1], TEXTS[1])
    assert shown == printed(expected)
    assert notes == []
    assert expected[1] not in talk.answers(TEXTS[1], TEXTS[1]), "or the history would not show"


def test_the_system_text_comes_first_and_changing_it_begins_anew(talk: Talk) -> None:
    shown, notes = talk(TEXTS[0], "/system the sea", TEXTS[0], "/system", TEXTS[1], options=[*WORDS, "--system", "why"])
    loaded, tokenizer = load_model(talk.model), load_tokenizer(talk.model)
    expected = []
    for turn, (system, content) in enumerate((("why", TEXTS[0]), ("the sea", TEXTS[0]), (None, TEXTS[1]))):
        told = [{"role": "system", "content": system}] if system else []
        asked = [[*told, {"role": "user", "content": content}]]
        expected += generate(loaded, tokenizer, asked, requests=[turn], **OPTIONS).texts
    assert shown == printed(expected)
    assert notes == ["The conversation begins anew."] * 2


def test_clear_forgets_what_was_said(talk: Talk) -> None:
    greedy = ["0" if word == "1" else word for word in WORDS]  # the temperature
    shown, notes = talk(TEXTS[0], "/clear", TEXTS[1], options=greedy)
    assert shown == printed([*talk.answers(TEXTS[0], temperature=0.0), *talk.answers(TEXTS[1], temperature=0.0)])
    assert notes == ["The conversation begins anew."]


def test_the_same_question_may_be_answered_in_other_words(talk: Talk) -> None:
    shown, _ = talk(TEXTS[0], "/clear", TEXTS[0])
    first, second = talk.answers(TEXTS[0])[0], shown[len(talk.answers(TEXTS[0])[0]) + 1 : -1]
    assert shown.startswith(first)
    assert first != second


def test_options_are_set_while_talking(talk: Talk) -> None:
    shown, notes = talk(
        "/set",
        "/set temperature 0",
        "/set max_tokens 9",
        "/set suppress_eos false",
        "/set eos_last true",
        TEXTS[0],
        "/set",
    )
    changed = {"temperature": 0.0, "gen_length": 9, "suppress_eos": False, "eos_last": True}
    assert shown == printed(talk.answers(TEXTS[0], **changed))
    before = ["gen_length 6", "suppress_eos True", "temperature 1.0"]
    told = ["temperature is 0.0.", "gen_length is 9.", "suppress_eos is False.", "eos_last is True."]
    assert notes == [*before, *told, "eos_last True", "gen_length 9", "suppress_eos False", "temperature 0.0"]


def test_an_option_goes_back_to_its_default(talk: Talk) -> None:
    shown, notes = talk("/set temperature default", "/set block_length 3", "/set block_length default", TEXTS[0])
    assert shown == printed(talk.answers(TEXTS[0], temperature=0.0))
    assert notes[0] == "temperature is at its default."
    assert notes[2] == "block_length is at its default."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "There is no option '--temprature'. Did you mean '--temperature'?"),
        ("/set temprature default", "There is no sampling option 'temprature'. Did you mean 'temperature'?"),
        ("/set temperature", "/set temperature needs a value, or the word default."),
        ("/set temperature warm", "argument --temperature: invalid float value: 'warm'. See  /help"),
        ("/set temperature -1", "temperature=-1.0: it is 0 or more, a finite number"),
        ("/set gen_length 6 7", "Nothing is known of '7'. See  /help"),
        ("/set block_length 64", "block_length=64 exceeds gen_length=6"),
        ("/set gen_length true", "expected one argument"),
        ("/sve x", "There is no command /sve. Did you mean '/save'?"),
        ("/save", "/save needs the name of a file."),
        ("/save nowhere/c.json", "nowhere/c.json cannot be written: "),
    ],
)
def test_a_mistake_is_a_note_and_the_conversation_goes_on(line: str, message: str, talk: Talk) -> None:
    shown, notes = talk(line, TEXTS[0])
    assert shown == printed(talk.answers(TEXTS[0]))
    assert len(notes) == 1
    assert message in notes[0]


def test_a_slash_may_begin_a_message(talk: Talk) -> None:
    assert talk("//exit")[0] == printed(talk.answers("/exit"))


def test_exit_ends_and_what_follows_is_not_answered(talk: Talk) -> None:
    assert talk("/exit", TEXTS[0]) == ("", [])
    assert talk() == ("", [])


def test_help_lists_the_commands(talk: Talk) -> None:
    _, notes = talk("/help")
    assert [note.split()[0] for note in notes] == list(COMMANDS)


def test_the_conversation_is_saved_and_no_file_is_lost(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "a talk.json"
    _, notes = talk(TEXTS[0], f"/save {path}", TEXTS[1], f"/save {path}", options=[*WORDS, "--system", "why"])
    (answer,) = talk.answers(TEXTS[0], system="why")
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "messages": [
            {"role": "system", "content": "why"},
            {"role": "user", "content": TEXTS[0]},
            {"role": "assistant", "content": answer},
        ]
    }
    assert notes == [f"Wrote 3 messages to {path}.", f"{path} is there already: name another file."]


def test_a_full_context_drops_the_oldest_exchanges_and_says_so(talk: Talk, tmp_path: Path) -> None:
    turns = [" ".join([TEXTS[0]] * 6)] * 8  # some 70 tokens each
    shown, notes = talk(*turns, f"/save {tmp_path / 'c.json'}", options=[*WORDS, "--system", "the sea"])
    assert shown.count("\n") >= 8
    dropped = [int(re.findall(r"does not see the (\d+) oldest messages", note)[0]) for note in notes[:-1]]
    assert dropped
    assert dropped == sorted(dropped)
    assert all(count % 2 == 0 for count in dropped)
    messages = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert len(messages) == 17, "what is saved is the whole conversation"
    loaded, tokenizer = load_model(talk.model), load_tokenizer(talk.model)
    asked = [messages[0], *messages[1 + dropped[-1] : -1]]
    assert generate(loaded, tokenizer, [asked], requests=[7], **OPTIONS).texts == [messages[-1]["content"]]
    longer = [messages[0], *messages[1 + dropped[-1] - 2 : -1]]
    length = len(tokenizer.apply_chat_template(longer, add_generation_prompt=True)["input_ids"])
    assert length + OPTIONS["gen_length"] > 512, "no more is left out than has to be"


def test_a_message_that_does_not_fit_alone_is_refused_and_taken_out(talk: Talk) -> None:
    shown, notes = talk(TEXTS[0], "word " * 200, TEXTS[1])
    assert len(notes) == 1
    refused = (
        r"The message \(\d+ tokens\) and gen_length=6 need \d+ positions, and the model's context is 512: shorten .*"
    )
    assert re.fullmatch(refused, notes[0])
    loaded, tokenizer = load_model(talk.model), load_tokenizer(talk.model)
    first = talk.answers(TEXTS[0])[0]
    asked = [
        {"role": "user", "content": TEXTS[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": TEXTS[1]},
    ]
    assert shown == printed([first, *generate(loaded, tokenizer, [asked], requests=[1], **OPTIONS).texts])


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm.cli.chat import Chat

    written = Chat._write

    def interrupted(self: Chat, prompt: Any) -> str:
        if self.messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        return written(self, prompt)

    monkeypatch.setattr(Chat, "_write", interrupted)
    shown, notes = talk(TEXTS[0], "stop", TEXTS[1])
    assert shown == printed(talk.answers(TEXTS[0], TEXTS[1]))
    assert notes == ["Stopped: this answer and its question are taken out of the conversation."]


def test_bytes_that_are_no_text_are_left_out(talk: Talk) -> None:
    shown, notes = talk("a\udcff", TEXTS[0])
    assert shown == printed(talk.answers(TEXTS[0]))
    assert notes == ["This message holds bytes that are no text in UTF-8: it is left out."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --model_name_or_path"),
        (["--model_name_or_path", "builtin:sudoku9"], "builtin:sudoku9 writes sudoku grids and nothing else"),
        (["--model_name_or_path", "here", "--temperature", "-1"], "temperature=-1.0: it is 0 or more"),
        (["--model_name_or_path", "here", "--block_length", "999"], "block_length=999 exceeds gen_length=128"),
        (["--model_name_or_path", "./nowhere"], "There is no model folder './nowhere'"),
    ],
)
def test_what_is_wrong_is_said_at_once(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_chat_template_does_not_talk(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    tokenizer.chat_template = None
    monkeypatch.setattr(batches, "load", lambda arguments: (loaded, tokenizer))
    assert main(["chat", "--model_name_or_path", model]) == 2
    assert "has no chat template: it was not made to talk. Use  dllm generate" in capsys.readouterr().err
