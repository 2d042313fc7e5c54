"""The models that ship inside: found by name, and what they are for they can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dllm.data.sudoku import puzzles
from dllm.errors import CheckpointError
from dllm.evaluation.sudoku import fill_puzzles, score
from dllm.pipelines import llada
from dllm.pipelines.llada.embedded import DEFAULT, resolve


@pytest.mark.parametrize("name", ["GSAI-ML/LLaDA-8B-Instruct", "models/x", ".", "", "/tmp/builtin:sudoku9"])
def test_other_names_are_left_as_they_are(name: str) -> None:
    assert resolve(name) == name


def test_a_path_is_a_name_too() -> None:
    assert resolve(Path("models") / "x") == str(Path("models/x"))


def test_the_default_is_a_folder_with_a_whole_checkpoint() -> None:
    folder = Path(resolve(DEFAULT))
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in folder.iterdir()
    }


def test_what_ships_is_small() -> None:
    root = Path(resolve(DEFAULT)).parent
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 10_000_000


@pytest.mark.parametrize(
    ("name", "end"),
    [("builtin:sudoku8", r"Did you mean 'sudoku9'\?"), ("builtin:", r"It can be one of: .*sudoku9")],
)
@pytest.mark.parametrize("load", [llada.load_model, llada.load_tokenizer])
def test_an_unknown_name_is_an_error_that_names_the_nearest(load: Callable[[str], object], name: str, end: str) -> None:
    with pytest.raises(CheckpointError, match=f"No model '{name}' ships with dllm. {end}"):
        load(name)


def test_the_default_model_and_its_tokenizer_agree() -> None:
    model, tokenizer = llada.load_model(DEFAULT), llada.load_tokenizer(DEFAULT)
    config = model.config
    assert config.vocab_size == len(tokenizer)
    for name in ("mask", "bos", "eos", "pad"):
        assert getattr(config, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id") is not None


def test_the_default_model_writes_digits_where_blanks_were_and_nowhere_else() -> None:
    model, tokenizer = llada.load_model(DEFAULT), llada.load_tokenizer(DEFAULT)
    grids = [puzzle for puzzle, _ in puzzles(9, "test", 4, clues=(50, 60))]
    filled, _ = fill_puzzles(model, tokenizer, grids, steps=4)
    for puzzle, grid in zip(grids, filled, strict=True):
        assert len(grid) == 81
        assert set(grid) <= set("123456789")
        assert all(given in (".", found) for given, found in zip(puzzle, grid, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("clues", "exact"), [((36, 50), 0.97), ((30, 35), 0.9)])
def test_the_default_model_solves_puzzles_of_unseen_grids(clues: tuple[int, int], exact: float) -> None:
    model, tokenizer = llada.load_model(DEFAULT), llada.load_tokenizer(DEFAULT)
    unseen = [puzzle for puzzle, _ in puzzles(9, "test", 100, clues=clues)]
    assert score(model, tokenizer, unseen).exact >= exact
