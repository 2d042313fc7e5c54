"""Every command and every line of Python in README.md, run as it stands; those for 8 GPUs with small names in place of big."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from system.workshop import (
    ROOT,
    SBATCH,
    Block,
    blocks,
    commands,
    make_workshop,
    marked,
    run,
    save_tiny_model,
    write_jsonl,
)

from dllm.data.builtin import builtin_rows
from dllm.pipelines.llada import load_model, load_tokenizer
from dllm.training.callbacks import read_log

pytestmark = pytest.mark.system

README = ROOT / "README.md"
NOT_RUN = {
    "make demo": "installs, then runs `dllm demo`, which test_demo.py runs",
    "make english": "installs, then runs `dllm english`, which test_english.py runs on a small model",
    "make test": "would run this test again",
    ". .venv/bin/activate": "its second line is run below",
}

# What stands in place of what is too big. Folders that a command writes, and a later one reads, keep their names.
MODELS = {"GSAI-ML/LLaDA-8B-Base": "tiny-base", "GSAI-ML/LLaDA-8B-Instruct": "tiny-instruct"}
DATA = {
    "allenai/tulu-3-sft-mixture[train:10000,test:1000]": "conversations.jsonl[train:40,test:8]",
    "mlfoundations/dclm-baseline-1.0[train:10_000_000,test:10_000]": "documents.jsonl[train:1_50,test:1_0]",
}
# 8 GPUs, 10,000 steps: two processes of this processor, and 4 steps
CONFIG = "scripts/accelerate_configs/deepspeed_zero2.yaml"
STEPS = {"10000": "4"}


def substituted(words: list[str]) -> list[str]:
    tables = {"--model_name_or_path": MODELS, "--dataset_args": DATA, "--max_steps": STEPS}
    small = [words[0]] + [tables.get(option, {}).get(word, word) for option, word in itertools.pairwise(words)]
    if words[:4] == ["accelerate", "launch", "--config_file", CONFIG]:
        small[4:4] = ["--num_processes", "2"]
    return small


def gpu_commands() -> list[list[str]]:
    return [words for block in marked(README, "substituted") for words in commands(block)]


def test_every_block_is_run_or_listed() -> None:
    shown = [block for block in blocks(README) if block.language in ("bash", "python")]
    assert {block.language for block in blocks(README)} <= {"bash", "python", ""}
    left = [block for block in shown if block.marker is None]
    starts = [next((start for start in NOT_RUN if block.text.startswith(start)), None) for block in left]
    assert None not in starts, "mark the block with <!-- test: run -->, or list it in NOT_RUN"
    assert sorted(map(str, starts)) == sorted(NOT_RUN)
    assert len(left) < len(shown)
    assert {block.marker for block in shown} == {None, "run", "substituted", "slurm"}
    assert [block.language for block in shown if block.marker == "run"] == ["bash", "python", "python"]
    assert len(gpu_commands()) == 4


def test_every_big_name_has_a_small_one() -> None:
    given = {word for words in gpu_commands() for word in words if "/" in word}
    for table in (MODELS, DATA, [CONFIG]):
        assert set(table) <= given, "a name in this file that README.md does not show any more"
    used = {word for words in gpu_commands() for word in substituted(words)}
    assert not used & {*MODELS, *DATA}


@pytest.mark.parametrize("block", marked(README, "run"), ids=lambda block: f"line {block.line}")
def test_commands_run_as_they_stand(block: Block, tmp_path: Path) -> None:
    shown = run(block.text, make_workshop(tmp_path))
    assert "Saved the model and its tokenizer to models/text/checkpoint-final" in shown
    assert "Saved the model and its tokenizer to models/addition/checkpoint-final" in shown
    assert "Traceback" not in shown
    assert "Warning" not in shown


def test_the_commands_of_docs_sampling_run_as_they_stand(tmp_path: Path) -> None:
    (block,) = marked(ROOT / "docs/sampling.md", "run")
    shown = run(block.text, tmp_path)
    assert shown.count("│") == 2 * 9 * 4
    assert "9 blanks, 9 forwards: solved" in shown
    assert (tmp_path / "sudoku.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (engine,) = marked(ROOT / "docs/sampling.md", "run", "python")
    assert run(["python", "-c", engine.text], tmp_path).splitlines()[-1] == "345286179"


def test_slurm_commands_are_understood(tmp_path: Path) -> None:
    (block,) = marked(README, "slurm")
    assert block.text.count("sbatch --nodes=") == 3
    shown = run(SBATCH + block.text, make_workshop(tmp_path))
    commands_shown = [line for line in shown.splitlines() if line.startswith("command ")]
    assert len(commands_shown) == 3
    assert all("--max_length 1024" in line for line in commands_shown)
    assert shown.count("/deepspeed_zero2.yaml\n") == 3


def test_generate_alone_shows_a_grid(tmp_path: Path) -> None:
    (first,) = [block for block in blocks(README) if block.text.startswith(". .venv/bin/activate")]
    words = commands(first)[1]
    assert words == ["dllm", "generate"]
    shown = run(words, tmp_path)
    assert shown.count("│") == 9 * 4
    assert not list(tmp_path.iterdir())


def test_python_runs_as_it_stands(tmp_path: Path) -> None:
    block, engine = marked(README, "run", "python")
    lines = run(["python", "-c", f"{block.text}\n{engine.text}"], tmp_path).splitlines()
    continued, infilled, last = [line for line in lines if line and "Loading weights" not in line][-3:]
    grid = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
    assert grid in block.text
    assert continued == str([grid[72:]])
    assert infilled == str([grid])
    assert re.fullmatch(r"[1-9]{36} 19 steps for the other", last), last


def test_python_for_a_hub_id_runs_on_a_small_model(tmp_path: Path) -> None:
    (block,) = marked(README, "substituted", "python")
    name = "GSAI-ML/LLaDA-8B-Instruct"
    assert name in block.text
    save_tiny_model(tmp_path / MODELS[name], context=256)
    shown = run(["python", "-c", block.text.replace(f'"{name}"', f'"./{MODELS[name]}"')], tmp_path)
    assert "Traceback" not in shown


@pytest.fixture(scope="module")
def gpu_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The commands for 8 GPUs, run in README's order with small models and data: the folder, and what each printed."""
    folder = make_workshop(tmp_path_factory.mktemp("gpu_runs"))
    documents = builtin_rows("text", "train", 160, column="text")
    texts = [row["text"] for row in documents]
    write_jsonl(folder / "documents.jsonl", documents)
    write_jsonl(folder / "conversations.jsonl", builtin_rows("addition", "train", 48, column="messages"))
    for name in MODELS.values():
        save_tiny_model(folder / name, texts=texts, context=1024)
    return folder, [run(substituted(words), folder) for words in gpu_commands()]


def test_the_8_gpu_commands_end_with_a_checkpoint(gpu_runs: tuple[Path, list[str]]) -> None:
    folder, shown = gpu_runs
    trainings = [words for words in gpu_commands() if words[:2] == ["accelerate", "launch"]]
    assert len(trainings) == 3
    for words, printed in zip(trainings, shown, strict=False):
        assert "2 processes" in printed
        assert "DEEPSPEED stage 2" in printed
        made = folder / words[words.index("--output_dir") + 1]
        final = made / "checkpoint-final"
        assert load_tokenizer(str(final)).mask_token_id == load_model(str(final)).config.mask_token_id
        assert not [path.name for path in final.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
        losses = [row["loss"] for row in read_log(made / "log.jsonl") if "loss" in row]
        losses += [row["eval_loss"] for row in read_log(made / "log.jsonl") if "eval_loss" in row]
        assert losses
        assert all(math.isfinite(loss) for loss in losses)


def test_fine_tuning_starts_from_the_weights_and_pretraining_from_fresh_ones(gpu_runs: tuple[Path, list[str]]) -> None:
    folder, _ = gpu_runs
    sft, pt, second_sft = (words[words.index("--output_dir") + 1] for words in gpu_commands()[:3])

    def weights(path: str) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in load_model(str(folder / path)).parameters()])

    def apart(a: str, b: str) -> float:
        return float((weights(a) - weights(b)).norm() / weights(b).norm())

    base, pretrained = MODELS["GSAI-ML/LLaDA-8B-Base"], f"{pt}/checkpoint-final"
    assert 0 < apart(f"{sft}/checkpoint-final", base) < 0.1
    assert 0 < apart(f"{second_sft}/checkpoint-final", pretrained) < 0.1
    assert apart(pretrained, base) > 0.5


def test_the_sampling_command_answers_and_fills_blanks(gpu_runs: tuple[Path, list[str]]) -> None:
    _, shown = gpu_runs
    assert shown[-1].count("\n  -> ") == 4
    assert "batch of prompts" in shown[-1]
    assert "The capital of France is __, and the capital of Italy is __." in shown[-1]
    assert "<|mdm_mask|>" not in shown[-1]
