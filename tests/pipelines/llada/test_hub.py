"""Checkpoints by their hub ids, from a cache as the hub's client leaves it: whole ones load, damaged ones are named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from golden import cases

from dllm.errors import CheckpointError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada.loading import load_config
from dllm.pipelines.llada.tokenizer import char_tokenizer

ID = "someone/llada-small"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two revisions of one id: main is the dense golden model with a tokenizer, v2 the mixture."""
    repository = tmp_path / "hub" / "models--someone--llada-small"
    (repository / "refs").mkdir(parents=True)
    for ref, name, commit in (("main", "llada_dense", "a" * 40), ("v2", "llada_moe", "b" * 40)):
        shutil.copytree(cases.folder(name), repository / "snapshots" / commit)
        (repository / "refs" / ref).write_text(commit, encoding="utf-8")
        char_tokenizer().save_pretrained(repository / "snapshots" / commit)
    return tmp_path / "hub"


def snapshot(cache: Path) -> Path:
    return cache / "models--someone--llada-small" / "snapshots" / ("a" * 40)


def test_an_id_loads_from_the_cache(cache: Path) -> None:
    model = llada.load_model(ID, cache_dir=cache)
    golden = cases.forward_case("llada_dense")
    with torch.no_grad():
        torch.testing.assert_close(model(golden["input_ids"]).logits, golden["logits"], rtol=0, atol=1e-4)
    assert llada.load_tokenizer(ID, cache_dir=cache).mask_token_id == 2


def test_a_revision_brings_its_configuration_and_its_weights(cache: Path) -> None:
    assert type(load_config(ID, cache_dir=cache, revision="v2")).__name__ == "LLaDAMoEConfig"
    assert type(llada.load_model(ID, cache_dir=cache, revision="v2")).__name__ == "LLaDAMoEModelLM"


def test_a_damaged_file_of_an_id_is_named(cache: Path) -> None:
    os.truncate(snapshot(cache) / "model.safetensors", 300_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 300,000 bytes and its header asks for"):
        llada.load_model(ID, cache_dir=cache)


def test_a_shape_that_does_not_fit_is_named_with_its_file(cache: Path) -> None:
    config = snapshot(cache) / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"mlp_hidden_size": 160', '"mlp_hidden_size": 96'))
    with pytest.raises(CheckpointError, match=r"such as model\.transformer\.blocks\.0\.\S+ in model\.safetensors"):
        llada.load_model(ID, cache_dir=cache)


def test_an_id_with_pickles_alone_has_no_weights_for_us(cache: Path) -> None:
    (snapshot(cache) / "model.safetensors").rename(snapshot(cache) / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="as pickles alone"):
        llada.load_model(ID, cache_dir=cache)


def test_an_id_that_is_not_there_says_so(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="'someone/else' is no folder here, and the hub gave no configuration"):
        llada.load_model("someone/else", cache_dir=cache)


@pytest.mark.parametrize("option", ["trust_remote_code", "use_safetensors"])
def test_nothing_that_would_run_code_can_be_asked_for(option: str) -> None:
    with pytest.raises(OptionError, match=f"load_model takes no {option}"):
        llada.load_model("builtin:sudoku9", **{option: True})


def test_a_home_folder_is_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(snapshot(cache).parent))
    assert llada.load_model("~/" + "a" * 40).config.n_layers == 2
    assert llada.load_tokenizer("~/" + "a" * 40).eos_token_id == 1
