"""`dllm prepare`: what it writes is what training would have made, and what does not fit is refused."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from system.workshop import write_jsonl
from training.commands import SHAPE

from dllm.cli.main import main
from dllm.data.columns import ColumnNames
from dllm.data.maps import pretraining_rows, sft_rows
from dllm.data.sources import load_splits
from dllm.pipelines.llada import load_tokenizer
from dllm.pipelines.llada.tokenizer import bpe_tokenizer, char_tokenizer
from dllm.training.callbacks import read_log

RUN = [
    "--config_overrides",
    SHAPE,
    "--max_steps",
    "2",
    "--bf16",
    "False",
    "--logging_steps",
    "1",
    "--report_to",
    "none",
]


def write_texts(folder: Path) -> None:
    write_jsonl(folder / "texts.jsonl", [{"text": f"{n} and {n + 1} make {2 * n + 1}. "} for n in range(40)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    talk = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    write_jsonl(tmp_path / "talks.jsonl", [{"conversations": talk * (1 + n % 3)} for n in range(30)])
    return tmp_path


@pytest.mark.system  # processes that import all anew
def test_several_processes_prepare_parts(here: Path, capsys: Any) -> None:
    data = ["--dataset_args", "texts.jsonl[test:5]", "--max_length", "16"]
    assert main(["prepare", "pretrain", *data, "--num_proc", "2", "--output_dir", "rows"]) == 0
    assert re.search(r"\d+ training and \d+ test rows of 16 tokens at most in rows", capsys.readouterr().out)
    source, _ = load_splits("texts.jsonl[test:5]", column="text")
    stored = datasets.load_from_disk("rows")
    tokens = [t for row in pretraining_rows(source, char_tokenizer(), 16)["input_ids"] for t in row]
    assert 0 < len(stored["train"]) <= len(tokens) // 16  # each process drops a tail of its own
    assert len(stored["train"].cache_files) == 2
    assert not Path("rows.unfinished").exists()


def test_pretraining_from_prepared_rows_is_pretraining_from_the_source(here: Path, capsys: Any) -> None:
    data = ["--dataset_args", "texts.jsonl[test:5]", "--max_length", "16"]
    assert main(["prepare", "pretrain", *data, "--output_dir", "whole"]) == 0
    assert re.search(r"\d+ training and \d+ test rows of 16 tokens at most in whole", capsys.readouterr().out)
    assert not Path("whole.unfinished").exists()
    assert main(["pretrain", *data, *RUN, "--output_dir", "one"]) == 0
    assert main(["pretrain", "--load_preprocessed_data", "whole", *RUN, "--output_dir", "other"]) == 0
    losses = [
        [row["loss"] for row in read_log(here / name / "log.jsonl") if "loss" in row] for name in ("one", "other")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_trained_tokenizer_stays_with_the_rows(here: Path) -> None:
    bpe = ["--tokenizer_name_or_path", "bpe:270", "--max_length", "8", "--dataset_args", "texts.jsonl"]
    assert main(["prepare", "pretrain", *bpe, "--output_dir", "rows"]) == 0
    assert main(["pretrain", "--load_preprocessed_data", "rows", *RUN, "--output_dir", "run"]) == 0
    tokenizer, own = load_tokenizer("rows/tokenizer"), load_tokenizer("run/checkpoint-final")
    assert tokenizer.get_vocab() == own.get_vocab()


def test_conversations_are_prepared_as_asked(here: Path) -> None:
    options = ["--dataset_args", "talks.jsonl", "--turns", "all", "--truncation", "filter", "--max_length", "48"]
    assert main(["prepare", "sft", *options, "--output_dir", "rows"]) == 0
    source, _ = load_splits("talks.jsonl", column="messages", names=ColumnNames(messages="conversations"))
    tokenizer = load_tokenizer("builtin:sudoku9")
    expected = sft_rows(source, tokenizer, 48, turns="all", truncation="filter")
    assert datasets.load_from_disk("rows")["train"].to_list() == expected.to_list()
    manifest = json.loads(Path("rows/prepared.json").read_text())
    assert (manifest["task"], manifest["truncation"], manifest["turns"]) == ("sft", "filter", "all")
    run = ["sft", "--load_preprocessed_data", "rows", "--max_steps", "1", "--bf16", "False", "--report_to", "none"]
    assert main([*run, "--output_dir", "run"]) == 0


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared rows of texts.jsonl; not to be changed."""
    folder = tmp_path_factory.mktemp("prepared")
    write_texts(folder)
    data = ["--dataset_args", "texts.jsonl", "--max_length", "16"]
    with contextlib.chdir(folder):
        assert main(["prepare", "pretrain", *data, "--output_dir", "rows"]) == 0
    return folder / "rows"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--load_preprocessed_data", "none"], "none holds no prepared data (prepared.json is not there)."),
        (["sft", "--load_preprocessed_data", "rows"], "rows was prepared for dllm pretrain, and this is dllm sft."),
        (
            ["pretrain", "--load_preprocessed_data", "rows", "--max_length", "12"],
            "rows was prepared with --max_length 16, and this run has 12. Leave the option out, or run dllm prepare",
        ),
        (
            ["pretrain", "--load_preprocessed_data", "rows", "--dataset_args", "other.jsonl"],
            "rows was prepared with --dataset_args texts.jsonl, and this run has other.jsonl.",
        ),
        (
            ["pretrain", "--load_preprocessed_data", "rows", "--tokenizer_name_or_path", "other"],
            "rows was prepared with another tokenizer than this run's. Its own is in rows/tokenizer;",
        ),
        (["prepare", "stf"], "'stf' is no task. Did you mean 'sft'?"),
        (["prepare", "pretrain", "--lenght", "3"], "There is no option '--lenght'."),
        (["prepare", "pretrain"], "Give --output_dir, the folder to write."),
        (["prepare", "pretrain", "--output_dir", "rows"], "--output_dir rows is there already: name another folder"),
        (
            ["prepare", "pretrain", "--output_dir", "texts.jsonl/x"],
            "texts.jsonl/x cannot be written: File exists. Name",
        ),
        (
            ["prepare", "pretrain", "--output_dir", "x", "--streaming"],
            "A stream is not prepared but read while training",
        ),
        (
            ["prepare", "pretrain", "--output_dir", "x", "--turns", "all"],
            "--turns: it is for fine-tuning",
        ),
        (
            ["prepare", "sft", "--output_dir", "x", "--turns", "each"],
            "--turns 'each' does not exist: it is drawn or all",
        ),
        (
            ["prepare", "sft", "--output_dir", "x", "--max_length", "600"],
            "--max_length 600 exceeds the model's context",
        ),
    ],
)
def test_what_does_not_fit_is_refused(here: Path, rows: Path, capsys: Any, arguments: list[str], message: str) -> None:
    shutil.copytree(rows, "rows")
    if "other" in arguments:
        bpe_tokenizer(["some text"], 270).save_pretrained("other")
    if "--output_dir" not in arguments and arguments[0] != "prepare":
        arguments = [*arguments, "--output_dir", "run"]
    if arguments[:2] == ["prepare", "pretrain"]:
        arguments = [*arguments[:2], "--dataset_args", "texts.jsonl", *arguments[2:]]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("x").exists()
    assert not Path("x.unfinished").exists()


def test_a_damaged_folder_is_refused(here: Path, capsys: Any) -> None:
    assert (
        main(["prepare", "pretrain", "--dataset_args", "texts.jsonl", "--max_length", "16", "--output_dir", "rows"])
        == 0
    )
    command = ["pretrain", "--load_preprocessed_data", "rows", "--output_dir", "run"]
    (shard,) = Path("rows/train").glob("*.arrow")
    shard.unlink()
    assert main(command) == 2
    assert "rows is damaged: " in capsys.readouterr().err
    Path("rows/prepared.json").write_text("{}")
    assert main(command) == 2
    assert "rows/prepared.json cannot be read ('task'). Run dllm prepare again." in capsys.readouterr().err
