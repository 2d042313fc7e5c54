"""Training an adapter: what is trained, what is saved, that it loads and merges to the same logits, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import cases
from safetensors.torch import load_file
from system.workshop import ROOT, commands, marked, save_tiny_model
from torch import Tensor, nn
from training.commands import PRETRAIN, QUIET, Done, equal

from dllm.cli.main import main
from dllm.errors import CheckpointError, OptionError
from dllm.layers.adapters import QUANTISATION, SETTINGS, TENSORS, attach, base_of
from dllm.pipelines import llada
from dllm.pipelines.llada.conversion import convert
from dllm.pipelines.llada.inspection import inspect
from dllm.training.adapters import AdapterArguments, adapt, check_adapter, count_parameters, load_to_train
from dllm.training.arguments import TrainingArguments
from dllm.training.callbacks import read_log
from dllm.training.run import parse_arguments

pytest.importorskip("peft")

SFT = [
    "--dataset_args", "builtin:addition[train:12,test:4]", "--max_length", "60", "--max_steps", "4", "--save_steps", "2",
    "--lora", "--r", "2", *QUIET,
]  # fmt: skip
DENSE = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
IDS = torch.arange(4, 20)[None]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / TENSORS)


def trained_modules(model: nn.Module) -> set[str]:
    return {
        n.split(".lora_")[0].removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad
    }


def randomise(model: nn.Module) -> None:
    """Gives an adapter something to say: its second factor starts at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Done:
    """A run of 4 steps on that base, with checkpoints 2 and 4; not to be changed."""
    output = base.parent / "run"
    return Done(output, llada.sft(["--model_name_or_path", str(base), *SFT, "--output_dir", str(output)]))


def adapted(name: str, folder: Path | None = None, **options: Any) -> nn.Module:
    source = cases.folder(name) if folder is None else folder
    settings = AdapterArguments(lora=True, **{"r": 2, **options})
    model: nn.Module = adapt(llada.load_model(source), settings, checkpointing=False, name=str(source))
    return model


@pytest.mark.parametrize(("name", "layers", "head"), [
    ("llada_dense", DENSE, "model.transformer.ff_out"),
    ("llada_dense_gqa_tied", DENSE, "model.transformer.wte"),
    ("llada_moe", ["q_proj", "k_proj", "v_proj", "o_proj"], "lm_head"),
])  # fmt: skip
def test_all_linear_is_every_linear_layer_of_the_blocks_and_never_the_head(
    name: str, layers: list[str], head: str
) -> None:
    model = adapted(name)
    found = trained_modules(model)
    assert {part.rpartition(".")[2] for part in found} == set(layers)
    assert len(found) == 2 * len(layers)
    assert head not in found
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_layer_with_the_heads_name_does_not_mean_the_head() -> None:
    assert trained_modules(adapted("llada_dense", target_modules=["ff_out"])) == {
        f"model.transformer.blocks.{i}.ff_out" for i in range(2)
    }


@pytest.mark.parametrize(("name", "options"), [
    ("llada_dense", {}),
    ("llada_dense", {"use_dora": True}),
    ("llada_dense", {"use_rslora": True, "r": 4}),
    ("llada_dense", {"modules_to_save": ["transformer.ff_out"]}),
    ("llada_dense_gqa_tied", {"target_modules": ["q_proj,v_proj", "ff_out"]}),
    ("llada_moe", {}),
    ("llada_moe", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
])  # fmt: skip
def test_what_is_saved_loads_and_merges_to_the_same_logits(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(name, **options)
    before = logits(model)
    torch.testing.assert_close(before, logits(llada.load_model(cases.folder(name))), rtol=0, atol=2e-5)
    randomise(model)
    if "modules_to_save" in options:
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.data *= 1.5
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    assert base_of(tmp_path / "adapter") == str(cases.folder(name).resolve())
    kept = llada.load_model(tmp_path / "adapter", keep_adapter=True)
    assert torch.equal(logits(kept), expected)
    assert {n for n, p in kept.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    merged = llada.load_model(tmp_path / "adapter")
    assert type(merged) is type(llada.load_model(cases.folder(name)))
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-4)


def test_only_the_adapter_learns_and_a_checkpoint_holds_it_alone(tuned: Done, base: Path) -> None:
    assert sorted(p.name for p in tuned.final.iterdir()) == [
        "README.md", SETTINGS, TENSORS, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    checkpoint = tuned.output / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {TENSORS, SETTINGS, "optimizer.pt", "files.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    assert all("lora_" in key for key in stored(checkpoint))
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert sum(state["exp_avg"].numel() for state in moments.values()) == sum(
        t.numel() for t in stored(checkpoint).values()
    )
    assert not equal(stored(checkpoint), stored(tuned.final))
    assert base_of(tuned.final) == str(base.resolve())


def test_the_run_says_what_is_trained(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llada.sft(["--model_name_or_path", str(base), *SFT, "--max_steps", "1", "--output_dir", str(tmp_path / "run")])
    model = llada.load_model(base)
    whole = sum(p.numel() for p in model.parameters())
    widths = 4 * (64 + 64) + 2 * (64 + 128) + (128 + 64)
    trained = 2 * 2 * widths
    assert f"sft: {whole + trained:,} parameters, {trained:,} of them trained, 12 rows" in capsys.readouterr().out


def test_a_resumed_run_ends_in_the_same_bits(tuned: Done, base: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned.output / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    again = ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "auto"]
    final = llada.sft(["--model_name_or_path", str(base), *SFT, *again])
    assert equal(stored(final), stored(tuned.final))
    losses = {row["step"]: row["loss"] for row in read_log(tuned.output / "log.jsonl") if "loss" in row}
    resumed = {row["step"]: row["loss"] for row in read_log(tmp_path / "run" / "log.jsonl") if "loss" in row}
    assert resumed == {step: losses[step] for step in (3, 4)}


@pytest.mark.parametrize(("changes", "message"), [
    (["--r", "4"], "--r 4: the adapter of --resume_from_checkpoint .* has 2"),
    (["--target_modules", "q_proj"], "--target_modules q_proj: the adapter .* has attn_out ff_out"),
    (["--use_dora"], "--use_dora True: the adapter"),
    (["--lora", "False", "--r", "16"], "that is an adapter's checkpoint: give --lora"),
])  # fmt: skip
def test_a_checkpoint_of_another_adapter_is_refused(
    changes: list[str], message: str, tuned: Done, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tuned.output / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    again = ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "auto"]
    with pytest.raises(OptionError, match=message):
        llada.sft(["--model_name_or_path", str(base), *SFT, *again, *changes])


def test_an_adapter_is_trained_on_or_merged_and_the_model_trained_whole(
    tuned: Done, base: Path, tmp_path: Path
) -> None:
    more = [*SFT, "--max_steps", "1", "--save_strategy", "no", "--output_dir"]
    second = llada.sft(["--model_name_or_path", str(tuned.output), *more, str(tmp_path / "second")])
    assert base_of(second) == str(base.resolve())
    assert stored(second).keys() == stored(tuned.final).keys()
    assert not equal(stored(second), stored(tuned.final))
    with pytest.raises(OptionError, match=r"--r 4: the adapter .*, which is trained on, has 2"):
        llada.sft(["--model_name_or_path", str(tuned.final), *more, str(tmp_path / "third"), "--r", "4"])
    plain = [word for word in more if word not in ("--lora", "--r", "2")]
    plain[plain.index("--save_steps")] = "--logging_steps"  # its number went with the rank's
    plain.insert(plain.index("--logging_steps") + 1, "1")
    whole = llada.sft(["--model_name_or_path", str(tuned.final), *plain, str(tmp_path / "whole")])
    assert (whole / "config.json").exists()
    start = logits(llada.load_model(tuned.final))
    assert (logits(llada.load_model(whole)) - start).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_kwargs. is deprecated:FutureWarning")  # newer releases
def test_checkpoints_in_the_backward_change_nothing(base: Path, tmp_path: Path) -> None:
    found = []
    for name, kind in (("no", []), ("yes", ["--gradient_checkpointing"]), ("reentrant", ["--gradient_checkpointing"])):
        reentrant = ["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'] if name == "reentrant" else []
        words = ["--model_name_or_path", str(base), *SFT, "--max_steps", "2", "--save_strategy", "no", *kind]
        found.append(stored(llada.sft([*words, *reentrant, "--output_dir", str(tmp_path / name)])))
    for other in found[1:]:
        for key, tensor in found[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6)


def test_a_mixture_trains_its_attention_and_experts(tmp_path: Path) -> None:
    model = adapted("llada_moe", target_parameters=["experts.down_proj"])
    randomise(model)
    model.train()
    output = model(input_ids=IDS)
    assert output.aux_loss is not None
    (output.logits.logsumexp(-1).mean() + model.config.router_aux_loss_coef * output.aux_loss).backward()  # type: ignore[union-attr, operator]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


# --- QLoRA


@pytest.fixture(scope="module")
def quantised(base: Path) -> Done:
    """QLoRA on that base at a rate that shows."""
    pytest.importorskip("bitsandbytes")
    output = base.parent / "quantised"
    words = ["--model_name_or_path", str(base), *SFT, "--load_in_4bit", "--max_steps", "20", "--learning_rate", "1e-2"]
    return Done(
        output,
        llada.sft(
            [*words, "--eval_strategy", "steps", "--eval_steps", "10", "--eval_on_start", "--output_dir", str(output)]
        ),
    )


def test_a_quantised_base_is_unchanged_by_a_new_adapter(base: Path, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    args = TrainingArguments(output_dir=str(tmp_path), bf16=False)
    model = load_to_train(llada.load_model, str(base), AdapterArguments(lora=True, load_in_4bit=True), args)
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    state = layers[0].weight.quant_state
    assert (state.quant_type, state.nested, layers[0].compute_dtype) == ("nf4", True, torch.float32)
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, logits(llada.load_model(base)), atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), with_adapter)
    assert count_parameters(model)[1] == 16 * 2 * (4 * 128 + 3 * 192) + sum(
        p.numel() for p in llada.load_model(base).parameters()
    )


def test_qlora_lowers_the_loss_and_trains_the_adapter_alone(quantised: Done) -> None:
    first, *_, last = [row["eval_loss"] for row in read_log(quantised.output / "log.jsonl") if "eval_loss" in row]
    assert last < 0.8 * first
    assert all("lora_" in key for key in stored(quantised.final))


def test_qlora_loads_upon_the_quantised_base_and_merges_into_it_unpacked(quantised: Done, tmp_path: Path) -> None:
    assert json.loads((quantised.final / QUANTISATION).read_text())["bnb_4bit_quant_type"] == "nf4"
    apart = llada.load_model(quantised.final, dtype="float32")
    assert type(apart).__name__ == "LLaDAModelLM"
    assert apart.is_quantized
    with pytest.warns(UserWarning, match="was trained on weights of 4 bits. It is merged into those, unpacked"):
        written = convert(str(quantised.final), tmp_path / "merged")
    merged = llada.load_model(written)
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():  # in training's mode: for inference on a CPU bitsandbytes multiplies in bf16
        expected = apart.train()(input_ids=IDS).logits
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    unrounded = llada.load_model(quantised.final, quantization_config=None)
    assert not torch.allclose(logits(unrounded), expected, atol=1e-2)


# --- what is refused


@pytest.mark.parametrize(("words", "message"), [
    (["--r", "8"], "--r is of adapters: add --lora, or leave it out."),
    (["--load_in_4bit"], "--load_in_4bit is of adapters: add --lora"),
    (["--lora", "--load_in_4bit", "--load_in_8bit"], "--load_in_4bit --load_in_8bit: choose one."),
    (["--lora", "--use_dora", "--load_in_8bit"], "--use_dora does not go with --load_in_8bit: take --load_in_4bit"),
    (["--lora", "--r", "0"], "--r 0 --lora_alpha 32: a rank of 1 or more"),
    (["--lora", "--lora_dropout", "1"], "--lora_dropout 1.0: it is at least 0 and less than 1."),
    (["--lora", "--base_dtype", "int8"], "--base_dtype 'int8' does not exist"),
    (["--lora", "--target_parameters", "experts.down_proj", "--use_dora"], "--target_parameters takes no"),
    (["--lora", "--lora_alfa", "8"], "There is no option '--lora_alfa'. Did you mean '--lora_alpha'?"),
    (["--adapter", "x"], "There is no option '--adapter'"),
])  # fmt: skip
def test_options_that_do_not_fit_are_an_error(words: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_arguments("sft", ["--output_dir", "x", *words])


def test_an_adapter_learns_at_ten_times_the_rate_unless_said_otherwise() -> None:
    rate = lambda *words: parse_arguments("sft", ["--output_dir", "x", *words])[2].learning_rate  # noqa: E731
    assert rate("--lora") == pytest.approx(10 * rate())
    assert rate("--lora", "False") == rate()
    assert rate("--lora", "--learning_rate", "0.5") == 0.5


@pytest.mark.parametrize(("name", "options", "message"), [
    ("llada_dense", {"target_modules": ["q_prj"]}, "'q_prj' names no linear layer of this model. Did you mean 'q_proj'?"),
    ("llada_moe", {"target_modules": ["experts"]}, "experts are stacked tensors: see --target_parameters"),
    ("llada_moe", {"target_modules": ["lm_head"]}, "The head takes no adapter: see --modules_to_save."),
    ("llada_dense", {"target_parameters": ["experts.down_proj"]}, "It has none: leave the option out."),
    ("llada_moe", {"target_parameters": ["experts.up"]}, "names no stacked tensor of this model."),
    ("llada_dense", {"modules_to_save": ["wtf"]}, "--modules_to_save 'wtf' names no module of this model."),
    ("llada_dense_gqa_tied", {"modules_to_save": ["wte"]}, "embedding and head of this model are one matrix"),
])  # fmt: skip
def test_targets_that_are_not_there_are_an_error(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        adapted(name, **options)


def test_muon_and_fresh_weights_take_no_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Muon's steps are made for whole matrices"):
        llada.sft(["--model_name_or_path", str(base), *SFT, "--optimizer", "muon", "--output_dir", str(tmp_path / "a")])
    with pytest.raises(OptionError, match="pretraining starts fresh: add --continue_from_weights"):
        llada.pretrain([*PRETRAIN, "--lora", "--output_dir", str(tmp_path / "b")])


def test_a_quantised_base_is_not_divided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    args = TrainingArguments(output_dir=str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_adapter(AdapterArguments(lora=True), args, None)
    with pytest.raises(OptionError, match=r"--load_in_8bit does not go with FSDP. Take DDP"):
        check_adapter(AdapterArguments(lora=True, load_in_8bit=True), args, None)
    compiled = copy.copy(args)
    compiled.torch_compile = True
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(OptionError, match=r"--load_in_4bit does not go with --torch_compile"):
        check_adapter(AdapterArguments(lora=True, load_in_4bit=True), compiled, None)


def test_an_adapter_whose_base_has_moved_says_where_to_write_it(tuned: Done, tmp_path: Path) -> None:
    folder = shutil.copytree(tuned.final, tmp_path / "adapter")
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**settings, "base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(
        CheckpointError, match=r"there is no such folder: write where it is now as base_model_name_or_path"
    ):
        llada.load_model(folder)
    (folder / SETTINGS).write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="does not say which model the adapter changes"):
        llada.load_model(folder)
    (folder / SETTINGS).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read: copy it again"):
        llada.load_model(folder)


def test_info_names_the_base(tuned: Done, base: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is an adapter of '{base.resolve()}'"):
        inspect(str(tuned.final))


def test_an_adapter_is_put_on_a_model_that_it_fits(tuned: Done) -> None:
    with pytest.raises(CheckpointError, match="does not fit the model"):
        attach(llada.load_model(cases.folder("llada_dense")), tuned.final)


def test_the_command_line_samples_converts_and_trains_as_the_document_says(
    tuned: Done, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    small = {
        "GSAI-ML/LLaDA-8B-Base": str(base),
        "allenai/tulu-3-sft-mixture[train:10000,test:1000]": "builtin:addition[train:8,test:2]",
        "1024": "60",
        "4": "1",
    }
    shown = [words for block in marked(ROOT / "docs/training.md", "adapters") for words in commands(block)]
    assert [words[:2] for words in shown] == [
        ["dllm", "sft"], ["dllm", "sft"], ["dllm", "generate"], ["dllm", "convert"], ["dllm", "sft"],
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The adapter .* was trained on weights of 4 bits", category=UserWarning
        )
        for words in shown:
            main([small.get(word, word) for word in words[1:]])
    assert "--load_in_4bit" in shown[1]
    assert "Traceback" not in capsys.readouterr().out
    (merged,) = (words[3] for words in shown if words[1] == "convert")
    assert (tmp_path / merged / "config.json").exists()
