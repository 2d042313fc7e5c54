"""`dllm pretrain` and `dllm sft` from the command line: from data to a model that writes, and what they print."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from system.workshop import write_jsonl

from dllm.cli.main import main
from dllm.pipelines.llada import load_model, load_tokenizer
from dllm.training.callbacks import log_line, read_log

SMALL = ["--config_overrides", "n_layers=1,d_model=32,mlp_hidden_size=64", "--max_length", "32", "--max_steps", "4"]
DOCUMENTS: list[dict[str, Any]] = [{"text": f"{n} and {n + 1} make {2 * n + 1}. " * 4} for n in range(40)]
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(40)
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)
    write_jsonl(tmp_path / "talks.jsonl", TALKS)
    return tmp_path


def test_pretrain_sft_generate(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = ["--dataset_args", "documents.jsonl[train:30,test:5]", "--logging_steps", "2"]
    assert main(["pretrain", *SMALL, *data, "--output_dir", "text"]) == 0
    shown = capfd.readouterr()
    assert shown.err == "", "bars are for terminals"
    lines = shown.out.splitlines()
    assert re.fullmatch(
        r"pretrain: [\d,]+ parameters, \d+ rows; a step is 1 process x 8 samples x 1 accumulated; \w+ on \w+", lines[0]
    )
    assert re.fullmatch(
        r"step 2/4  loss \d\.\d{4}  gradient [\d.e-]+  rate [\d.e-]+  [\d.]+k? tokens/s  .+ left", lines[1]
    )
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["step 2/4", "step 4/4", "step 4/4", "step 4/4"]
    assert re.search(r"trained in [\d.]+ s, mean loss \d\.\d{4}$", lines[3])
    assert re.search(r"loss \d\.\d{4} on unseen rows  perplexity", lines[4])
    assert lines[-1] == "Saved the model and its tokenizer to text/checkpoint-final"

    data = ["--dataset_args", "talks.jsonl", "--max_length", "32", "--max_steps", "4", "--output_dir", "chat"]
    assert main(["sft", "--model_name_or_path", "text/checkpoint-final", *data]) == 0
    assert "sft: " in capfd.readouterr().out
    assert sorted(path.name for path in (here / "chat").iterdir()) == [
        "checkpoint-4",
        "checkpoint-final",
        "log.jsonl",
        "losses.png",
        "run.json",
        "runs",
        "trainer_state.json",
    ]

    command = ["generate", "--model_name_or_path", "chat/checkpoint-final", "--json", "--gen_length", "3", "7?"]
    assert main(command) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["new_tokens"] == 3


def test_the_final_model_comes_with_its_tokenizer_and_without_pickles(here: Path) -> None:
    bpe = ["--tokenizer_name_or_path", "bpe:300", "--dataset_args", "documents.jsonl"]
    assert main(["pretrain", *SMALL, *bpe, "--output_dir", "out"]) == 0
    final = here / "out/checkpoint-final"
    assert {path.suffix for path in final.iterdir()} <= {".json", ".jinja", ".safetensors"}
    model, tokenizer = load_model(str(final)), load_tokenizer(str(final))
    # the merges that 40 short documents offer may be fewer
    assert model.config.vocab_size == len(tokenizer) <= 300
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert tokenizer.decode(tokenizer("7 and 8 make 15.")["input_ids"]) == "7 and 8 make 15."


def test_a_folder_that_is_not_empty_is_left_alone_unless_it_is_gone_on_with(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", *SMALL, "--dataset_args", "documents.jsonl", "--output_dir", "out", "--logging_steps", "1"]
    assert main([*command, "--max_steps", "2"]) == 0
    before = sorted(path.stat().st_mtime_ns for path in (here / "out").rglob("*"))
    capfd.readouterr()
    assert main(command) == 2
    assert "--output_dir out is not empty" in capfd.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in (here / "out").rglob("*")) == before

    assert main([*command, "--resume_from_checkpoint", "auto"]) == 0
    assert [row["step"] for row in read_log(here / "out/log.jsonl") if "loss" in row] == [1, 2, 3, 4]
    assert "step 1/" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--dataset_args", "nothing.jsonl"], "There is no file nothing.jsonl"),
        (["pretrain", "--dataset_args", "documents.jsonl[training:3]"], "no key 'training'. Did you mean 'train'?"),
        (
            ["pretrain", "--dataset_args", "rows.csv"],
            "rows.csv, line 2: there is no column 'text'; it has id, txt. Did you mean 'txt'",
        ),
        (["pretrain", "--dataset_args", "torn.jsonl"], r"torn.jsonl, line 2: not JSON \(.*Mend or remove the line"),
        (["pretrain", "--model_name_or_path", "teeny"], "There is no model folder 'teeny'.* preset .*tiny"),
        (["pretrain", "--config_overrides", "layers=2"], "there is no key 'layers'. Did you mean 'n_layers'?"),
        (["pretrain", "--tokenizer_name_or_path", "bpe:many"], "write bpe:N with the number of entries"),
        (["pretrain", "--random_length", "2"], "--random_length 2.0: it is a share"),
        (["pretrain", "--optimizer", "adam"], "--optimizer 'adam' does not exist: it is adamw or muon"),
        (["sft", "--model_name_or_path", "tiny"], "'tiny' is a shape without weights: pretrain it first"),
        (["sft", "--model_name_or_path", "."], "has no config.json: it is not a checkpoint"),
        (["sft", "--max_length", "4096"], "--max_length 4096 exceeds the model's context of 512"),
        (["pretrain", "--output_dir", "documents.jsonl"], "--output_dir documents.jsonl is a file: name a folder"),
        (["pretrain", "--resume_from_checkpoint", "absent"], "absent: that is no checkpoint folder. Say auto"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_trained(
    arguments: list[str], message: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "rows.csv").write_text("id,txt\n1,a\n")
    (here / "torn.jsonl").write_text('{"text": "whole"}\n{"text": "to')
    command, *rest = arguments
    data = ["--dataset_args", "documents.jsonl"] if command == "pretrain" else []
    assert main([command, "--max_length", "32", *data, "--output_dir", "out", *rest]) == 2
    shown = capfd.readouterr()
    assert re.search(message, shown.err), shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not (here / "out").exists() or not list((here / "out").iterdir())


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        (
            {"loss": 1.5, "grad_norm": 0.25, "learning_rate": 3e-4, "epoch": 1},
            "loss 1.5000  gradient 0.25  rate 0.0003",
        ),
        ({"loss": 1.5}, "loss 1.5000"),
        ({"eval_loss": 2.0, "eval_runtime": 3.0}, "loss 2.0000 on unseen rows"),
        ({"train_loss": 2.0, "train_runtime": 61.26}, "trained in 61.3 s, mean loss 2.0000"),
        ({"other": 2.0, "word": "no number"}, "other 2"),
    ],
)
def test_a_logged_step_is_one_line_of_words(logs: dict[str, Any], words: str) -> None:
    assert log_line(7, 10, logs) == f"step 7/10  {words}"


def test_packed_rows_and_switches_without_a_value(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sft", "--dataset_args", "talks.jsonl", "--max_length", "64", "--packing", "--bf16", "--max_steps", "2"]
    command += ["--per_device_train_batch_size", "2"]
    assert main([*command, "--output_dir", "packed", "--logging_steps", "1"]) == 0
    shown = capfd.readouterr().out
    assert "bf16 on cpu" in shown
    assert "step 2/2  loss " in shown
    assert main([*command, "--output_dir", "packed", "--resume_from_checkpoint"]) == 0
    record = json.loads((here / "packed" / "run.json").read_text(encoding="utf-8"))
    assert "checkpoint-2" in str(record)


def test_a_secret_does_not_reach_the_record(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        "sft",
        "--dataset_args",
        "talks.jsonl",
        "--max_length",
        "64",
        "--max_steps",
        "1",
        "--output_dir",
        "secret",
    ]
    monkeypatch.setattr("sys.argv", ["dllm", *command, "--hub_token", "hf_one", "--push_to_hub_token=hf_two"])
    assert main(command) == 0
    record = (here / "secret" / "run.json").read_text(encoding="utf-8")
    assert "--hub_token" in record
    assert "hf_one" not in record
    assert "hf_two" not in record
