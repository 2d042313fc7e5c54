"""An autoregressive checkpoint becomes a LLaDA one: its weights to the bit, its logits under a causal mask, and a mask token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import autoregressive
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dllm.data.maps import check_chat_template
from dllm.errors import CheckpointError, OptionError
from dllm.layers.attention import RaggedRows
from dllm.pipelines import llada
from dllm.pipelines.llada.adaptation import adapted_config, adapted_model
from dllm.pipelines.llada.adapted_tokenizer import MaskToken
from dllm.pipelines.llada.autoregressive import public_name
from dllm.pipelines.llada.generate import special_tokens
from dllm.pipelines.llada.inspection import inspect

WORDS = autoregressive.chatml_tokenizer()
V = len(WORDS)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": dict(tie_word_embeddings=True),
    "llama, one head a key": dict(num_key_value_heads=4),
    "mistral": {},
    "qwen2": {},
    "qwen2, tied": dict(tie_word_embeddings=True),
}


def causal_logits(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    """Of a LLaDA model, when no position sees what comes after it."""
    B, L = ids_BL.shape
    past = torch.ones(L, L, dtype=torch.bool).tril().expand(B, 1, L, L)
    plan = RaggedRows([L] * B, "cpu", visible=past)
    with torch.no_grad():
        return model(ids_BL.view(1, -1), plan, torch.arange(L).repeat(B)[None]).logits.view(B, L, -1)


def some_ids() -> Tensor:
    return torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_with_the_causal_mask_put_back_the_logits_are_the_sources(name: str, tmp_path: Path) -> None:
    theirs = autoregressive.model(name.partition(",")[0], V, **FAMILIES[name])
    source = autoregressive.save(tmp_path / "source", theirs, WORDS)
    done = llada.adapt(source, tmp_path / "out")
    ours = llada.load_model(done.folder)
    with torch.no_grad():
        expected = theirs(some_ids()).logits
    found = causal_logits(ours, some_ids())[..., :V]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert (ours(some_ids()).logits[..., :V] - expected).abs().max() > 0.1 * expected.abs().max()  # both sides are seen
    assert done.parameters == sum(p.numel() for p in ours.parameters())
    assert ours.config.weight_tying is theirs.config.tie_word_embeddings
    assert ours.config.include_qkv_bias is name.startswith("qwen2")


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_tensors_are_written_as_they_are_stored(dtype: str, tmp_path: Path) -> None:
    theirs = autoregressive.model("qwen2", V + 7).to(torch.bfloat16)
    source = autoregressive.save(tmp_path / "source", theirs, WORDS, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    llada.adapt(source, tmp_path / "out", dtype=dtype)
    kept = torch.bfloat16 if dtype == "auto" else torch.float32
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {public_name(name) for name in theirs.state_dict()}
    mask = llada.load_tokenizer(tmp_path / "out").mask_token_id
    for name, tensor in theirs.state_dict().items():
        found = written[public_name(name)]
        assert found.dtype == kept
        rows = torch.arange(len(found)) != mask if "embed" in name or "lm_head" in name else slice(None)
        assert torch.equal(found[rows], tensor.to(kept)[rows]), name


def test_the_dtype_is_that_of_the_tensors_whatever_the_configuration_says(tmp_path: Path) -> None:
    theirs = autoregressive.model("llama", V)
    source = autoregressive.save(tmp_path / "source", theirs, WORDS)
    said = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**said, "dtype": "bfloat16"}), encoding="utf-8")
    llada.adapt(source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(written[public_name(name)][:V], tensor), name
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


def test_the_source_is_not_held_twice() -> None:
    theirs = autoregressive.model("llama", V + 8)
    words = autoregressive.chatml_tokenizer()
    words.add_special_tokens({"mask_token": "<|mdm_mask|>"})
    weights = {public_name(name): tensor for name, tensor in theirs.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in weights.items()}
    config = adapted_config(theirs.config, words)
    model = adapted_model(weights, config, MaskToken("<|mdm_mask|>", V, "appended"), V)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    assert not weights


def test_a_table_without_room_grows_and_new_rows_are_the_mean(tmp_path: Path) -> None:
    theirs = autoregressive.model("llama", V)
    done = llada.adapt(autoregressive.save(tmp_path / "source", theirs, WORDS), tmp_path / "out")
    assert (done.mask.id, done.mask.how) == (V, "appended")
    model = llada.load_model(done.folder)
    assert model.config.vocab_size == V + 1
    pairs = (
        (model.get_input_embeddings(), theirs.get_input_embeddings()),
        (model.get_output_embeddings(), theirs.get_output_embeddings()),
    )
    for ours, source in pairs:
        assert len(ours.weight) % 64 == 0
        assert 0 < len(ours.weight) - V <= 64
        assert torch.equal(ours.weight[:V], source.weight)
        torch.testing.assert_close(ours.weight[V:], source.weight.mean(0).expand(len(ours.weight) - V, -1))


def test_a_spare_row_of_the_table_becomes_the_mask(tmp_path: Path) -> None:
    theirs = autoregressive.model("qwen2", V + 20, tie_word_embeddings=True)
    done = llada.adapt(autoregressive.save(tmp_path / "source", theirs, WORDS), tmp_path / "out")
    table = llada.load_model(done.folder).get_input_embeddings().weight
    source = theirs.get_input_embeddings().weight
    assert done.mask.id == V
    assert table.shape == source.shape
    torch.testing.assert_close(table[V], source[:V].mean(0))
    assert torch.equal(table[V + 1 :], source[V + 1 :])


def test_a_named_token_keeps_its_row(tmp_path: Path) -> None:
    theirs = autoregressive.model("llama", V)
    source = autoregressive.save(tmp_path / "source", theirs, WORDS)
    done = llada.adapt(source, tmp_path / "out", mask_token="<|was_eot_id|>")
    assert done.mask.how == "named"
    model = llada.load_model(done.folder)
    assert torch.equal(model.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    assert model.config.mask_token_id == WORDS.convert_tokens_to_ids("<|was_eot_id|>")


def test_configuration_tokenizer_and_generation_agree(tmp_path: Path) -> None:
    source = autoregressive.save(tmp_path / "source", autoregressive.model("llama", V), WORDS)
    done = llada.adapt(source, tmp_path / "out")
    model, words = llada.load_model(done.folder), llada.load_tokenizer(done.folder)
    assert (done.eos, done.eot, done.chat_template) == ("<|endoftext|>", "<|im_end|>", "marked")
    for name in ("mask", "bos", "eos", "pad"):
        assert getattr(model.config, f"{name}_token_id") == getattr(words, f"{name}_token_id"), name
    tokens = special_tokens(model, words)
    ids = {name: WORDS.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")}
    assert (tokens.mask, tokens.eos, tokens.ends) == (V, (ids["<|endoftext|>"],), (*ids.values(),))
    talk = [{"role": "user", "content": "the cat"}]
    assert len(llada.generate(model, words, [talk], gen_length=4).texts) == 1
    told = inspect(str(done.folder)).special_tokens
    assert told["eot"] == ("<|im_end|>", ids["<|im_end|>"])
    made_of = json.loads((done.folder / "config.json").read_text(encoding="utf-8"))["adapted_from"]
    assert made_of == {
        "source": str(source),
        "model_type": "llama",
        "mask_token": {"token": done.mask.token, "how": "appended"},
    }


def test_a_template_that_cannot_be_marked_is_kept_with_a_warning(tmp_path: Path) -> None:
    words = autoregressive.chatml_tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'][:3] }}{{ eos_token }}{% endfor %}"
    source = autoregressive.save(tmp_path / "source", autoregressive.model("llama", V), words)
    with pytest.warns(UserWarning, match=r"could not be marked, .* put \{% generation %\} .*chat_template\.jinja"):
        done = llada.adapt(source, tmp_path / "out")
    assert (done.chat_template, done.eos, done.eot) == ("source", "<|endoftext|>", "<|im_end|>")
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    again = llada.load_tokenizer(done.folder)  # whose eos_token is another one than the template was written for
    assert again.apply_chat_template(talk, tokenize=False) == words.apply_chat_template(talk, tokenize=False)


@pytest.mark.parametrize(("turn", "kept"), [("<|im_end|>", True), ("<|eot_id|>", False)])
def test_a_template_that_cannot_be_marked_beside_lladas_markers(turn: str, kept: bool, tmp_path: Path) -> None:
    markers = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    words = autoregressive.chatml_tokenizer(*markers, eos_token=turn)
    words.chat_template = f"{{% for m in messages %}}{{{{ m['content'][:3] + '{turn}' }}}}{{% endfor %}}"
    source = autoregressive.save(tmp_path / "source", autoregressive.model("llama", len(words)), words)
    with pytest.warns(
        UserWarning, match="could not be marked, and is" if kept else "could not be marked for fine-tuning: LLaDA's"
    ):
        done = llada.adapt(source, tmp_path / "out")
    again = llada.load_tokenizer(done.folder)
    assert (done.chat_template, done.eot, again.eot_token) == ("source" if kept else "llada", turn, turn)
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    assert again.apply_chat_template(talk, tokenize=False).endswith(f"wor{turn}" if kept else f"world{turn}")


@pytest.mark.parametrize(
    ("begin", "end"), [("{% generation %}", "{% endgeneration %}"), ("{%- generation -%}", "{%- endgeneration -%}")]
)
def test_a_template_with_marks_of_its_own_is_not_called_lladas(begin: str, end: str, tmp_path: Path) -> None:
    words = autoregressive.chatml_tokenizer("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    words.chat_template = (  # its blanks are cut on one side alone: no template is written from it
        "{% for m in messages %}{{ m['role'] + ': ' }}"
        f"{begin}{{{{ m['content'].lstrip() + '<|im_end|>' }}}}{end}{{% endfor %}}"
    )
    source = autoregressive.save(tmp_path / "source", autoregressive.model("llama", len(words)), words)
    done = llada.adapt(source, tmp_path / "out")
    again = llada.load_tokenizer(done.folder)
    assert done.chat_template == "marked"
    assert words.chat_template in again.chat_template
    check_chat_template(again)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(dtype="bfloat61"), OptionError, "dtype 'bfloat61' does not exist"),
        (dict(max_shard_size="big"), OptionError, "max_shard_size 'big'"),
        (dict(mask_token="reserved"), CheckpointError, "no spare id: .* --mask_token append"),
        (dict(mask_token="<|im_ende|>"), OptionError, r"is no token .* Did you mean '<\|im_end\|>'\?"),
        (dict(mask_token="<|im_end|>"), OptionError, "is the tokenizer's eot_token"),
        (dict(mask_token="<|endoftext|>"), OptionError, "is the tokenizer's eos_token"),
    ],
)
def test_a_wrong_option_is_an_error_and_nothing_is_written(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    source = autoregressive.save(tmp_path / "source", autoregressive.model("llama", V), WORDS)
    (source / "model.safetensors").unlink()  # errors come before weights are looked for
    with pytest.raises(error, match=message):
        llada.adapt(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not empty: name a folder that does not exist"):
        llada.adapt("anything", tmp_path.parent)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = autoregressive.save(tmp_path / "source", autoregressive.model("llama", V), WORDS)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(WORDS), "save_pretrained", full)
    with pytest.raises(OptionError, match=r"out could not be written: .*No space left on device\. Name another folder"):
        llada.adapt(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
