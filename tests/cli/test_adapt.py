"""`dllm adapt`: what it says, what is wrong in a line, and that what it wrote is trained and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from reference import autoregressive

from dllm.cli.main import main
from dllm.pipelines import llada


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    words = autoregressive.chatml_tokenizer()
    autoregressive.save(tmp_path / "source", autoregressive.model("llama", len(words)), words)
    return tmp_path


def test_it_says_what_was_chosen_and_what_to_do_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["adapt", "source", "--output_dir", "out", "--dtype", "bfloat16"]) == 0
    model = llada.load_model("out", dtype="auto")
    rows, mask = model.config.embedding_size, model.config.mask_token_id
    assert capsys.readouterr().out.splitlines() == [
        f"source: llama, 2 layers of width 32, {mask} rows of embedding",
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {rows} rows of embedding",
        f"mask           <|mdm_mask|> ({mask}, appended)",
        "end of text    <|endoftext|>",
        "end of turn    <|im_end|>",
        "chat template  the source's, marked for fine-tuning",
        "Wrote out. It has yet to learn to fill masks:",
        "dllm pretrain --model_name_or_path out --continue_from_weights --dataset_args DATA --output_dir OUT",
    ]
    assert str(model.dtype) == "torch.bfloat16"


def test_a_template_that_cannot_be_marked_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "source" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert main(["adapt", "source", "--output_dir", "out"]) == 0
    printed = capsys.readouterr().out
    assert "chat template  the source's, not marked\n" in printed
    assert "\nNote: The source's chat template could not be marked" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--output_dir", "out"], "There is no checkpoint 'nowhere'"),
        (["builtin:sudoku9", "--output_dir", "out"], "'builtin:sudoku9' is a LLaDA checkpoint already"),
        (["source", "--output_dir", "source"], "source is not empty: name a folder that does not exist."),
        (
            ["source", "--output_dir", "out", "--mask_token", "reserved"],
            "The tokenizer has no spare id: no token of its voc",
        ),
        (["source", "--output_dir", "out", "--mask"], "There is no option '--mask'. Did you mean '--mask_token'?"),
        (["source"], "the following arguments are required: --output_dir"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    before = sorted(here.rglob("*"))
    assert main(["adapt", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"dllm adapt: {message}")
    assert sorted(here.rglob("*")) == before


@pytest.mark.slow
def test_what_is_adapted_is_trained_and_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "source", "--output_dir", "out"]) == 0
    train = ["--max_length", "64", "--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none"]
    text = ["--dataset_args", "builtin:text[train:20,test:2]", "--continue_from_weights", "--output_dir", "pretrained"]
    assert main(["pretrain", "--model_name_or_path", "out", *train, *text]) == 0
    start, done = llada.load_model("out"), llada.load_model("pretrained/checkpoint-final")
    apart = [float((a - b).detach().abs().max()) for a, b in zip(start.parameters(), done.parameters(), strict=True)]
    assert 0 < max(apart) < 0.1  # it went on from the weights
    sums = ["--dataset_args", "builtin:addition[train:20,test:2]", "--output_dir", "tuned"]
    assert main(["sft", "--model_name_or_path", "pretrained/checkpoint-final", *train, *sums]) == 0
    assert llada.load_tokenizer("tuned/checkpoint-final").eot_token == "<|im_end|>"
    capsys.readouterr()
    assert (
        main(["generate", "--model_name_or_path", "tuned/checkpoint-final", "--gen_length", "8", "What is 2 + 3?"]) == 0
    )
    assert capsys.readouterr().out.strip()
