"""Writing a checkpoint anew: the same model in another dtype, other shards, or with an adapter merged; all of it or nothing."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import cases
from safetensors.torch import load_file, save_file
from system.workshop import save_tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from dllm.errors import CheckpointError, MissingExtraError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada.checkpoint_files import INDEX, SINGLE, tensor_headers
from dllm.pipelines.llada.conversion import convert

peft = pytest.importorskip("peft")

every_model = pytest.mark.parametrize("name", [*cases.DENSE, "llada_moe"])
without_tokenizer = pytest.mark.filterwarnings("ignore:Only the model is written:UserWarning")  # golden ones have none


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("convert") / "tiny")


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("model*.safetensors") for key, tensor in load_file(file).items()}


@every_model
@without_tokenizer
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_another_dtype_is_every_tensor_rounded_once(name: str, dtype: str, tmp_path: Path) -> None:
    written = convert(str(cases.folder(name)), tmp_path / "out", dtype=dtype)
    assert written == tmp_path / "out"
    asked = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    before, after = tensors(cases.folder(name)), tensors(written)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == asked
        assert torch.equal(after[key], tensor.to(asked)), key
    assert llada.load_model(written, dtype="auto").dtype == asked
    assert json.loads((written / "config.json").read_text())["dtype"] == str(asked).removeprefix("torch.")


@without_tokenizer
def test_auto_keeps_half_precision(tmp_path: Path) -> None:
    half = convert(str(cases.folder("llada_moe")), tmp_path / "half", dtype="bfloat16")
    again = convert(str(half), tmp_path / "again")
    assert tensors(again).keys() == tensors(half).keys()
    for key, tensor in tensors(half).items():
        assert tensors(again)[key].dtype == torch.bfloat16
        assert torch.equal(tensors(again)[key], tensor)


@every_model
@without_tokenizer
def test_other_shards_hold_the_same_tensors(name: str, tmp_path: Path) -> None:
    several = convert(str(cases.folder(name)), tmp_path / "several", max_shard_size="100KB")
    assert (several / INDEX).exists()
    assert len(list(several.glob("*.safetensors"))) > 3
    one = convert(str(several), tmp_path / "one", max_shard_size="1.5GB")
    assert [path.name for path in one.glob("*.safetensors*")] == [SINGLE]
    assert tensor_headers(several) == tensor_headers(one) == tensor_headers(cases.folder(name))
    for key, tensor in tensors(cases.folder(name)).items():
        assert torch.equal(tensors(several)[key], tensor)
        assert torch.equal(tensors(one)[key], tensor)


def test_the_tokenizer_comes_along(tiny: Path, tmp_path: Path) -> None:
    written = convert(str(tiny), tmp_path / "out", dtype="bfloat16")
    before, after = llada.load_tokenizer(tiny), llada.load_tokenizer(written)
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template == before.chat_template
    for kind in ("mask", "eos", "pad", "bos", "eot"):
        assert getattr(after, f"{kind}_token_id") == getattr(before, f"{kind}_token_id") is not None


def test_the_model_inside_can_be_converted(tmp_path: Path) -> None:
    written = convert("builtin:sudoku9", tmp_path / "out", dtype="float32")
    assert llada.load_model(written).dtype == torch.float32
    assert llada.load_tokenizer(written).mask_token_id == llada.load_model(written).config.mask_token_id


def test_a_checkpoint_without_a_tokenizer_is_written_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Only the model is written: No tokenizer could be loaded from"):
        written = convert(str(cases.folder("llada_dense")), tmp_path / "out")
    assert sorted(path.name for path in written.iterdir()) == ["config.json", SINGLE]


def test_an_empty_folder_and_new_parents_will_do(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "new" / "deep"):
        assert (convert(str(tiny), output) / SINGLE).exists()
        assert not output.with_name(output.name + ".partial").exists()


@pytest.mark.parametrize("kind", ["a folder", "a file"])
def test_what_is_there_is_not_overwritten(kind: str, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if kind == "a folder":
        output.mkdir()
    (output / "notes.txt" if kind == "a folder" else output).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OptionError, match=r"out is not empty: name a folder that does not exist"):
        convert(str(tiny), output)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float61"}, "dtype 'float61' does not exist. Did you mean 'float64'?"),
        ({"max_shard_size": "many"}, "max_shard_size 'many': write a number and KB, MB, GB or TB, such as 5GB."),
        ({"max_shard_size": "5"}, "max_shard_size '5': write a number and KB, MB, GB or TB, such as 5GB."),
    ],
)
def test_options_that_do_not_exist_are_an_error(
    options: dict[str, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="^" + re.escape(message)):
        convert(str(tiny), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_failure_while_writing_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
        Path(folder).mkdir()
        (Path(folder) / SINGLE).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OptionError, match="No space left on device"):
        convert(str(tiny), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_an_interrupted_run_left_is_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old.safetensors").write_bytes(b"old")
    written = convert(str(tiny), tmp_path / "out")
    assert not (written / "old.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- adapters


def save_adapter(base: str | Path, folder: Path, **settings: Any) -> PreTrainedModel:
    """A LoRA adapter with random weights; the model with it, unmerged."""
    lora = peft.LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj", "v_proj"], **settings})
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
        adapted = peft.get_peft_model(llada.load_model(base), lora).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted


TARGETS = {
    "llada_dense": ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj"],
    "llada_dense_gqa_tied": ["k_proj", "up_proj"],
    "llada_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


@every_model
@without_tokenizer
def test_a_merged_adapter_gives_the_logits_of_the_adapted_model(name: str, tmp_path: Path) -> None:
    adapted = save_adapter(cases.folder(name), tmp_path / "adapter", target_modules=TARGETS[name])
    written = convert(str(cases.folder(name)), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    case = cases.forward_case(name)
    with torch.no_grad():
        expected = adapted(input_ids=case["input_ids"]).logits
        found = llada.load_model(written)(case["input_ids"]).logits
    assert (expected - case["logits"]).abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert tensor_headers(written) == tensor_headers(cases.folder(name)), "public names, and no trace of the adapter"


def test_an_adapter_is_merged_into_a_checkpoint_with_its_tokenizer(tiny: Path, tmp_path: Path) -> None:
    save_adapter(tiny, tmp_path / "adapter")
    written = convert(str(tiny), tmp_path / "out", adapter=str(tmp_path / "adapter"), dtype="bfloat16")
    assert llada.load_model(written, dtype="auto").dtype == torch.bfloat16
    assert llada.load_tokenizer(written).get_vocab() == llada.load_tokenizer(tiny).get_vocab()


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    save_adapter(tiny, tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_not_merged(tiny: Path, adapter: str | Path, message: str) -> None:
    output = tiny.parent / "never"
    with pytest.raises(
        CheckpointError, match=rf"^The adapter '{adapter}' could not be merged into '{tiny}': .*{message}"
    ):
        convert(str(tiny), output, adapter=str(adapter))
    assert not output.exists()


def test_merging_without_peft_says_what_to_install(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        MissingExtraError, match=r"Merging an adapter needs the package 'peft': run  pip install 'dllm\[peft\]'"
    ):
        convert(str(tiny), tmp_path / "out", adapter="any/adapter")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_there_is_an_error(tiny: Path) -> None:
    assert_not_merged(tiny, "some/adapter", "")
    assert_not_merged(tiny, "/nowhere/at/all", "")


def test_a_pickled_adapter_is_refused_unread(adapter: Path, tiny: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert_not_merged(tiny, adapter, "it holds no adapter_model.safetensors, and dllm reads no pickles")


def test_an_adapter_of_another_width_is_an_error(adapter: Path, tiny: Path) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file({key: torch.zeros(4, 32) for key in stored}, adapter / "adapter_model.safetensors")
    assert_not_merged(tiny, adapter, "")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # a warning would not stop a user
def test_an_adapter_that_lacks_tensors_is_an_error(adapter: Path, tiny: Path) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    stored.pop(min(stored))
    save_file(stored, adapter / "adapter_model.safetensors")
    assert_not_merged(tiny, adapter, "missing adapter keys")


def test_an_adapter_for_modules_that_are_not_there_is_an_error(adapter: Path, tiny: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["query_key_value"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert_not_merged(tiny, adapter, "query_key_value")


def test_a_damaged_checkpoint_is_not_converted(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        convert(str(folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
