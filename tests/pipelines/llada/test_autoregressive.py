"""What can be adapted and what cannot: refusals name the feature and its value, before a weight is read; damaged sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import autoregressive
from safetensors.torch import load_file, save_file

from dllm.errors import CheckpointError
from dllm.pipelines import llada

WORDS = autoregressive.chatml_tokenizer()
V = len(WORDS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return autoregressive.save(tmp_path_factory.mktemp("plain") / "source", autoregressive.model("llama", V), WORDS)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(hidden_act="gelu"), r"has another activation \(hidden_act='gelu'\)"),
    (dict(head_dim=16), r"has heads of another width .*32 / 4\) \(head_dim=16\)"),
    (dict(attention_bias=True), r"has a bias on the attention's output \(attention_bias=True\)"),
    (dict(mlp_bias=True), r"biases in the feed-forward network \(mlp_bias=True\)"),
    (
        dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 64}),
        r"rotary positions of another scale \(rope_type='llama3'\)",
    ),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), r"of another scale \(rope_type='linear'\)"),
    (dict(model_type="mistral", sliding_window=16), r"has a sliding window \(sliding_window=16\)"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1), r"sliding_window=16"),
    (dict(model_type="qwen3"), r"norms of each head's queries and keys \(QK norm\) \(model_type='qwen3'\)"),
    (dict(model_type="mixtral", num_local_experts=4), r"a mixture of experts \(mixtral\) \(num_local_experts=4\)"),
    (dict(model_type="qwen2_moe", num_experts=4), r"a mixture of experts \(qwen2_moe\) \(num_experts=4\)"),
    (dict(model_type="gpt2"), r"another architecture \(model_type='gpt2'\)"),
    (dict(quantization_config={"quant_method": "awq", "bits": 4}), r"packed weights \(quantization_config='awq'\)"),
    (dict(model_type="nonsense"), r"The configuration of .* cannot be read: .*nonsense"),
    (dict(num_attention_heads="four"), r"The configuration of .* cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(next(iter(c.items()))) for c, _ in REFUSED])
def test_what_the_block_has_not_is_refused_by_name(
    changes: dict[str, Any], message: str, plain: Path, tmp_path: Path
) -> None:
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    config = {
        key: value for key, value in config.items() if key not in ("rope_parameters", "architectures", "head_dim")
    }
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):  # there are no weights: the error comes before them
        llada.adapt(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_llada_already_is_said_to_be() -> None:
    with pytest.raises(
        CheckpointError, match="'builtin:sudoku9' is a LLaDA checkpoint already: there is nothing to adapt"
    ):
        llada.adapt("builtin:sudoku9", "out")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "no/where/at/all", "model.gguf"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"There is no (checkpoint|file) '.*(nowhere|no/where|model\.gguf)"):
        llada.adapt(name, "out")


def test_an_id_that_is_not_on_the_hub() -> None:
    with pytest.raises(CheckpointError, match="The configuration of 'no/model' cannot be read"):
        llada.adapt("no/model", "out")
    with pytest.raises(CheckpointError, match=r"a\.gguf of 'no/model' could not be had from the hub"):
        llada.adapt("no/model", "out", gguf_file="a.gguf")


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json: it is not a checkpoint"):
        llada.adapt(tmp_path, tmp_path / "out")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=r"name its GGUF file with --gguf_file \(a\.gguf\)"):
        llada.adapt(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"There is no file '.*b\.gguf'; GGUF files there: a\.gguf"):
        llada.adapt(tmp_path, tmp_path / "out", gguf_file="b.gguf")


def test_weights_that_do_not_fit_are_named(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")

    def adapt_with(changed: dict[str, torch.Tensor]) -> None:
        shutil.copytree(plain, tmp_path / "source", dirs_exist_ok=True)
        save_file(changed, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
        llada.adapt(tmp_path / "source", tmp_path / "out")

    norm = "model.norm.weight"
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, such as model\.norm\.weight"):
        adapt_with({name: tensor for name, tensor in tensors.items() if name != norm})
    with pytest.raises(CheckpointError, match=r"such as model\.norm\.weight: \[31\], not \[32\]"):
        adapt_with({**tensors, norm: tensors[norm][:31].clone()})
    with pytest.raises(
        CheckpointError, match=r"1 tensors that its configuration says nothing of, such as .*q_proj\.bias"
    ):
        adapt_with({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    with pytest.raises(
        CheckpointError, match=r"holds NaN or infinity in model\.norm\.weight, read as float32: .* Copy it again"
    ):
        adapt_with({**tensors, norm: tensors[norm].clone().fill_(torch.nan)})
    (tmp_path / "source" / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"it is cut short or damaged\. Copy it again"):
        llada.adapt(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_a_type_cannot_hold_is_told_before_it_is_written(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "source")
    tensors = load_file(plain / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"in model\.norm\.weight, read as float16: .* or take a wider dtype"):
        llada.adapt(tmp_path / "source", tmp_path / "out", dtype="float16")
    assert llada.adapt(tmp_path / "source", tmp_path / "out").folder == tmp_path / "out"


def test_a_tokenizer_that_is_not_there(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    shutil.copy(plain / "config.json", tmp_path / "source")
    with pytest.raises(
        CheckpointError, match=r"No tokenizer could be loaded from '.*': the folder has no tokenizer\.json"
    ):
        llada.adapt(tmp_path / "source", tmp_path / "out")


def test_an_id_is_read_from_the_hubs_cache(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    shutil.copytree(plain, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    done = llada.adapt("someone/small", tmp_path / "out")
    assert llada.load_model(done.folder).config.adapted_from["source"] == "someone/small"
