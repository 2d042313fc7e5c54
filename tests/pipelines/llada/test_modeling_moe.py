"""LLaDA-MoE: the logits of the published implementation, whatever the padding, the experts' path and the dtype."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import cases
from reference.models import dense_logits, moe_logits
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM

from dllm.cli.main import main
from dllm.errors import CheckpointError
from dllm.layers.experts import load_balancing_loss
from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModel, LLaDAMoEModelLM
from dllm.training.callbacks import read_log

FOLDER = cases.folder("llada_moe")
PATHS = ("eager", "grouped_mm", "batched_mm")
every_path = pytest.mark.parametrize("path", PATHS)
SHAPE: dict[str, Any] = dict(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_experts=4,
    num_experts_per_tok=2,
    expert_intermediate_size=24,
    dense_intermediate_size=24,
    max_position_embeddings=64,
    mask_token_id=59,
    eos_token_id=58,
    pad_token_id=58,
)


@pytest.fixture(autouse=True)
def no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


@cache
def shared(path: str | None = None) -> LLaDAMoEModelLM:
    """For tests that leave the model as it is."""
    return load() if path is None else load(experts_implementation=path)


def load(**kwargs: Any) -> LLaDAMoEModelLM:
    return llada.load_model(FOLDER, **kwargs)


def small(seed: int = 0, **changes: Any) -> LLaDAMoEModelLM:
    """Random weights, large enough that experts and heads differ."""
    torch.manual_seed(seed)
    model = LLaDAMoEModelLM(LLaDAMoEConfig(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
            assert "weight" in key or "proj" in key
    return model


def saved(model: LLaDAMoEModelLM, folder: Path) -> dict[str, Tensor]:
    """The tensors of the file that it writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def golden() -> dict[str, Tensor]:
    return cases.forward_case("llada_moe")


def assert_near(found: Tensor, expected: Tensor, bound: float = cases.TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound, check_dtype=False)


# --- logits


@pytest.mark.parametrize("name", [*cases.DENSE, "llada_moe"])
def test_the_models_written_out_give_the_published_logits(name: str) -> None:
    tensors, case = load_file(cases.folder(name) / "model.safetensors"), cases.forward_case(name)
    config = llada.load_model(cases.folder(name)).config
    slow = moe_logits if name == "llada_moe" else dense_logits
    assert_near(slow(tensors, config, case["input_ids"]), case["logits"])
    padded = slow(tensors, config, case["padded_input_ids"], case["attention_mask"])
    assert_near(padded.masked_fill(case["attention_mask"][..., None] == 0, 0.0), case["padded_logits"])


@every_path
def test_logits_are_those_of_the_published_model(path: str) -> None:
    assert type(shared(path)) is LLaDAMoEModelLM
    assert shared(path).config._experts_implementation == path
    logits = shared(path)(golden()["input_ids"]).logits
    assert logits.dtype == torch.float32
    assert_near(logits, golden()["logits"])


@every_path
def test_padding_on_either_side_leaves_the_logits_alone(path: str) -> None:
    mask = golden()["attention_mask"]
    logits = shared(path)(golden()["padded_input_ids"], attention_mask=mask).logits
    assert_near(logits.masked_fill(mask[..., None] == 0, 0.0), golden()["padded_logits"])


@every_path
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_alone_gives_what_it_gives_in_company(path: str, row: int) -> None:
    real = golden()["attention_mask"][row].bool()
    alone = shared(path)(golden()["padded_input_ids"][row, real][None]).logits[0]
    assert_near(alone, golden()["padded_logits"][row, real])


def test_tokens_under_padding_leave_no_trace() -> None:
    ids, mask = golden()["padded_input_ids"], golden()["attention_mask"]
    other = torch.where(mask.bool(), ids, 7)
    assert not torch.equal(ids, other)
    one, two = (shared()(x, attention_mask=mask).logits[mask.bool()] for x in (ids, other))
    assert_near(one, two, 2e-5)  # other tokens change how many rows a product of experts has, and so its rounding


def test_eager_attention_gives_the_same_logits() -> None:
    eager, mask = load(attn_implementation="eager"), golden()["attention_mask"]
    logits = eager(golden()["padded_input_ids"], attention_mask=mask).logits
    assert_near(logits.masked_fill(mask[..., None] == 0, 0.0), golden()["padded_logits"])


@every_path
def test_bf16_stays_near_fp32(path: str) -> None:
    model, real = load(dtype=torch.bfloat16, experts_implementation=path), golden()["attention_mask"].bool()
    logits = model(golden()["padded_input_ids"], attention_mask=golden()["attention_mask"]).logits
    assert logits.dtype == torch.bfloat16
    # as the dense model's 3 %, and a token near the edge between two experts may take the other one
    error = logits[real].float() - golden()["padded_logits"][real]
    assert error.square().mean().sqrt() < 0.06 * golden()["padded_logits"][real].square().mean().sqrt()


def test_only_the_logits_that_are_asked_for() -> None:
    ids, expected = golden()["input_ids"], golden()["logits"]
    wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    for keep, part in (
        (wanted, expected[wanted]),
        (4, expected[:, -4:]),
        (torch.tensor([20, 0]), expected[:, [20, 0]]),
    ):
        found = shared()(ids, logits_to_keep=keep).logits
        assert found.shape == part.shape
        assert_near(found, part)


def test_hidden_states_are_the_input_of_every_block_and_the_end() -> None:
    out = shared()(golden()["input_ids"], output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], shared().get_input_embeddings()(golden()["input_ids"]))
    assert torch.equal(shared().lm_head(out.hidden_states[-1]), out.logits)
    assert shared()(golden()["input_ids"]).hidden_states is None


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": True},
        {"norm_topk_prob": False},
        {"num_key_value_heads": 2},
        {"qk_layernorm": False},
        {"head_dim": 16},
        {"num_experts_per_tok": 4},
        {"rms_norm_eps": 0.1, "rope_theta": 100},
    ],
)
def test_other_shapes_are_those_of_the_model_written_out(changes: dict[str, Any], tmp_path: Path) -> None:
    model = small(**changes)
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, 7:] = mask[1, :2] = 0
    slow = moe_logits(saved(model, tmp_path), model.config, ids, mask)
    assert_near(model(ids, attention_mask=mask).logits[mask.bool()], slow[mask.bool()], 5e-4)
    again = llada.load_model(tmp_path)
    assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("frequency", [[0, 1], 2])
def test_a_dense_layer_is_as_a_mixture_of_equal_experts(frequency: list[int] | int, tmp_path: Path) -> None:
    model = small(moe_layer_freq=frequency, norm_topk_prob=True)
    mixtures = [0, 1] if frequency == [0, 1] else [1, 0]
    assert ["mlp.gate.weight" in dict(layer.named_parameters()) for layer in model.model.layers] == [
        bool(mixture) for mixture in mixtures
    ]
    tensors = saved(model, tmp_path)
    dense = mixtures.index(0)
    for part in ("gate", "up", "down"):
        weight = tensors.pop(f"model.layers.{dense}.mlp.{part}_proj.weight")
        assert weight.shape == ((32, 24) if part == "down" else (24, 32))
        tensors |= {f"model.layers.{dense}.mlp.experts.{e}.{part}_proj.weight": weight for e in range(4)}
    tensors[f"model.layers.{dense}.mlp.gate.weight"] = torch.zeros(4, 32)  # any weights do: they sum to 1
    ids = torch.arange(20).view(2, 10)
    assert_near(model(ids).logits, moe_logits(tensors, model.config, ids), 5e-4)
    assert len(model(ids, output_router_logits=True).router_logits) == 1
    assert torch.equal(llada.load_model(tmp_path)(ids).logits, model(ids).logits)


# --- sampling


@pytest.mark.parametrize("case", cases.sampling_settings("llada_moe"))
def test_tokens_are_those_of_the_published_sampler(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared().config, "mask_token_id", 250)  # public files leave it to the tokenizer
    prompts, canvases = cases.sampling_case("llada_moe", case)
    result = llada.generate(shared(), None, prompts, **cases.sampling_settings("llada_moe")[case])
    assert [row.tolist() for row in result.sequences] == [row.tolist() for row in canvases]


def test_sampling_without_a_mask_id_is_an_error() -> None:
    message = r"says mask_token_id=None and the tokenizer says None.*set mask_token_id in config.json"
    for front_door in (llada.generate, llada.infilling):
        with pytest.raises(CheckpointError, match=message):
            front_door(shared(), None, [[1, 2, 3]])


# --- the router


@pytest.mark.parametrize("asked", ["by argument", "by configuration"])
def test_router_logits_come_on_request(asked: str) -> None:
    ids, mask = golden()["padded_input_ids"], golden()["attention_mask"]
    plain = shared()(ids, attention_mask=mask)
    assert plain.router_logits is None
    assert plain.aux_loss is None
    model = load()
    model.config.output_router_logits = asked == "by configuration"
    out = model(ids, attention_mask=mask, output_router_logits=None if asked == "by configuration" else True)
    assert [tuple(part.shape) for part in out.router_logits] == [(3 * 26, 8)] * 2
    assert_near(out.logits[mask.bool()], plain.logits[mask.bool()])
    # the router reads the normed stream that its block's experts read
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    model(ids, attention_mask=mask)
    hook.remove()
    assert torch.equal(seen[0] @ model.model.layers[1].mlp.gate.weight.T, out.router_logits[1])
    assert_near(out.aux_loss, load_balancing_loss(out.router_logits, 2, mask), 0)
    assert out.aux_loss != load_balancing_loss(out.router_logits, 2), "padding does not count"


def test_the_auxiliary_loss_is_there_in_training_with_a_coefficient() -> None:
    ids = golden()["input_ids"]
    model = load()
    assert model(ids).aux_loss is None
    model.train()
    assert model(ids).router_logits is None
    assert_near(model(ids).aux_loss, load_balancing_loss(shared()(ids, output_router_logits=True).router_logits, 2))
    assert model(ids, logits_to_keep=torch.zeros_like(ids).bool()).aux_loss == model(ids).aux_loss
    model.config.router_aux_loss_coef = 0.0
    assert model(ids).aux_loss is None


def test_the_gradient_of_the_auxiliary_loss_reaches_every_router() -> None:
    model = load().train()
    model(golden()["input_ids"]).aux_loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 1e-5
    assert model.model.layers[-1].mlp.experts.down_proj.grad is None, "no router reads what the last experts write"


def first_loss(folder: Path, coefficient: float, *arguments: str) -> tuple[float, float]:
    """(training loss of the first step, evaluation loss) of a fresh moe-tiny; every run begins with the same weights."""
    shape = f"num_hidden_layers=2,hidden_size=32,expert_intermediate_size=16,router_aux_loss_coef={coefficient}"
    command = ["pretrain", "--model_name_or_path", "moe-tiny", "--config_overrides", shape, "--max_length", "24"]
    command += ["--dataset_args", "builtin:addition[train:60,test:8]", "--max_steps", "2", "--logging_steps", "1"]
    command += [
        "--bf16",
        "False",
        "--report_to",
        "none",
        "--learning_rate",
        "0",
        "--output_dir",
        str(folder),
        *arguments,
    ]
    assert main(command) == 0
    log = read_log(folder / "log.jsonl")
    return log[0]["loss"], next(row["eval_loss"] for row in log if "eval_loss" in row)


def test_the_auxiliary_loss_reaches_the_trainers_loss_and_its_gradient_the_routers(tmp_path: Path) -> None:
    without, half, whole = (first_loss(tmp_path / str(c), c) for c in (0.0, 0.5, 1.0))
    # an untrained router spreads its tokens nearly evenly, and the loss of an even load is k = 2
    assert whole[0] - without[0] == pytest.approx(2.0, abs=0.15)
    assert half[0] - without[0] == pytest.approx((whole[0] - without[0]) / 2, abs=2e-4)
    assert whole[1] == without[1], "evaluation is the likelihood's bound alone"
    accumulated = ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"]
    parts = [first_loss(tmp_path / f"{c} of 2", c, *accumulated) for c in (0.0, 1.0)]
    assert parts[1][0] - parts[0][0] == pytest.approx(2.0, abs=0.15)
    routers = {}
    for coefficient in (0.0, 1.0):
        first_loss(tmp_path / f"moved{coefficient}", coefficient, "--learning_rate", "0.01")
        routers[coefficient] = load_file(tmp_path / f"moved{coefficient}/checkpoint-final/model.safetensors")
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert not torch.equal(routers[0.0][name], routers[1.0][name])


def gradients(model: LLaDAMoEModelLM, coefficient: float) -> dict[str, Tensor]:
    out = model(golden()["padded_input_ids"], attention_mask=golden()["attention_mask"])
    real = golden()["attention_mask"].bool()
    loss = torch.nn.functional.cross_entropy(out.logits[real], golden()["input_ids"][real])
    (loss + coefficient * out.aux_loss).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


@every_path
def test_gradient_checkpointing_gives_the_same_gradient(path: str) -> None:
    plain, saving = (load(experts_implementation=path).train() for _ in range(2))
    runs: list[int] = []
    for block in saving.model.layers:
        block.input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    getattr(saving, "activation_checkpointing_enable", saving.gradient_checkpointing_enable)()
    expected, found = gradients(plain, 0.5), gradients(saving, 0.5)
    assert len(runs) == 2 * 2, "each of the two blocks runs forward, and again for its gradient"
    assert expected.keys() == found.keys() == dict(plain.named_parameters()).keys()
    for key, gradient in expected.items():
        assert_near(found[key], gradient, 1e-6)


# --- saving and loading


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_what_is_saved_has_the_public_names_and_tensors(max_shard_size: str, tmp_path: Path) -> None:
    shared().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 3) is (max_shard_size == "100KB")
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    given = load_file(FOLDER / "model.safetensors")
    assert stored.keys() == given.keys()
    for key, tensor in given.items():
        assert torch.equal(stored[key], tensor), key
    assert torch.equal(llada.load_model(tmp_path)(golden()["input_ids"]).logits, shared()(golden()["input_ids"]).logits)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER, tmp_path))
    assert {key: after.get(key, "absent") for key in before} == before
    assert after["model_type"] == "llada"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_in_half_precision_it_comes_back_in_it(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = saved(load(dtype=dtype), tmp_path)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    again = llada.load_model(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}


def test_transformers_own_classes_know_both_kinds() -> None:
    assert type(AutoModel.from_config(shared().config)) is LLaDAMoEModel
    assert type(AutoModel.from_pretrained(FOLDER)) is LLaDAMoEModel
    assert type(AutoModelForMaskedLM.from_pretrained(cases.folder("llada_dense"))) is LLaDAModelLM
    assert_near(LLaDAMoEModelLM.from_pretrained(FOLDER)(golden()["input_ids"]).logits, golden()["logits"])


def test_the_base_model_loads_the_same_weights() -> None:
    base = AutoModel.from_pretrained(FOLDER)
    state = base(golden()["input_ids"]).last_hidden_state
    assert_near(shared().lm_head(state), golden()["logits"])


def test_a_tied_model_has_one_table(tmp_path: Path) -> None:
    model = small(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in saved(model, tmp_path)
    ids = torch.arange(10)[None]
    again = llada.load_model(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_the_vocabulary_can_grow_and_be_saved(tmp_path: Path) -> None:
    model = load()
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path)
    for grown in (model, llada.load_model(tmp_path)):
        logits = grown(golden()["input_ids"]).logits
        assert logits.shape[-1] == 260
        assert_near(logits[..., :256], golden()["logits"])


def test_a_fresh_model_starts_with_a_normal_of_initializer_range() -> None:
    torch.manual_seed(0)
    model = LLaDAMoEModelLM(LLaDAMoEConfig(**{**SHAPE, "hidden_size": 64}, initializer_range=0.07))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            assert torch.equal(parameter, torch.ones_like(parameter)), key
        else:
            assert parameter.std().item() == pytest.approx(0.07, rel=0.15), key
            assert abs(parameter.mean().item()) < 0.02, key
