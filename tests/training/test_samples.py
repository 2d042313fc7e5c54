"""Samples while a model trains: when, of what, and that training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training.commands import PRETRAIN, SFT, Done, equal, weights

from dllm.errors import OptionError
from dllm.pipelines import llada
from dllm.training.samples import encode_prompts


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_are_written_and_training_does_not_notice(
    pretrained: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sample_every", "2", "--sample_prompt", "1+", "2", "--sample_length", "4"]
    final = llada.pretrain([*PRETRAIN, *options, "--output_dir", str(tmp_path / "run")])
    assert equal(weights(final), weights(pretrained.final))
    rows = samples(tmp_path / "run")
    assert [(row["step"], row["prompt"]) for row in rows] == [(2, "1+"), (2, "2"), (4, "1+"), (4, "2")]
    assert f"step 4  '2' -> {rows[3]['text']!r}" in capsys.readouterr().out
    model, tokenizer = llada.load_model(str(final)), llada.load_tokenizer(str(final))
    assert rows[3]["text"] == llada.generate(model, tokenizer, ["2"], gen_length=4, steps=4).texts[0]


def test_a_resumed_run_samples_nothing_twice(copied: Path) -> None:
    kept = [{"step": 2, "prompt": "a", "text": "b"}, {"step": 4, "prompt": "a", "text": "c"}]
    (copied / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"step": 5, "pro')
    options = ["--sample_every", "2", "--sample_length", "4", "--resume_from_checkpoint", str(copied / "checkpoint-2")]
    llada.pretrain([*PRETRAIN, *options, "--output_dir", str(copied)])
    rows = samples(copied)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0] == kept[0]
    assert rows[1] != kept[1]


def test_fine_tuning_samples_answers(tmp_path: Path) -> None:
    common = [*SFT, "--max_steps", "1", "--sample_every", "1", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(OptionError, match=r"--sample_length 999: with a prompt of \d+ tokens that exceeds the model's"):
        llada.sft([*common, "--sample_length", "999"])
    llada.sft([*common, "--sample_length", "6"])
    (row,) = samples(tmp_path / "run")
    assert row["prompt"].count("assistant") == 1


def test_prompts_are_texts_messages_or_the_beginning_of_a_row(tokenizer: Any) -> None:
    row = {"input_ids": list(range(40)), "turns": [7, 12]}
    room = {"row": row, "length": 8, "context": 64}
    assert encode_prompts(tokenizer, [], chat=False, **room) == [list(range(16))]
    assert encode_prompts(tokenizer, [], chat=True, **room) == [list(range(7))]
    (text,) = encode_prompts(tokenizer, ["1+1"], chat=False, **room)
    assert tokenizer.decode(text) == "1+1"
    (chat,) = encode_prompts(tokenizer, ["1+1"], chat=True, **room)
    assert tokenizer.decode(chat).count("1+1") == 1
    assert len(chat) > len(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample_prompt", "a"], "--sample_prompt needs --sample_every K"),
        (["--sample_every", "-1"], "--sample_every -1: it is 0 or more"),
        (["--sample_length", "0"], "--sample_length 0: it is 1 or more"),
        (["--report_to", "tensorbord"], "--report_to 'tensorbord' does not exist. Did you mean 'tensorboard'?"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    argv = [word for word in PRETRAIN if options[0] != "--report_to" or word not in ("--report_to", "none")]
    with pytest.raises(OptionError) as refused:
        llada.pretrain([*argv, *options, "--output_dir", str(tmp_path / "run")])
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()
