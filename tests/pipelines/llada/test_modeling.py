"""Dense LLaDA: the logits of the published implementation, whatever the padding, the kernel and the dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import cases
from reference.models import dense_logits
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerBase

from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAConfig, LLaDAModel, LLaDAModelLM
from dllm.pipelines.llada.tokenizer import char_tokenizer

both = pytest.mark.parametrize("name", cases.DENSE)


def load(name: str, **kwargs: Any) -> LLaDAModelLM:
    return llada.load_model(str(cases.folder(name)), **kwargs)


@cache
def shared(name: str) -> LLaDAModelLM:
    """For tests that leave the model as it is."""
    return load(name)


@pytest.fixture(autouse=True)
def no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def assert_near(found: Tensor, expected: Tensor, bound: float = cases.TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound, check_dtype=False)


@both
def test_logits_are_those_of_the_published_model(name: str) -> None:
    golden = cases.forward_case(name)
    logits = shared(name)(golden["input_ids"]).logits
    assert logits.dtype == torch.float32
    assert_near(logits, golden["logits"])


@both
def test_padding_on_either_side_leaves_the_logits_alone(name: str) -> None:
    golden = cases.forward_case(name)
    real = golden["attention_mask"].bool()
    logits = shared(name)(golden["padded_input_ids"], attention_mask=golden["attention_mask"]).logits
    assert_near(logits.masked_fill(~real[..., None], 0.0), golden["padded_logits"])


@both
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_alone_gives_what_it_gives_in_company(name: str, row: int) -> None:
    golden = cases.forward_case(name)
    real = golden["attention_mask"][row].bool()
    alone = shared(name)(golden["padded_input_ids"][row, real][None]).logits[0]
    assert_near(alone, golden["padded_logits"][row, real])


@both
def test_tokens_under_padding_leave_no_trace(name: str) -> None:
    golden = cases.forward_case(name)
    ids, mask = golden["padded_input_ids"], golden["attention_mask"]
    other = torch.where(mask.bool(), ids, 7)
    assert not torch.equal(ids, other)
    logits = [shared(name)(x, attention_mask=mask).logits[mask.bool()] for x in (ids, other)]
    assert torch.equal(*logits)


@both
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_the_dtype_of_the_mask_does_not_matter(name: str, dtype: torch.dtype) -> None:
    golden = cases.forward_case(name)
    ids, mask = golden["padded_input_ids"], golden["attention_mask"]
    real = mask.bool()
    logits = [shared(name)(ids, attention_mask=m).logits[real] for m in (mask, mask.to(dtype))]
    assert torch.equal(*logits)


@both
def test_the_first_position_reads_the_last_token(name: str) -> None:
    ids = cases.forward_case(name)["input_ids"]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 200
    change = shared(name)(ids).logits - shared(name)(other).logits
    assert (change[:, 0].abs().amax(1) > 1e-3).all()


@both
def test_eager_attention_gives_the_same_logits(name: str) -> None:
    golden = cases.forward_case(name)
    eager = load(name, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert shared(name).config._attn_implementation == "sdpa"
    logits = eager(golden["padded_input_ids"], attention_mask=golden["attention_mask"]).logits
    assert_near(logits.masked_fill(golden["attention_mask"][..., None] == 0, 0.0), golden["padded_logits"])


@both
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_bf16_stays_near_fp32(name: str, kernel: str) -> None:
    golden = cases.forward_case(name)
    model = load(name, dtype=torch.bfloat16, attn_implementation=kernel)
    real = golden["attention_mask"].bool()
    logits = model(golden["padded_input_ids"], attention_mask=golden["attention_mask"]).logits
    assert logits.dtype == torch.bfloat16
    # weights, sums and norms rounded to 8 bits: 2 % of the size of the logits on average, which is 4 and at most 17
    error = logits[real].float() - golden["padded_logits"][real]
    assert error.square().mean().sqrt() < 0.03 * golden["padded_logits"][real].square().mean().sqrt()
    assert error.abs().max() < 0.5


@both
def test_positions_are_relative(name: str) -> None:
    golden = cases.forward_case(name)
    ids = golden["input_ids"]
    places = torch.arange(ids.shape[1])[None]
    assert torch.equal(shared(name)(ids, position_ids=places).logits, shared(name)(ids).logits)
    assert_near(shared(name)(ids, position_ids=places + 100).logits, golden["logits"], 1e-3)
    assert (shared(name)(ids, position_ids=places * 2).logits - golden["logits"]).abs().max() > 0.1


@both
def test_packed_documents_give_what_they_give_alone(name: str) -> None:
    golden = cases.forward_case(name)
    ids = golden["input_ids"]
    documents = torch.arange(3).repeat_interleave(26)[None]
    packed = shared(name)(ids.reshape(1, -1), document_ids=documents).logits
    assert_near(packed.view(3, 26, -1), golden["logits"])


@both
def test_hidden_states_are_the_input_of_every_block_and_the_end(name: str) -> None:
    model, golden = shared(name), cases.forward_case(name)
    out = model(golden["input_ids"], output_hidden_states=True)
    states = out.hidden_states
    assert [tuple(state.shape) for state in states] == [(3, 26, 64)] * 3
    assert torch.equal(states[0], model.model.transformer["wte"](golden["input_ids"]))
    assert torch.equal(torch.nn.functional.linear(states[-1], model.get_output_embeddings().weight), out.logits)
    base = model.model(golden["input_ids"], output_hidden_states=True)
    assert torch.equal(base.last_hidden_state, states[-1])
    for one, other in zip(base.hidden_states, states, strict=True):
        assert torch.equal(one, other)
    assert model(golden["input_ids"]).hidden_states is None


@both
@pytest.mark.parametrize("count", [1, 5, 26])
def test_a_number_of_logits_to_keep_means_the_last(name: str, count: int) -> None:
    golden = cases.forward_case(name)
    logits = shared(name)(golden["input_ids"], logits_to_keep=count).logits
    assert_near(logits, golden["logits"][:, -count:])
    assert logits.shape == (3, count, 256)


@both
def test_logits_to_keep_may_be_positions_or_a_mask(name: str) -> None:
    golden = cases.forward_case(name)
    ids, expected = golden["input_ids"], golden["logits"]
    index = torch.tensor([20, 0, 3])
    assert_near(shared(name)(ids, logits_to_keep=index).logits, expected[:, index])
    wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    kept = shared(name)(ids, logits_to_keep=wanted).logits
    assert kept.shape == (int(wanted.sum()), 256)
    assert_near(kept, expected[wanted])
    assert shared(name)(ids, logits_to_keep=torch.zeros_like(wanted)).logits.shape == (0, 256)
    assert_near(shared(name)(ids, logits_to_keep=0).logits, expected)


@both
def test_embeddings_may_stand_in_for_ids(name: str) -> None:
    model, golden = shared(name), cases.forward_case(name)
    embedded = model.get_input_embeddings()(golden["input_ids"])
    assert torch.equal(model(inputs_embeds=embedded).logits, model(golden["input_ids"]).logits)
    for wrong in ({}, {"input_ids": golden["input_ids"], "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            model(**wrong)


def gradients(model: LLaDAModelLM, golden: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = model(golden["padded_input_ids"], attention_mask=golden["attention_mask"]).logits
    real = golden["attention_mask"].bool()
    torch.nn.functional.cross_entropy(logits[real], golden["input_ids"][real]).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


@both
def test_gradient_checkpointing_gives_the_same_gradient(name: str) -> None:
    golden = cases.forward_case(name)
    plain, saving = load(name).train(), load(name).train()
    runs: list[int] = []
    for block in saving.model.transformer["blocks"]:
        block.attn_norm.register_forward_hook(lambda *_: runs.append(1))
    # the name since transformers 5.23, or the one before
    getattr(saving, "activation_checkpointing_enable", saving.gradient_checkpointing_enable)()
    expected, found = gradients(plain, golden), gradients(saving, golden)
    assert len(runs) == 2 * 2, "each of the two blocks runs forward, and again for its gradient"
    assert expected.keys() == found.keys() == dict(plain.named_parameters()).keys()
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key


@both
def test_what_is_saved_has_the_names_and_tensors_that_were_loaded(name: str, tmp_path: Path) -> None:
    shared(name).save_pretrained(tmp_path)
    with (
        safe_open(cases.folder(name) / "model.safetensors", "pt") as golden,
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
    ):
        assert set(saved.keys()) == set(golden.keys())
        for key in golden.keys():  # noqa: SIM118  not a dict
            assert torch.equal(saved.get_tensor(key), golden.get_tensor(key)), key
    again, ids = llada.load_model(str(tmp_path)), cases.forward_case(name)["input_ids"]
    assert torch.equal(again(ids).logits, shared(name)(ids).logits)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    given = json.loads((cases.folder(name) / "config.json").read_text(encoding="utf-8"))
    assert {key: config.get(key, "absent") for key in given} == given


def test_large_models_are_saved_in_shards_that_load(tmp_path: Path) -> None:
    shared("llada_dense").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ids = cases.forward_case("llada_dense")["input_ids"]
    assert torch.equal(llada.load_model(str(tmp_path))(ids).logits, shared("llada_dense")(ids).logits)


@both
def test_transformers_own_classes_load_it(name: str) -> None:
    golden = cases.forward_case(name)
    for kind in (AutoModelForMaskedLM, LLaDAModelLM):
        model = kind.from_pretrained(cases.folder(name))
        assert type(model) is LLaDAModelLM
        assert_near(model(golden["input_ids"]).logits, golden["logits"])
    assert type(AutoModel.from_config(shared(name).config)) is LLaDAModel


def test_a_tied_model_has_one_table() -> None:
    tied, untied = shared("llada_dense_gqa_tied"), shared("llada_dense")
    assert tied.get_output_embeddings() is tied.get_input_embeddings()
    assert not any("ff_out" in key and "blocks" not in key for key in tied.state_dict())
    assert untied.get_output_embeddings() is not untied.get_input_embeddings()


def small(**changes: Any) -> LLaDAModelLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=60, d_model=64, n_heads=4, n_layers=3, mlp_hidden_size=96, max_sequence_length=32)
    return LLaDAModelLM(LLaDAConfig(**{**shape, **changes}))


def test_the_table_has_embedding_size_rows_where_that_differs_from_the_vocabulary() -> None:
    model = small(vocab_size=60, embedding_size=64)
    assert model.get_input_embeddings().weight.shape == (64, 64)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)


def test_queries_keys_and_values_may_have_biases(tmp_path: Path) -> None:
    model = small(include_qkv_bias=True, n_kv_heads=2).eval()
    biases = {key: p for key, p in model.named_parameters() if key.endswith("bias")}
    assert {key.split(".", 4)[4] for key in biases} == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert len(biases) == 9
    assert not any(p.any() for p in biases.values())  # they start at nothing
    for bias in biases.values():
        bias.normal_()
    ids = torch.tensor([[1, 2, 3, 4, 5], [7, 8, 9, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = dense_logits(model.state_dict(), model.config, ids, real)
    assert_near(model(ids, attention_mask=real).logits[real.bool()], expected[real.bool()])
    model.save_pretrained(tmp_path)
    again = llada.load_model(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["include_qkv_bias"] is True
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_gradients_reach_the_biases() -> None:
    model = small(include_qkv_bias=True)
    model(torch.tensor([[1, 2, 3, 4, 5]])).logits.square().mean().backward()
    assert all(
        p.grad is not None and p.grad.any() for key, p in model.named_parameters() if key.endswith("q_proj.bias")
    )


@pytest.mark.parametrize("weight_tying", [False, True])
def test_a_fresh_model_starts_as_the_public_ones_did(weight_tying: bool) -> None:
    model = small(d_model=256, mlp_hidden_size=512, vocab_size=300, weight_tying=weight_tying)
    for key, parameter in model.named_parameters():
        if "norm" in key or "ln_f" in key:
            assert torch.equal(parameter, torch.ones_like(parameter)), key
            continue
        expected = 256**-0.5
        if "blocks" in key and ("attn_out" in key or "ff_out" in key):
            layer = int(key.split(".")[3])
            expected = 1 / math.sqrt(2 * parameter.shape[1] * (layer + 1))
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), key
        assert abs(parameter.mean().item()) < 0.02 * expected, key


def test_init_std_sets_the_start_where_init_fn_is_another() -> None:
    model = small(d_model=256, init_fn="normal", init_std=0.07)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.07, rel=0.03), key


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return char_tokenizer()


def test_a_fresh_model_takes_a_checkpoints_shape_and_not_its_weights(tokenizer: PreTrainedTokenizerBase) -> None:
    for name in cases.DENSE:
        fresh = llada.fresh_model(str(cases.folder(name)), tokenizer)
        made, there = (
            {key: value for key, value in model.state_dict().items() if ".blocks." in key}  # the tokenizer is another
            for model in (fresh, shared(name))
        )
        assert {key: value.shape for key, value in made.items()} == {key: value.shape for key, value in there.items()}
        assert not any(torch.equal(made[key], there[key]) for key in made if "norm" not in key)


@both
def test_the_vocabulary_can_grow_and_be_saved(name: str, tmp_path: Path) -> None:
    model, golden = load(name), cases.forward_case(name)
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path)
    for grown in (model, llada.load_model(str(tmp_path))):
        logits = grown(golden["input_ids"]).logits
        assert logits.shape[-1] == 260
        assert_near(logits[..., :256], golden["logits"])
