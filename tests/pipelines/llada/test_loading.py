"""Loading: what is wrong with a checkpoint is said, and no half-loaded model is handed out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden import cases
from safetensors.torch import load_file, save_file

from dllm.errors import CheckpointError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM, loading
from dllm.pipelines.llada.loading import load_config
from dllm.pipelines.llada.tokenizer import char_tokenizer

TOKENIZER = char_tokenizer()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(cases.folder("llada_dense"), tmp_path / "checkpoint"))


def rewrite(checkpoint: Path, **changes: Any) -> str:
    """Changes config.json; None takes a key away."""
    config = {**json.loads((checkpoint / "config.json").read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return str(checkpoint)


def rewrite_weights(checkpoint: Path, changes: dict[str, torch.Tensor | None]) -> str:
    weights = {**load_file(checkpoint / "model.safetensors"), **changes}
    kept = {key: value for key, value in weights.items() if value is not None}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return str(checkpoint)


def test_a_model_comes_in_evaluation_mode_with_its_weights(checkpoint: Path) -> None:
    model = llada.load_model(str(checkpoint))
    assert type(model) is LLaDAModelLM
    assert not model.training
    stored = load_file(checkpoint / "model.safetensors")
    assert {key: value.tolist() for key, value in model.state_dict().items()} == {
        key: value.tolist() for key, value in stored.items()
    }


def test_a_path_and_a_relative_name_do_as_well(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    for name in (checkpoint, "checkpoint", "./checkpoint", Path("checkpoint")):
        assert llada.load_model(name).config.n_layers == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_dtype_may_be_chosen(checkpoint: Path, dtype: Any) -> None:
    assert {x.dtype for x in llada.load_model(str(checkpoint), dtype=dtype).parameters()} == {torch.bfloat16}


def test_the_default_dtype_is_that_of_the_files(checkpoint: Path) -> None:
    half = {key: value.bfloat16() for key, value in load_file(checkpoint / "model.safetensors").items()}
    name = rewrite_weights(checkpoint, half)
    assert llada.load_model(name, dtype="auto").dtype == torch.bfloat16


def test_a_dtype_that_is_not_there_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(OptionError, match=r"dtype 'bfloat61' does not exist. Did you mean 'bfloat16'\?"):
        llada.load_model(str(checkpoint), dtype="bfloat61")


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "/nowhere/at/all", "models/a[train:5]/checkpoint-final", "a/b/c"]
)
@pytest.mark.parametrize("load", [llada.load_model, load_config])
def test_a_folder_that_is_not_there_is_an_error(load: Any, name: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(name)
    text = str(error.value)
    assert text.startswith(
        f"There is no model folder {name!r} (taken from {Path.cwd()}). Give the folder of a checkpoint"
    )
    assert "GSAI-ML/LLaDA-8B-Instruct" in text
    assert ("preset to pretrain from (tiny" in text) is ("/" not in name)


def test_a_hub_id_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(
        CheckpointError, match="'some/model' is no folder here, and the hub gave no configuration for it"
    ):
        llada.load_model("some/model")


def test_a_folder_without_a_configuration_is_an_error(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint' has no config.json: it is not a checkpoint"):
        llada.load_model(str(checkpoint))


@pytest.mark.parametrize("text", ["{nope", "", "[1]", "{}", '{"d_model": 64}', '{"model_type": "made_up"}'])
def test_a_configuration_that_cannot_be_read_is_an_error(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"The configuration of '.*checkpoint' cannot be read: "):
        llada.load_model(str(checkpoint))


def test_a_number_that_is_text_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"The configuration of '.*checkpoint' cannot be read: "):
        llada.load_model(rewrite(checkpoint, d_model="64"))


def test_another_model_is_an_error(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"is a 'bert' model; dllm loads LLaDA checkpoints \(model_type 'llada'\)"
    ):
        llada.load_model(str(checkpoint))


def test_a_model_that_can_be_adapted_is_told_how(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"is a 'llama' model; .* Make one of it: dllm adapt .* --output_dir DIR\."
    ):
        llada.load_model(str(checkpoint))


def test_code_in_a_checkpoint_is_not_run(checkpoint: Path) -> None:
    code = "raise SystemExit('code of the checkpoint ran')"
    for module in ("configuration_llada", "modeling_llada"):
        (checkpoint / f"{module}.py").write_text(code, encoding="utf-8")
    auto_map = {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForMaskedLM": "modeling_llada.LLaDAModelLM",
    }
    assert type(llada.load_model(rewrite(checkpoint, auto_map=auto_map))) is LLaDAModelLM


@pytest.mark.parametrize("size", [0, 5, 5000, 511_000])
def test_weights_that_are_cut_short_are_an_error(checkpoint: Path, size: int) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors (is cut short|has {size:,} bytes).*[Cc]opy it again"
    ):
        llada.load_model(str(checkpoint))


def test_weights_that_are_not_safetensors_are_an_error(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"x" * 40)
    with pytest.raises(CheckpointError, match=r"model.safetensors is no safetensors file: its header cannot be read"):
        llada.load_model(str(checkpoint))


def test_no_weights_are_an_error(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no weights: neither model.safetensors nor model.safetensors.index"
    ):
        llada.load_model(str(checkpoint))


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pickles alone \(pytorch_model.bin\), which can run code"):
        llada.load_model(str(checkpoint))


def test_a_tensor_that_is_missing_is_an_error(checkpoint: Path) -> None:
    tensor = "model.transformer.blocks.1.attn_out.weight"
    message = f"do not fit its config.json: 1 tensors are missing, such as {tensor}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        llada.load_model(rewrite_weights(checkpoint, {tensor: None}))


def test_a_tensor_of_another_shape_is_an_error(checkpoint: Path) -> None:
    name = rewrite_weights(checkpoint, {"model.transformer.blocks.1.q_proj.weight": torch.zeros(64, 32)})
    with pytest.raises(CheckpointError, match=r"The weights of '.*checkpoint' "):
        llada.load_model(name)


def test_a_configuration_of_another_model_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"9 tensors are missing, such as model.transformer.blocks.2.attn_norm.weight"
    ):
        llada.load_model(rewrite(checkpoint, n_layers=3))


def test_a_shard_that_is_missing_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    llada.load_model(str(checkpoint)).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shard = max((tmp_path / "shards").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names {shard.name}, and there is no such file"):
        llada.load_model(str(tmp_path / "shards"))


# --- fresh models


def fresh(name: str = "tiny", overrides: str | None = None) -> LLaDAConfig:
    with torch.device("meta"):
        return llada.fresh_model(name, TOKENIZER, overrides).config


def test_a_fresh_model_is_fp32_and_says_what_it_is() -> None:
    model = llada.fresh_model("tiny", TOKENIZER, "n_layers=1")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.architectures == ["LLaDAModelLM"]


def test_a_fresh_model_of_a_half_precision_checkpoint_is_fp32(checkpoint: Path) -> None:
    model = llada.fresh_model(rewrite(checkpoint, dtype="bfloat16", mask_token_id=2), TOKENIZER)
    assert model.dtype == torch.float32
    assert (model.config.vocab_size, model.config.eos_token_id) == (256, 251)  # a checkpoint's ids are its own


def test_overrides_change_a_preset() -> None:
    config = fresh(overrides="n_layers=2, d_model=64,weight_tying=True , rope_theta=1e4,,rms_norm_eps=1")
    assert (config.n_layers, config.d_model, config.weight_tying) == (2, 64, True)
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1)
    assert fresh(overrides="").to_dict() == fresh().to_dict()


def test_overrides_change_a_checkpoints_configuration(checkpoint: Path) -> None:
    config = fresh(str(checkpoint), "n_layers=3")
    assert (config.n_layers, config.d_model, config.precision) == (3, 64, "amp_bf16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("n_layer=2", "config_overrides 'n_layer=2': there is no key 'n_layer'. Did you mean 'n_layers'?"),
        ("d_model=64,num_experts=4", "config_overrides 'num_experts=4': there is no key 'num_experts'."),
        ("=3", "config_overrides '=3': there is no key ''. It can be one of: activation_type, "),
        ("n_layers", "config_overrides 'n_layers': write it as n_layers=NUMBER."),
        ("n_layers=", "config_overrides 'n_layers=': write it as n_layers=NUMBER."),
        ("n_layers=two", "config_overrides 'n_layers=two': write it as n_layers=NUMBER."),
        ("n_layers:2", "config_overrides 'n_layers:2': there is no key 'n_layers:2'. Did you mean 'n_layers'?"),
        ("n_layers=2.5", "config_overrides 'n_layers=2.5': n_layers takes int."),
        ("n_kv_heads=true", "config_overrides 'n_kv_heads=true': n_kv_heads takes int or None."),
        ("weight_tying=1", "config_overrides 'weight_tying=1': weight_tying takes bool."),
    ],
)
def test_overrides_that_do_not_fit_are_an_error(overrides: str, message: str) -> None:
    with pytest.raises(OptionError, match="^" + re.escape(message)):
        fresh(overrides=overrides)


@pytest.mark.parametrize("overrides", ["n_heads=3", "d_model=100", "n_kv_heads=3", "n_heads=0"])
def test_overrides_that_contradict_the_rest_are_an_error(overrides: str) -> None:
    with pytest.raises(CheckpointError, match=r"must be a multiple of the second|needs an even one"):
        fresh(overrides=overrides)


def test_an_unknown_preset_is_an_error_that_lists_them() -> None:
    with pytest.raises(
        CheckpointError, match=r"no model folder 'tinny'.*a preset to pretrain from \(tiny, small, 50m, 1b, 8b"
    ):
        fresh("tinny")


def test_the_folder_of_a_run_is_its_final_model(checkpoint: Path) -> None:
    run = checkpoint.parent / "run[train:1]"
    run.mkdir()
    (run / "log.jsonl").touch()
    checkpoint.rename(run / "checkpoint-final")
    char_tokenizer().save_pretrained(run / "checkpoint-final")
    assert load_config(run).n_layers == llada.load_model(run).config.n_layers == 2
    assert llada.load_tokenizer(run).mask_token_id == TOKENIZER.mask_token_id


def test_a_fresh_model_takes_the_vocabulary_of_a_tokenizer_that_does_not_fit(checkpoint: Path) -> None:
    other = fresh(rewrite(checkpoint, vocab_size=50, embedding_size=50, mask_token_id=49))
    assert (other.vocab_size, other.embedding_size, other.mask_token_id) == (len(TOKENIZER), len(TOKENIZER), 2)
    padded = fresh(rewrite(checkpoint, vocab_size=100, embedding_size=128, mask_token_id=2))
    assert (padded.vocab_size, padded.embedding_size, padded.mask_token_id) == (100, 128, 2)


@pytest.mark.parametrize(
    ("stored", "fast", "memory", "becomes"),
    [
        (torch.bfloat16, False, 1 << 40, torch.float32),
        (torch.float16, False, 1 << 40, torch.float32),
        (torch.bfloat16, True, 1 << 40, torch.bfloat16),
        (torch.bfloat16, False, 1000, torch.bfloat16),
        (torch.float32, True, 1 << 40, torch.float32),
        (torch.float64, False, 1 << 40, torch.float64),
    ],
)
def test_half_precision_is_widened_where_the_processor_only_imitates_it(
    stored: torch.dtype, fast: bool, memory: int, becomes: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "bf16_is_fast", lambda cpu: fast)
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    model = llada.load_model("builtin:sudoku9", dtype=stored)
    moved = llada.to_device(model, torch.device("cpu"))
    assert moved is model
    assert {parameter.dtype for parameter in moved.parameters()} == {becomes}
