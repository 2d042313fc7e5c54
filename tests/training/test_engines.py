"""What an engine is called, what its checkpoints take, and which checkpoints a run may go on from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.utils import DistributedType
from training.commands import PRETRAIN

from dllm.errors import OptionError
from dllm.pipelines.llada import pretrain
from dllm.training.arguments import TrainingArguments
from dllm.training.engines import TOPOLOGY, check_engine, checkpoint_bytes, engine, resumable, running, weight_bytes

CONFIGS = Path(__file__).parents[2] / "scripts" / "accelerate_configs"
ENGINES = ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(name: str = "DDP", **options: Any) -> TrainingArguments:
        if name == "FSDP2":
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
            monkeypatch.setenv("FSDP_VERSION", "2")
        args = TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", **options)
        if name.startswith("ZeRO"):  # accelerate's launcher gives it
            args.deepspeed_plugin = SimpleNamespace(zero_stage=int(name[-1]), deepspeed_config={})
        return args

    return make


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_known_by_what_the_launcher_set(name: str, arguments: Any) -> None:
    assert engine(arguments(name)) == name


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [("DDP", 12, 12), ("ZeRO-1", 20, 16), ("ZeRO-2", 20, 16), ("ZeRO-3", 16, 14), ("FSDP2", 16, 16)],
)
def test_the_bytes_of_a_checkpoint(name: str, fp32: int, bf16: int, arguments: Any) -> None:
    assert checkpoint_bytes(arguments(name, bf16=False)) == fp32
    assert checkpoint_bytes(arguments(name, bf16=True)) == bf16
    args = arguments(name, bf16=True, save_only_model=True)
    assert checkpoint_bytes(args) == weight_bytes(args) == (2 if "ZeRO" in name else 4)


def accelerator(kind: DistributedType) -> Any:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3), fsdp_plugin=SimpleNamespace(fsdp_version=2))
    return SimpleNamespace(distributed_type=kind, state=state)


def test_the_run_line_names_stage_and_version() -> None:
    assert running(accelerator(DistributedType.DEEPSPEED)) == "DEEPSPEED stage 3"
    assert running(accelerator(DistributedType.FSDP)) == "FSDP version 2"
    assert running(accelerator(DistributedType.MULTI_GPU)) == "MULTI_GPU"
    assert running(accelerator(DistributedType.NO)) == ""


@pytest.mark.parametrize("name", ["ZeRO-2", "FSDP2"])
def test_another_engine_than_the_one_asked_for_is_refused(name: str, arguments: Any) -> None:
    with pytest.raises(OptionError, match=rf"{name} was asked for, and accelerate took MULTI_CPU: .*cpu\.yaml"):
        check_engine(arguments(name), accelerator(DistributedType.MULTI_CPU))
    with pytest.raises(OptionError, match="took one process"):
        check_engine(arguments(name), accelerator(DistributedType.NO))


def test_muon_needs_whole_matrices(arguments: Any) -> None:
    check_engine(arguments("DDP", optimizer="muon"), accelerator(DistributedType.NO))
    with pytest.raises(OptionError, match="--optimizer muon needs whole matrices, and FSDP2 gives each process parts"):
        check_engine(arguments("FSDP2", optimizer="muon"), accelerator(DistributedType.FSDP))


def saved(folder: Path, **topology: Any) -> Path:
    folder.mkdir()
    (folder / TOPOLOGY).write_text(json.dumps({"engine": "DDP", "processes": 1, "samples": 8, **topology}))
    return folder


def test_a_checkpoint_of_another_engine_is_refused(tmp_path: Path, arguments: Any) -> None:
    with pytest.raises(OptionError, match=r"was saved by ZeRO-2, and this run uses DDP, .* accelerate configuration"):
        resumable(saved(tmp_path / "checkpoint-2", engine="ZeRO-2"), arguments())


def test_a_checkpoint_of_larger_steps_is_refused(tmp_path: Path, arguments: Any) -> None:
    checkpoint = saved(tmp_path / "checkpoint-2", processes=2, samples=16)
    with pytest.raises(OptionError, match=r"of 16 samples a step, and this one has 8, .* accumulation are 16\."):
        resumable(checkpoint, arguments(per_device_train_batch_size=8))
    assert resumable(checkpoint, arguments(per_device_train_batch_size=4, gradient_accumulation_steps=4)) == checkpoint


def test_a_checkpoint_that_says_nothing_is_taken_as_it_is(tmp_path: Path, arguments: Any) -> None:
    assert resumable(tmp_path, arguments()) == tmp_path


def test_the_command_line_refuses_before_it_trains(copied: Path) -> None:
    argv = [*PRETRAIN, "--output_dir", str(copied), "--resume_from_checkpoint", str(copied / "checkpoint-2")]
    with pytest.raises(OptionError, match="of 4 samples a step, and this one has 8"):
        pretrain([*argv, "--gradient_accumulation_steps", "2"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_leave_precision_batch_and_clipping_to_the_training_arguments(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config["mixed_precision"] == "no"
    assert config["num_processes"] == {"cpu": 2, "single_gpu": 1}.get(path.stem, 8)
    assert config["num_machines"] == 1
    assert not config["use_cpu"]  # under it accelerate would take DDP or one process, whatever the file says
    assert f"--config_file scripts/accelerate_configs/{path.name} " in path.read_text(encoding="utf-8")
    zero = config.get("deepspeed_config", {})
    assert not zero.keys() & {"gradient_clipping", "gradient_accumulation_steps", "deepspeed_config_file"}
    if path.stem.startswith("deepspeed"):
        assert zero["zero_stage"] == int(path.stem[-1])
        assert zero["deepspeed_multinode_launcher"] == "standard"
        assert zero["zero3_init_flag"] is zero["zero3_save_16bit_model"] is (path.stem[-1] == "3")
