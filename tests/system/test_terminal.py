"""What someone at a terminal sees; what goes into a file is tested in tests/cli."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
from system.workshop import BIN, environment, save_tiny_model, typed, write_jsonl

from dllm.training.callbacks import read_log

pytestmark = pytest.mark.system


def seen(*words: str, cwd: Path) -> list[str]:
    """All that a command writes to a terminal of 100 columns, each redrawn line by itself, without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", typed(words=list(words), cwd=cwd))
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_training_shows_one_bar_and_a_line_a_logged_step(tmp_path: Path) -> None:
    data = ["--dataset_args", "builtin:sudoku6[train:200,test:20]", "--max_length", "37", "--max_steps", "30"]
    small = ["--config_overrides", "n_layers=1,d_model=32,mlp_hidden_size=64", "--save_steps", "10"]
    lines = seen("pretrain", *data, *small, "--output_dir", "out", cwd=tmp_path)
    assert any(re.search(r"\d+%\|.*\| \d+/30 \[", line) for line in lines)
    said = [line for line in lines if re.match(r"step \d", line)]
    assert [line.split("  ")[0] for line in said] == [
        "step 10/30",
        "step 20/30",
        "step 30/30",
        "step 30/30",
        "step 30/30",
    ]
    assert lines[-1] == "Saved the model and its tokenizer to out/checkpoint-final"
    assert not [line for line in lines if "shards" in line or "{" in line or "Warning" in line]


def test_a_puzzle_fills_up_in_place(tmp_path: Path) -> None:
    lines = seen("generate", "--seed", "1", "--steps", "4", cwd=tmp_path)
    assert [line for line in lines if line.startswith("step")][:5] == [f"step {n} of 4" for n in range(5)]
    assert re.fullmatch(r"[1-9]{81}", lines[-1])
    assert "·" in lines[1]
    assert not [line for line in lines if "%|" in line], "the model inside loads in no time"


TEXTS = ["the sea is grey and the sky is wide", "why is the sky blue?"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_an_answer_takes_shape_in_a_chat_and_ctrl_c_stops_the_next(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny", texts=TEXTS)
    shown = typed(
        ("> ", "why?\n"),
        ("step 12 of 12[^>]*> ", "/set gen_length 400\n"),
        ("gen_length is 400[^>]*> ", "and then?\n"),
        ("step 5 of 400", "\x03"),
        ("Stopped: [^>]*> ", "\x03"),
        ("Ctrl-D or /exit ends[^>]*> ", "/set gen_length 7\n"),
        ("gen_length is 7[^>]*> ", "why not?\n"),
        ("step 7 of 7[^>]*> ", "/save talk.json\n"),
        ("Wrote 4 messages[^>]*> ", "\x04"),
        words=["chat", "--model_name_or_path", "tiny", "--gen_length", "12", "--suppress_eos"],
        cwd=tmp_path,
    )
    plain = CONTROL.sub("", shown)
    for step in range(13):
        assert f"step {step} of 12" in plain
    assert "·" * 12 in plain, "masks first"
    assert re.search(r"\x1b\[30;42m[^\x1b]", shown), "what a step commits stands out"
    assert re.search(r"\x1b\[2m·", shown), "masks are dim"
    (talk,) = read_log(tmp_path / "talk.json")
    assert [turn["content"] for turn in talk["messages"] if turn["role"] == "user"] == ["why?", "why not?"]
    assert "Traceback" not in plain


def test_a_file_of_answers_has_a_bar_on_a_terminal_alone_and_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny", texts=TEXTS)
    prompts = [{"prompt": text, "id": place} for place, text in enumerate(TEXTS * 100)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    words = ["generate", "--model_name_or_path", "tiny", "--prompts_file", "prompts.jsonl", "--gen_length", "16"]
    words += ["--batch_size", "4", "--temperature", "1"]
    lines = seen(*words, "--output", "whole.jsonl", cwd=tmp_path)
    assert lines[-1] == "whole.jsonl: 200 rows"
    assert [line for line in lines if re.search(r"200/200 rows ━+ 100%", line)]

    output, printed = tmp_path / "killed.jsonl", tmp_path / "killed.out"
    with (
        printed.open("w") as pipe,
        subprocess.Popen(
            [str(BIN / "dllm"), *words, "--output", output.name],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
        ) as killed,
    ):
        while not output.exists() or output.read_bytes().count(b"\n") < 8:
            assert killed.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        killed.kill()
    kept = output.read_bytes()
    assert 8 <= kept.count(b"\n") < 200
    assert "rows" not in printed.read_text()
    lines = seen(*words, "--quiet", "--output", output.name, cwd=tmp_path)
    assert not [line for line in lines if "/200 rows" in line]
    assert output.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    whole, resumed = (read_log(tmp_path / name) for name in ("whole.jsonl", output.name))
    assert [row["id"] for row in whole] == list(range(200))
    assert [(row["row"], row["text"]) for row in resumed] == [(row["row"], row["text"]) for row in whole]
    assert len({row["text"] for row in whole}) > 100
