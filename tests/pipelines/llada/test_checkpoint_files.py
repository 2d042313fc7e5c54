"""The files of a checkpoint: their headers are read without a weight, and every damage is named with its file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dllm.errors import CheckpointError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada.checkpoint_files import INDEX, SINGLE, main_dtype, read_header, tensor_headers

NAMES = ("llada_dense", "llada_moe")
HEAD = {"llada_dense": "model.transformer.ff_out.weight", "llada_moe": "lm_head.weight"}
both = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def sharded_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in NAMES:
        folders[name] = tmp_path_factory.mktemp("shards") / name
        llada.load_model(cases.folder(name)).save_pretrained(folders[name], max_shard_size="100KB")
    return folders


@pytest.fixture
def shards(name: str, sharded_once: dict[str, Path], tmp_path: Path) -> Path:
    """The golden checkpoint in several files and an index, to be damaged."""
    return Path(shutil.copytree(sharded_once[name], tmp_path / "checkpoint"))


def places(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index says."""
    index: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return index


def place(folder: Path, changes: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": {**places(folder), **changes}})
    (folder / INDEX).write_text(text, encoding="utf-8")


def file_of_head(folder: Path) -> Path:
    return next(folder / file for tensor, file in places(folder).items() if tensor in HEAD.values())


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        llada.load_model(folder)
    for word in words:
        assert word in str(error.value)


@both
def test_headers_say_what_the_files_hold(name: str, shards: Path) -> None:
    with safe_open(cases.folder(name) / SINGLE, "pt") as file:
        expected = {key: ("F32", tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert tensor_headers(cases.folder(name)) == tensor_headers(shards) == expected


@settings(max_examples=25)
@given(
    tensors=st.dictionaries(
        st.text("abc.", min_size=1, max_size=6),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), st.lists(st.integers(0, 3), max_size=3)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_file_that_safetensors_writes_is_read(
    tensors: dict[str, tuple[torch.dtype, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("header") / "any.safetensors"
    save_file({key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in tensors.items()}, path)
    spelt = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}
    assert read_header(path) == {key: (spelt[dtype], tuple(shape)) for key, (dtype, shape) in tensors.items()}


@both
def test_shards_give_the_same_model_as_one_file(name: str, shards: Path) -> None:
    one, several = llada.load_model(cases.folder(name)).state_dict(), llada.load_model(shards).state_dict()
    assert one.keys() == several.keys()
    for key, tensor in one.items():
        assert torch.equal(several[key], tensor), key


@both
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}])
def test_a_device_map_is_taken(name: str, shards: Path, device_map: Any) -> None:
    model, case = llada.load_model(shards, device_map=device_map), cases.forward_case(name)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with torch.no_grad():
        logits = model(case["input_ids"]).logits
    torch.testing.assert_close(logits, case["logits"], rtol=0, atol=cases.TOLERANCE)


@both
def test_weights_that_a_checkpoint_brings_are_never_initialised(
    name: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    for method in ("normal_", "uniform_", "trunc_normal_", "fill_", "zero_"):
        original = getattr(torch.Tensor, method, None)

        def counted(self: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> torch.Tensor:
            if self.device.type != "meta" and self.numel() >= 64:
                drawn.append(self.numel())
            return original(self, *args, **kwargs)

        if original is not None:
            monkeypatch.setattr(torch.Tensor, method, counted)
    model = llada.load_model(shards)
    assert not drawn
    type(model)(model.config)
    assert sum(drawn) >= sum(parameter.numel() for parameter in model.parameters()), "a fresh one is"


@both
def test_a_shard_that_is_missing(name: str, shards: Path) -> None:
    shard = file_of_head(shards)
    shard.unlink()
    assert_refused(shards, f"{shards / INDEX} names {shard.name}, and there is no such file", "copy or download it")


@both
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_shard_that_is_cut_short(name: str, shards: Path, kept: float) -> None:
    shard = file_of_head(shards)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(kept * len(whole))])
    assert_refused(shards, str(shard), "cut short", "opy it again")


@both
def test_a_shard_with_more_than_its_header_says(name: str, shards: Path) -> None:
    shard = file_of_head(shards)
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(b"x" * 10)
    assert_refused(shards, f"{shard} has {size + 10:,} bytes and its header asks for {size:,}", "Copy it again")


HEADERS = {
    "no JSON": b"x" * 40,
    "no text": b"\xff\xfe" * 20,
    "a list": b"[1, 2]",
    "a number for a tensor": b'{"a": 3}',
    "no place": b'{"a": {"dtype": "F32", "shape": [1]}}',
    "a place of words": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": "here"}}',
    "no shape": b'{"a": {"dtype": "F32", "data_offsets": [0, 0]}}',
}


@both
@pytest.mark.parametrize("header", HEADERS)
def test_a_shard_that_is_no_safetensors_file(name: str, shards: Path, header: str) -> None:
    shard = file_of_head(shards)
    shard.write_bytes(len(HEADERS[header]).to_bytes(8, "little") + HEADERS[header])
    assert_refused(shards, f"{shard} is no safetensors file: its header cannot be read. Copy it again")


@both
def test_an_index_that_names_a_file_that_is_not_there(name: str, shards: Path) -> None:
    place(shards, {"model.extra.weight": "model-00099-of-00099.safetensors"})
    assert_refused(shards, INDEX, "names model-00099-of-00099.safetensors, and there is no such file")


@both
def test_an_index_that_names_a_tensor_its_file_lacks(name: str, shards: Path) -> None:
    head, wrong = HEAD[name], next(file for file in places(shards).values() if file != places(shards)[HEAD[name]])
    place(shards, {head: wrong})
    assert_refused(shards, f"{shards / INDEX} says that {wrong} holds {head}, and it does not: copy both again")


INDEXES = ["", "{nope", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": null}']


@both
@pytest.mark.parametrize("text", INDEXES)
def test_an_index_that_cannot_be_read(name: str, shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text, encoding="utf-8")
    assert_refused(shards, f"{shards / INDEX} cannot be read as an index of weights: copy it again")


@both
def test_an_index_that_leads_out_of_the_folder(name: str, shards: Path) -> None:
    shutil.copy(file_of_head(shards), shards.parent / "elsewhere.safetensors")
    place(shards, {HEAD[name]: "../elsewhere.safetensors"})
    assert_refused(shards, f"{shards / INDEX} cannot be read as an index of weights: copy it again")


@both
def test_a_tensor_of_another_shape(name: str, shards: Path) -> None:
    shard, head = file_of_head(shards), HEAD[name]
    rewrite(shard, lambda tensors: tensors.update({head: torch.zeros(256, 32)}))
    words = f"1 tensors are of another shape than config.json says, such as {head} in {shard.name}: [256, 32], not [256, 64]"
    assert_refused(shards, words, "Are both files of the same checkpoint?")


@both
def test_a_tensor_that_is_missing(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cases.folder(name), tmp_path / "checkpoint"))
    rewrite(folder / SINGLE, lambda tensors: tensors.pop(HEAD[name]))
    assert_refused(folder, f"do not fit its config.json: 1 tensors are missing, such as {HEAD[name]}")


@pytest.mark.parametrize("part", ["gate", "up", "down"])
@pytest.mark.parametrize("damage", ["missing", "of another shape"])
def test_one_expert_that_is_damaged(part: str, damage: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cases.folder("llada_moe"), tmp_path / "checkpoint"))
    tensor = f"model.layers.1.mlp.experts.3.{part}_proj.weight"
    if damage == "missing":
        rewrite(folder / SINGLE, lambda tensors: tensors.pop(tensor))
    else:
        rewrite(folder / SINGLE, lambda tensors: tensors.update({tensor: torch.zeros(48, 63)}))
    assert_refused(folder, f"1 tensors are {damage}", f"such as {tensor}")


@both
def test_more_experts_or_layers_than_the_files_hold(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cases.folder(name), tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"n_layers": 3} if name == "llada_dense" else {"num_experts": 9}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, "9 tensors are missing" if name == "llada_dense" else "mlp.gate.weight in model.safetensors")


@both
@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "weights.pt", "old.pth"])
def test_pickles_are_refused_unread(name: str, pickle: str, tmp_path: Path) -> None:
    shutil.copy(cases.folder(name) / "config.json", tmp_path)
    (tmp_path / pickle).write_bytes(b"not even a pickle")
    assert_refused(tmp_path, f"{tmp_path} holds its weights as pickles alone ({pickle})", "save_pretrained")


@both
def test_a_folder_without_weights(name: str, tmp_path: Path) -> None:
    shutil.copy(cases.folder(name) / "config.json", tmp_path)
    assert_refused(tmp_path, f"holds no weights: neither {SINGLE} nor {INDEX} is there")


@both
def test_a_dtype_that_does_not_exist(name: str) -> None:
    with pytest.raises(OptionError, match=re.escape("dtype 'bfloat61' does not exist. Did you mean 'bfloat16'?")):
        llada.load_model(cases.folder(name), dtype="bfloat61")


@both
def test_other_tensors_in_the_files_do_no_harm(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cases.folder(name), tmp_path / "checkpoint"))
    rewrite(folder / SINGLE, lambda tensors: tensors.update({"rotary.inv_freq": torch.zeros(8)}))
    case = cases.forward_case(name)
    with torch.no_grad():
        logits = llada.load_model(folder)(case["input_ids"]).logits
    torch.testing.assert_close(logits, case["logits"], rtol=0, atol=cases.TOLERANCE)


def test_the_main_dtype_is_that_of_most_weights() -> None:
    norms = {f"norm.{i}": ("F32", (8,)) for i in range(5)}
    assert main_dtype(norms | {"matrix": ("BF16", (8, 8))}, "it") == "bfloat16"
    assert main_dtype(norms, "it") == "float32"
    with pytest.raises(CheckpointError, match=r"^Most weights of 'it' are F8_E4M3: dllm reads F64, F32, BF16, F16"):
        main_dtype(norms | {"matrix": ("F8_E4M3", (8, 8))}, "it")
