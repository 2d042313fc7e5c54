"""Public names: every tensor of the public checkpoints with its shape, and the keys of their config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import cases
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM

from dllm.errors import CheckpointError
from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModelLM
from dllm.pipelines.llada.loading import load_config, public_shapes
from dllm.pipelines.llada.models.configuration_llada import is_mixture
from dllm.pipelines.llada.presets import PRESETS

FOLDER = cases.folder("llada_moe")
Shapes = dict[str, tuple[int, ...]]


def dense_table(V: int, D: int, layers: int, kv_width: int, hidden: int) -> Shapes:
    """The tensors of LLaDA-8B-Base, -Instruct and LLaDA-1.5, by their shape."""
    table: Shapes = {
        "model.transformer.wte.weight": (V, D),
        "model.transformer.ln_f.weight": (D,),
        "model.transformer.ff_out.weight": (V, D),
    }
    for i in range(layers):
        block = f"model.transformer.blocks.{i}"
        table |= {
            f"{block}.attn_norm.weight": (D,),
            f"{block}.ff_norm.weight": (D,),
            f"{block}.q_proj.weight": (D, D),
            f"{block}.k_proj.weight": (kv_width, D),
            f"{block}.v_proj.weight": (kv_width, D),
            f"{block}.attn_out.weight": (D, D),
            f"{block}.ff_proj.weight": (hidden, D),
            f"{block}.up_proj.weight": (hidden, D),
            f"{block}.ff_out.weight": (D, hidden),
        }
    return table


def moe_table(V: int, D: int, layers: int, width: int, head_dim: int, experts: int, hidden: int) -> Shapes:
    """The tensors of LLaDA-MoE-7B-A1B-Base and -Instruct, by their shape."""
    table: Shapes = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        table |= {
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.post_attention_layernorm.weight": (D,),
            f"{layer}.self_attn.q_proj.weight": (width, D),
            f"{layer}.self_attn.k_proj.weight": (width, D),
            f"{layer}.self_attn.v_proj.weight": (width, D),
            f"{layer}.self_attn.o_proj.weight": (D, width),
            f"{layer}.self_attn.q_norm.weight": (head_dim,),
            f"{layer}.self_attn.k_norm.weight": (head_dim,),
            f"{layer}.mlp.gate.weight": (experts, D),
        }
        for e in range(experts):
            table |= {
                f"{layer}.mlp.experts.{e}.gate_proj.weight": (hidden, D),
                f"{layer}.mlp.experts.{e}.up_proj.weight": (hidden, D),
                f"{layer}.mlp.experts.{e}.down_proj.weight": (D, hidden),
            }
    return table


def count(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_the_8b_shape_has_the_public_tensors() -> None:
    shapes = public_shapes(LLaDAConfig(**PRESETS["8b"]))
    assert shapes == dense_table(126464, 4096, 32, 4096, 12288)
    assert len(shapes) == 291
    assert count(shapes) / 1e9 == pytest.approx(8.02, abs=0.005)
    assert (count(shapes) - 2 * 126464 * 4096) / 1e9 == pytest.approx(6.98, abs=0.005)


def test_the_moe_shape_has_the_public_tensors() -> None:
    shapes = public_shapes(LLaDAMoEConfig(**PRESETS["moe-7b"]))
    assert shapes == moe_table(157184, 2048, 16, 2048, 128, 64, 1024)
    assert len(shapes) == 3 + 16 * (9 + 3 * 64)
    assert count(shapes) / 1e9 == pytest.approx(7.36, abs=0.005)
    resting = 16 * 56 * 3 * 1024 * 2048
    assert (count(shapes) - resting) / 1e9 == pytest.approx(1.7, abs=0.05), "1.4 B a token, with the head"


def test_grouped_queries_and_one_table_change_what_they_should() -> None:
    config = LLaDAConfig(d_model=64, n_layers=1, n_heads=4, n_kv_heads=2, mlp_hidden_size=96, weight_tying=True)
    table = dense_table(126464, 64, 1, 32, 96)
    del table["model.transformer.ff_out.weight"]
    assert public_shapes(config) == table
    tied = LLaDAMoEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=True)
    mixture = moe_table(157184, 32, 1, 32, 8, 64, 1024)
    del mixture["lm_head.weight"]
    assert public_shapes(tied) == mixture


@pytest.mark.parametrize("name", [*cases.DENSE, "llada_moe"])
def test_the_shapes_are_those_of_a_stored_checkpoint_and_of_a_saved_one(name: str, tmp_path: Path) -> None:
    config = load_config(cases.folder(name))
    before = config.to_dict()
    shapes = public_shapes(config)
    assert config.to_dict() == before
    llada.load_model(cases.folder(name)).save_pretrained(tmp_path)
    for folder in (cases.folder(name), tmp_path):
        stored = load_file(folder / "model.safetensors")
        assert shapes == {key: tuple(tensor.shape) for key, tensor in stored.items()}


# --- config.json of the mixtures


@pytest.mark.parametrize(
    ("config", "mixture"),
    [
        ({"architectures": ["LLaDAMoEModelLM"], "d_model": 64}, True),
        ({"architectures": ["LLaDAMoEModel"]}, True),
        ({"num_experts": 8}, True),
        ({"expert_intermediate_size": 8, "architectures": None}, True),
        ({"architectures": ["LLaDAModelLM"], "d_model": 64}, False),
        ({"d_model": 64, "num_experts": None}, False),
        ({}, False),
    ],
)
def test_a_mixture_is_told_by_its_architecture_or_its_keys(config: dict[str, Any], mixture: bool) -> None:
    assert is_mixture(config) is mixture
    kind = LLaDAMoEConfig if mixture else LLaDAConfig
    assert type(LLaDAConfig.from_dict({"model_type": "llada", **config})) is kind


def rewritten(folder: Path, **changes: Any) -> Path:
    """The golden checkpoint with other keys in config.json; None takes one away."""
    config = {**json.loads((FOLDER / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None or key not in changes}
    (folder / "config.json").write_text(json.dumps(kept))
    (folder / "model.safetensors").symlink_to(FOLDER / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "changes",
    [{}, {"architectures": None}, {"num_experts": 8, "architectures": ["Other"]}, {"moe_layer_freq": 1}],
)
def test_a_checkpoint_of_type_llada_is_recognised(changes: dict[str, Any], tmp_path: Path) -> None:
    folder, case = rewritten(tmp_path, **changes), cases.forward_case("llada_moe")
    for found in (llada.load_model(folder), AutoModelForMaskedLM.from_pretrained(folder)):
        assert type(found) is LLaDAMoEModelLM
        logits = found(case["input_ids"]).logits
        torch.testing.assert_close(logits, case["logits"], rtol=0, atol=cases.TOLERANCE)


def test_unknown_keys_survive_the_round_trip(tmp_path: Path) -> None:
    extra = {"first_seen": "somewhere", "numbers": [1, {"two": None}], "use_qk_norm": True}
    (tmp_path / "given").mkdir()
    config = llada.load_model(rewritten(tmp_path / "given", **extra)).config
    config.save_pretrained(tmp_path / "after")
    after = json.loads((tmp_path / "after" / "config.json").read_text())
    assert {key: after.get(key, "absent") for key in extra} == extra
    again = LLaDAMoEConfig.from_pretrained(tmp_path / "after")
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == after


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("moe_router_enable_expert_bias", True),
        ("moe_router_score_function", "sigmoid"),
        ("partial_rotary_factor", 0.5),
        ("routed_scaling_factor", 2.5),
        ("router_num_group", 8),
        ("router_topk_group", 4),
        ("shared_expert_intermediate_size", 512),
        ("sliding_window", 128),
        ("use_sliding_window", True),
    ],
)
def test_an_architecture_that_is_not_there_is_an_error_at_load(key: str, value: Any, tmp_path: Path) -> None:
    message = f"config.json says {key}={value!r}, an architecture that dllm does not implement"
    with pytest.raises(CheckpointError, match="^" + re.escape(message)):
        llada.load_model(rewritten(tmp_path, **{key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 and num_key_value_heads=3: the first must be a multiple"),
        ({"num_key_value_heads": 0}, "num_attention_heads=4 and num_key_value_heads=0: the first must be a multiple"),
        ({"moe_layer_freq": [1]}, r"moe_layer_freq=\[1\]: it must have one entry for each of the 2 layers"),
        ({"moe_layer_freq": 0}, "moe_layer_freq=0: it must be 1 or more"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 and num_experts=8: a token has at least 1 of the experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 and num_experts=8: a token has at least 1 of the experts"),
        ({"head_dim": 15}, "head_dim=15: rotary embedding needs an even one"),
    ],
)
def test_sizes_that_contradict_each_other_are_an_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="^config.json says " + message):
        llada.load_model(rewritten(tmp_path, **changes))


@pytest.mark.parametrize("kind", [LLaDAModelLM, LLaDAMoEModelLM])
def test_a_dense_and_a_mixed_model_share_the_public_model_type(kind: Any) -> None:
    assert kind.config_class.model_type == "llada"
    assert type(AutoConfig.from_pretrained(FOLDER)) is LLaDAMoEConfig
    assert type(AutoConfig.from_pretrained(cases.folder("llada_dense"))) is LLaDAConfig
