"""The configuration: public keys in and out unchanged, and no architecture that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from dllm.errors import CheckpointError
from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAConfig

# transformers warns of the key's name before an error can be made of its value
pytestmark = pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")

SHAPE = dict(vocab_size=40, d_model=32, n_layers=1, n_heads=4)


def golden(name: str = "llada_dense") -> dict[str, Any]:
    return json.loads((cases.folder(name) / "config.json").read_text(encoding="utf-8"))


def written(config: LLaDAConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_defaults_are_those_of_the_public_8b_checkpoints() -> None:
    config = LLaDAConfig()
    # config.json of LLaDA-8B says mlp_hidden_size itself: the ratio is for files that leave it out
    assert (config.d_model, config.n_layers, config.n_heads, config.mlp_hidden_size) == (4096, 32, 32, 4 * 4096)
    assert (config.vocab_size, config.embedding_size, config.max_sequence_length) == (126464, 126464, 4096)
    assert (config.rope_theta, config.rms_norm_eps, config.weight_tying) == (500000.0, 1e-5, False)
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (126336, 126081, 126081)


def test_sizes_that_are_left_out_follow_from_the_others() -> None:
    config = LLaDAConfig(**SHAPE, mlp_ratio=2.5)
    assert (config.n_kv_heads, config.mlp_hidden_size, config.embedding_size, config.head_dim) == (4, 80, 40, 8)
    assert LLaDAConfig(**SHAPE, multi_query_attention=True).n_kv_heads == 1
    assert LLaDAConfig(**SHAPE, multi_query_attention=True, n_kv_heads=2).n_kv_heads == 2
    assert LLaDAConfig(**SHAPE, multi_query_attention=None, n_kv_heads=None).n_kv_heads == 4


@pytest.mark.parametrize("name", cases.DENSE)
def test_a_public_config_survives_the_round_trip(name: str, tmp_path: Path) -> None:
    loaded = AutoConfig.from_pretrained(cases.folder(name))
    assert type(loaded) is LLaDAConfig
    after = written(loaded, tmp_path)
    given = golden(name)
    assert {key: after.get(key, "absent") for key in given} == given
    # what comes besides is transformers' own note, or a field of the class
    assert after.keys() - given.keys() <= {"transformers_version", *LLaDAConfig.__annotations__}


@settings(max_examples=30)
@given(
    extra=st.dictionaries(
        st.text("abcdefgh_", min_size=4, max_size=12).map(lambda text: "x_" + text),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("xyz", min_size=1), inner, max_size=2),
            max_leaves=4,
        ),
        max_size=4,
    )
)
def test_unknown_keys_survive_the_round_trip(extra: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("config")
    after = written(LLaDAConfig.from_dict({**golden(), **extra}), folder)
    again = written(AutoConfig.from_pretrained(folder), folder)
    assert {key: after.get(key, "absent") for key in extra} == extra
    assert again == after


@pytest.mark.parametrize(
    ("standard", "public", "value"),
    [
        ("hidden_size", "d_model", 64),
        ("num_hidden_layers", "n_layers", 3),
        ("num_attention_heads", "n_heads", 8),
        ("num_key_value_heads", "n_kv_heads", 2),
        ("intermediate_size", "mlp_hidden_size", 100),
        ("max_position_embeddings", "max_sequence_length", 77),
        ("tie_word_embeddings", "weight_tying", True),
    ],
)
def test_transformers_names_are_the_same_fields(standard: str, public: str, value: Any, tmp_path: Path) -> None:
    config = LLaDAConfig(**SHAPE)
    assert getattr(config, standard) == getattr(config, public) != value
    setattr(config, standard, value)
    assert getattr(config, public) == value
    after = written(config, tmp_path)
    assert after[public] == value
    assert standard not in after
    without = {key: size for key, size in SHAPE.items() if key != public}
    given = LLaDAConfig(**without, **{standard: value})
    assert (getattr(given, public), getattr(given, standard)) == (value, value)


def test_sizes_follow_from_the_others_by_their_standard_names_too() -> None:
    config = LLaDAConfig(hidden_size=48, num_attention_heads=6, mlp_ratio=2)
    assert (config.n_kv_heads, config.mlp_hidden_size, config.head_dim) == (6, 96, 8)


def test_there_may_be_several_end_tokens(tmp_path: Path) -> None:
    config = LLaDAConfig(**SHAPE, eos_token_id=[3, 5])
    assert written(config, tmp_path)["eos_token_id"] == [3, 5]
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == [3, 5]


WRONG: list[tuple[str, Any]] = [
    ("activation_type", "swiglu"),
    ("activation_type", "gelu"),
    ("alibi", True),
    ("attention_dropout", 0.1),
    ("attention_layer_norm", True),
    ("bias_for_layer_norm", True),
    ("block_group_size", 4),
    ("block_type", "sequential"),
    ("clip_qkv", 8.0),
    ("embedding_dropout", 0.1),
    ("include_bias", True),
    ("include_qkv_bias", "yes"),
    ("input_emb_norm", True),
    ("layer_norm_type", "default"),
    ("layer_norm_with_affine", False),
    ("residual_dropout", 0.5),
    ("rope", False),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("scale_logits", True),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_an_architecture_that_is_not_there_is_an_error_at_load(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**golden(), key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError) as error:
        llada.load_model(str(tmp_path))  # there are no weights: the error comes before they are looked for
    text = str(error.value)
    assert text.startswith(f"config.json says {key}=")
    assert f"={value!r}, an architecture that dllm does not implement (it has " in text or isinstance(value, dict)
    assert "check that the folder holds a LLaDA checkpoint" in text


@pytest.mark.parametrize("key", sorted({key for key, _ in WRONG} - set(LLaDAConfig.__annotations__)))
def test_a_key_that_is_absent_or_null_is_no_error(key: str) -> None:
    absent = {name: value for name, value in golden().items() if name != key}
    LLaDAConfig.from_dict(absent)
    LLaDAConfig.from_dict({**absent, key: None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, r"d_model=64 and n_heads=5: the first must be a multiple of the second"),
        ({"n_heads": 0}, r"d_model=64 and n_heads=0: the first must be a multiple of the second"),
        ({"n_kv_heads": 3}, r"n_heads=4 and n_kv_heads=3: the first must be a multiple of the second"),
        ({"n_kv_heads": 0}, r"n_heads=4 and n_kv_heads=0: the first must be a multiple of the second"),
        ({"d_model": 36}, r"heads of width 9 \(d_model / n_heads\): rotary embedding needs an even one"),
    ],
)
def test_sizes_that_contradict_each_other_are_an_error(changes: dict[str, int], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LLaDAConfig.from_dict({**golden(), **changes})
