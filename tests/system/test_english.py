"""`dllm english` with a small source: from an autoregressive model to answers, again, stopped, and by the clock."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from system.workshop import BIN, ROOT, SBATCH, commands, environment, make_workshop, marked, run, typed
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dllm.cli import english
from dllm.data.builtin import builtin_rows
from dllm.training.callbacks import read_log

pytestmark = pytest.mark.system

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two layers and fresh weights, as transformers saves one."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    texts = [row["text"] for row in builtin_rows("wordnet", "train", 2000, column="text")]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=2000, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """Where it was run, the command, and what it showed."""
    folder = tmp_path_factory.mktemp("english")
    command = ["dllm", "english", "--source", str(source), "--steps", "20", "10"]
    return folder, command, run(command, folder)


def test_the_commands_of_docs_adapting(source: Path, tmp_path: Path) -> None:
    (block,) = marked(ROOT / "docs/adapting.md", "substituted")
    small = {
        "builtin:text": "builtin:text[train:20,test:2]",
        "allenai/tulu-3-sft-mixture[train:10000,test:1000]": "builtin:dialogues[train:16,test:2]",
        "1000": "3",
    }
    shutil.copytree(source, tmp_path / "HuggingFaceTB/SmolLM2-135M-Instruct")
    shown = ""
    for words in commands(block):
        shown += run([small.get(word, word) for word in words], tmp_path)
    assert shown.count("Saved the model and its tokenizer to models/smollm-") == 2
    assert "Traceback" not in shown
    (cluster,) = marked(ROOT / "docs/adapting.md", "slurm")
    assert "--continue_from_weights" in run(SBATCH + cluster.text, make_workshop(tmp_path))


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_log(folder / "log.jsonl") if "loss" in row]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_goes_from_a_source_to_answers(made: tuple[Path, list[str], str]) -> None:
    folder, _, shown = made
    out = folder / "runs/english"
    for part in ("1/4 adapt", "2/4 pretrain", "3/4 sft", "4/4 chat"):
        assert part in shown
    assert [step for step, _ in losses(out / "pretrained")] == [5, 10, 15, 20]  # each tenth, and with each checkpoint
    assert [step for step, _ in losses(out / "tuned")] == [3, 6, 9, 10]
    assert [path.name for path in out.glob("*/checkpoint-*")] == ["checkpoint-final"] * 2, (
        "others serve nobody any more"
    )
    for question in english.QUESTIONS:
        assert f"> {question}\n" in shown
    assert "Traceback" not in shown
    evaluated = [row for row in read_log(out / "tuned/log.jsonl") if "eval_loss" in row]
    assert evaluated, "there is a figure on rows that were not trained on"


def test_the_commands_that_it_shows_are_commands(made: tuple[Path, list[str], str]) -> None:
    folder, _, shown = made
    commands = re.findall(r"(?m)^  (dllm \w+ .*)$", shown)
    assert [line.split()[1] for line in commands] == ["adapt", "pretrain", "sft"]
    by_hand = commands[1].replace("runs/english/pretrained", "by_hand")
    run(by_hand, folder)
    assert weights(folder / "by_hand/checkpoint-final") == weights(folder / "runs/english/pretrained/checkpoint-final")


def test_a_second_run_starts_from_what_the_first_made(made: tuple[Path, list[str], str]) -> None:
    folder, command, _ = made
    out = folder / "runs/english"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    shown = run(command, folder)
    assert shown.count("is there already") == 3
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert f"> {english.QUESTIONS[0]}\n" in shown
    seen = typed(
        ("/help lists the commands.[^>]*> ", "hello\n"),
        ("step 0 of 48", ""),
        (r"\[\?25h[\s\S]*> ", "\x04"),
        words=command[1:],
        cwd=folder,
    )
    assert "4/4 chat" in seen
    assert "·" in seen, "masks, before there is text"
    refused = run([*command[:-2], "21", "10"], folder, code=2)
    assert "runs/english/pretrained was begun with 20 steps, and 21 are asked for." in refused


def test_a_training_that_was_stopped_goes_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [str(BIN / "dllm"), "english", "--source", str(source), "--steps", "120", "4", "--output_dir", str(out)]
    with (tmp_path / "shown").open("w") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment()
        )
    log = out / "pretrained/log.jsonl"
    while process.poll() is None and not (log.exists() and losses(out / "pretrained")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130, (tmp_path / "shown").read_text()
    shown = (tmp_path / "shown").read_text()
    assert "Saving what there is ..." in shown
    assert "dllm english: stopped." in shown
    (stopped,) = (out / "pretrained").glob("checkpoint-*")
    assert 10 <= int(stopped.name.split("-")[1]) < 120

    shown = run(command, tmp_path)
    assert "1/4 adapt" in shown
    steps = [step for step, _ in losses(out / "pretrained")]
    assert steps == sorted({*range(10, 121, 10), int(stopped.name.split("-")[1])}), "it is one run"
    assert stopped.name in (out / "pretrained/run.json").read_text()
    assert f"> {english.QUESTIONS[0]}\n" in shown


def test_a_clock_decides_on_the_steps(source: Path, tmp_path: Path) -> None:
    shown = run(["dllm", "english", "--source", str(source), "--minutes", "0.4", "0.3"], tmp_path)
    measured = [int(number) for number in re.findall(r"a step takes [\d.]+ s: (\d+) steps fit", shown)]
    plans = [json.loads((tmp_path / f"runs/english/{name}.json").read_text()) for name in ("pretrained", "tuned")]
    assert [plan["max_steps"] for plan in plans] == measured
    assert not list((tmp_path / "runs/english").glob("*.trial"))


def test_a_stage_that_fails_says_why(source: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/english/pretrained").mkdir(parents=True)
    (tmp_path / "runs/english/pretrained/mine.txt").write_text("precious")
    (tmp_path / "runs/english/lock").touch()
    shown = run(["dllm", "english", "--source", str(source), "--steps", "2", "2"], tmp_path, code=2)
    assert "dllm english: dllm pretrain ended with status 2: dllm pretrain: --resume_from_checkpoint auto: " in shown
    assert "All that it said is in runs/english/pretrained.txt." in shown
    shown += run(["dllm", "english", "--source", "nowhere", "--output_dir", "other"], tmp_path, code=2)
    assert "dllm english: dllm adapt ended with status 2: dllm adapt: " in shown
    assert "Traceback" not in shown
