"""`shift_logits`: the logits of the published model moved by one, whatever rows, documents and padding they come in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import cases
from torch import Tensor
from training.commands import PRETRAIN, SFT, SHAPE

from dllm.errors import CheckpointError
from dllm.layers.attention import AttentionPlan, RaggedRows
from dllm.layers.trunk import states_before
from dllm.pipelines import llada
from dllm.pipelines.llada.conversion import convert
from dllm.pipelines.llada.inspection import inspect
from dllm.sampling.network import is_shifted

NAME = "llada_dense_gqa_tied"


@pytest.fixture(autouse=True)
def no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("train" in request.node.name):
        yield


@pytest.fixture(scope="module")
def model() -> llada.LLaDAModelLM:
    model = llada.load_model(cases.folder(NAME))
    model.config.shift_logits = True
    return model


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return cases.forward_case(NAME)


def moved(logits_LV: Tensor) -> Tensor:
    """Row by row: the first stays, every other is what stood before it."""
    return torch.stack([logits_LV[max(0, place - 1)] for place in range(len(logits_LV))])


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=cases.TOLERANCE)


# --- the model


def test_logits_are_those_of_the_position_before(model: llada.LLaDAModelLM, golden: dict[str, Tensor]) -> None:
    expected = torch.stack(list(map(moved, golden["logits"])))
    assert (expected - golden["logits"]).abs().max() > 1
    assert_near(model(golden["input_ids"]).logits, expected)
    for row in range(3):
        assert_near(model(golden["input_ids"][row : row + 1]).logits[0], expected[row])


def test_padding_on_either_side_leaves_no_trace(model: llada.LLaDAModelLM, golden: dict[str, Tensor]) -> None:
    logits = model(golden["padded_input_ids"], attention_mask=golden["attention_mask"]).logits
    assert (golden["attention_mask"][:, 0] == 0).any(), "one row is padded on the left"
    for row, real in enumerate(golden["attention_mask"].bool()):
        assert_near(logits[row, real], moved(golden["padded_logits"][row, real]))


def test_documents_are_what_they_are_alone(model: llada.LLaDAModelLM, golden: dict[str, Tensor]) -> None:
    """The last one has the first one's id, and the end of the second is hidden."""
    ids, lengths = golden["input_ids"][:1], (7, 1, 12, 6)
    document_ids = torch.repeat_interleave(torch.tensor([0, 1, 2, 0]), torch.tensor(lengths))[None]
    mask = torch.ones_like(ids)
    mask[0, 17:20] = 0
    logits = model(ids, document_ids=document_ids, attention_mask=mask).logits[0]
    for place in (slice(0, 7), slice(7, 8), slice(8, 17), slice(20, 26)):
        assert_near(logits[place], model(ids[:, place]).logits[0])


def test_rows_packed_behind_each_other_are_what_they_are_alone(
    model: llada.LLaDAModelLM, golden: dict[str, Tensor]
) -> None:
    rows = [golden["input_ids"][0, :5], golden["input_ids"][1, :1], golden["input_ids"][2, :9]]
    lengths = [len(row) for row in rows]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(torch.cat(rows)[None], attention_mask=RaggedRows(lengths, "cpu"), position_ids=position_ids)
    for found, row in zip(packed.logits[0].split(lengths), rows, strict=True):
        assert_near(found, model(row[None]).logits[0])


def test_where_positions_do_not_follow_a_state_is_its_own() -> None:
    hidden_BLD = torch.arange(12.0).view(2, 6, 1)
    position_ids = torch.tensor([[3, 4, 6, 7, 0, 1]])
    found = states_before(hidden_BLD, None, position_ids, None)[..., 0].tolist()
    assert found == [[0, 0, 2, 2, 4, 4], [6, 6, 8, 8, 10, 10]]
    each_row = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    assert states_before(hidden_BLD, None, each_row, None)[..., 0].tolist() == [
        [0, 0, 1, 2, 3, 4],
        [6, 7, 8, 9, 10, 11],
    ]
    assert states_before(hidden_BLD[:, :1], None, None, None).tolist() == [[[0]], [[6]]]


def test_no_number_is_read_to_the_host(golden: dict[str, Tensor]) -> None:
    """On a device that holds no numbers there is none to be read."""
    hidden_BLD, ids_BL = torch.empty(3, 26, 8, device="meta"), torch.empty(3, 26, dtype=torch.int64, device="meta")
    assert states_before(hidden_BLD, ids_BL, ids_BL, ids_BL).shape == (3, 26, 8)


def test_logits_to_keep_are_some_of_all(model: llada.LLaDAModelLM, golden: dict[str, Tensor]) -> None:
    ids = golden["input_ids"]
    every = model(ids).logits
    wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    index = torch.tensor([20, 0, 3])
    assert_near(model(ids, logits_to_keep=wanted).logits, every[wanted])
    assert_near(model(ids, logits_to_keep=index).logits, every[:, index])
    assert_near(model(ids, logits_to_keep=4).logits, every[:, -4:])


def test_the_loss_of_targets_is_that_of_the_logits(model: llada.LLaDAModelLM, golden: dict[str, Tensor]) -> None:
    ids, mask = golden["padded_input_ids"], golden["attention_mask"]
    wanted = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5) & (mask == 1)
    logits = model(ids, attention_mask=mask).logits[wanted]
    expected = torch.nn.functional.cross_entropy(logits, ids[wanted], reduction="none")
    done = model(ids, attention_mask=mask, logits_to_keep=wanted, targets=ids[wanted])
    assert_near(done.nll, expected)
    torch.testing.assert_close(done.loss, expected.sum(), rtol=1e-5, atol=0)


def test_hidden_states_stay_where_they_are(model: llada.LLaDAModelLM, golden: dict[str, Tensor]) -> None:
    done = model(golden["input_ids"], output_hidden_states=True)
    logits = torch.nn.functional.linear(done.hidden_states[-1], model.get_output_embeddings().weight)
    assert_near(logits, golden["logits"])
    assert_near(done.logits[0], moved(logits[0]))


class Causal(AttentionPlan):
    """The mask of an autoregressive model, put back."""

    def mix(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=module.scaling
        )
        return mixed.transpose(1, 2)


def test_with_a_causal_mask_a_token_is_predicted_from_what_is_before_it(
    model: llada.LLaDAModelLM, golden: dict[str, Tensor]
) -> None:
    ids = golden["input_ids"][:1]
    other = ids.clone()
    other[0, 9] = (ids[0, 9] + 1) % 200
    places = torch.arange(26)[None]
    one, two = (model(x, attention_mask=Causal(), position_ids=places).logits[0] for x in (ids, other))
    assert_near(one[:10], two[:10])
    assert ((one - two)[10:].abs().amax(1) > 1e-3).all()


# --- the configuration


def test_it_is_written_only_where_it_is_true_and_comes_back(model: llada.LLaDAModelLM, tmp_path: Path) -> None:
    assert not hasattr(llada.load_model(cases.folder("llada_moe")).config, "shift_logits")
    assert llada.load_model(cases.folder(NAME)).config.shift_logits is False
    llada.load_model(cases.folder(NAME)).config.save_pretrained(tmp_path)
    assert "shift_logits" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Only the model is written"):
        written = convert(str(tmp_path), tmp_path / "written", dtype="bfloat16")
    assert json.loads((written / "config.json").read_text(encoding="utf-8"))["shift_logits"] is True
    assert llada.load_model(written).config.shift_logits is True
    assert inspect(str(written)).shift_logits is True
    assert inspect(str(cases.folder(NAME))).shift_logits is False


def test_a_mixture_has_none() -> None:
    settings = json.loads((cases.folder("llada_moe") / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(CheckpointError, match="shift_logits=True, an architecture that dllm does not implement"):
        llada.LLaDAMoEConfig(**settings, shift_logits=True)


def test_sampling_learns_it_from_the_configuration(model: llada.LLaDAModelLM) -> None:
    assert is_shifted(llada.network.network_of(model))
    assert not is_shifted(llada.network.network_of(llada.load_model(cases.folder(NAME))))


# --- training


def pretrained(folder: Path) -> str:
    fresh = ["--config_overrides", f"{SHAPE},shift_logits=true", "--document_masks", "True"]
    short = ["--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    llada.pretrain([*PRETRAIN, *fresh, *short, "--output_dir", str(folder)])
    return str(folder / "checkpoint-final")


def test_it_trains_with_document_masks_and_is_sampled_from(tmp_path: Path) -> None:
    final = pretrained(tmp_path / "pt")
    model, tokenizer = llada.load_model(final), llada.load_tokenizer(final)
    assert model.config.shift_logits is True
    options: dict[str, Any] = dict(gen_length=6, block_length=3, cache="dual")
    prompts = ["1+1=", "12+30=", "7"]
    together = llada.generate(model, tokenizer, prompts, **options)
    with llada.Engine(model, tokenizer, max_rows=2) as engine:
        assert engine.generate(prompts, **options).texts == together.texts


@pytest.mark.slow
def test_it_trains_on_packed_conversations(tmp_path: Path) -> None:
    tuning = ["--model_name_or_path", pretrained(tmp_path / "pt"), "--packing", "True", "--max_steps", "2"]
    llada.sft([*SFT, *tuning, "--output_dir", str(tmp_path / "sft")])
    assert llada.load_model(str(tmp_path / "sft" / "checkpoint-final")).config.shift_logits is True
