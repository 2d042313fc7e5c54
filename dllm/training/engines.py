"""The engine of a run: what divides weights, gradients and the optimiser's state over processes, and what it can resume.

The engines are accelerate's, chosen by the file that `accelerate launch --config_file` gets: one process, data parallel (DDP),
DeepSpeed ZeRO-1, 2 and 3, FSDP2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from dllm.errors import CheckpointError, OptionError
from dllm.training.arguments import TrainingArguments
from dllm.training.checkpoints import UNFINISHED, no_room

TOPOLOGY = "topology.json"
"""A file of each checkpoint: the engine, the processes and the samples of a step that it was saved with."""
PLAIN = "DDP"


def engine(args: TrainingArguments) -> str:
    """The engine that accelerate's launcher asked for: DDP (or one process), ZeRO-1, ZeRO-2, ZeRO-3, FSDP or FSDP2."""
    if args.deepspeed_plugin is not None:
        return f"ZeRO-{args.deepspeed_plugin.zero_stage}"
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        version = (args.fsdp_plugin_args or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))
        return "FSDP2" if int(version) == 2 else "FSDP"
    return PLAIN


@contextmanager
def one_table(model: Any) -> Iterator[None]:
    """While FSDP2 divides a model whose head is its embedding: accelerate does not see the two as modules of their own.

    It would divide the one module twice, which is an error. So it stays with what the model itself holds, which is whole from the
    beginning of the forward to the end of the backward, as a shared table has to be.
    """
    embedding = model.get_input_embeddings()
    if embedding is None or model.get_output_embeddings() is not embedding:
        yield
        return
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings


def running(accelerator: Accelerator) -> str:
    """What accelerate says that runs, such as "MULTI_GPU", "DEEPSPEED stage 2" or "FSDP version 2"; "" for one process."""
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return ""
    if kind == DistributedType.DEEPSPEED:
        return f"{kind.value} stage {accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"{kind.value} version {accelerator.state.fsdp_plugin.fsdp_version}"
    return str(kind.value)


def check_engine(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Whether the engine that was asked for is the one that runs, for accelerate may take another one without a word.

    Raises:
        OptionError: it is not, or the optimiser cannot work with it.
    """
    asked = engine(args)
    if args.optimizer == "muon" and asked != PLAIN:
        raise OptionError(
            f"--optimizer muon needs whole matrices, and {asked} gives each process parts of them: use adamw, or "
            f"scripts/accelerate_configs/ddp.yaml."
        )
    wanted = {"Z": DistributedType.DEEPSPEED, "F": DistributedType.FSDP}.get(asked[0])
    if wanted is not None and accelerator.distributed_type != wanted:
        raise OptionError(
            f"{asked} was asked for, and accelerate took {running(accelerator) or 'one process'}: {asked} needs GPUs. "
            f"On a CPU use  accelerate launch --config_file scripts/accelerate_configs/cpu.yaml"
        )


def checkpoint_bytes(args: TrainingArguments) -> int:
    """Bytes on the disk for one parameter of a checkpoint to resume from, all ranks together."""
    name, master, moments = engine(args), 4, 8
    whole = weight_bytes(args)  # model.safetensors
    if args.save_only_model:
        return whole
    if name in ("ZeRO-1", "ZeRO-2"):
        return whole + whole + master + moments  # the engine keeps the weights once more, and their fp32 masters
    if name in ("ZeRO-3", "FSDP", "FSDP2"):
        return whole + master + moments
    return whole + moments


def weight_bytes(args: TrainingArguments) -> int:
    """Bytes of one parameter of a saved model: DeepSpeed computes in, and saves, 16-bit weights; others save fp32 ones."""
    return 2 if engine(args).startswith("ZeRO") and (args.bf16 or args.fp16) else 4


def write_topology(folder: Path, args: TrainingArguments) -> None:
    """Writes down how a checkpoint was saved, for `check_topology`."""
    text = json.dumps(topology(args), indent=1) + "\n"
    (folder / TOPOLOGY).write_text(text, encoding="utf-8")


def topology(args: TrainingArguments) -> dict[str, Any]:
    """The engine, the processes and the samples of a step of this run."""
    samples = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return {"engine": engine(args), "processes": args.world_size, "samples": samples}


def resumable(checkpoint: Path, args: TrainingArguments) -> Path:
    """The folder from which this run can go on: the checkpoint, or what DeepSpeed makes of it for another number of processes.

    Every process calls it; the first one writes.

    Raises:
        OptionError: the checkpoint is of another engine, or its steps had another number of samples.
        CheckpointError: it could not be made to fit.
    """
    unfinished = Path(str(args.output_dir)) / UNFINISHED
    if args.process_index == 0:  # left by a killed run
        shutil.rmtree(unfinished, ignore_errors=True)
    if not (checkpoint / TOPOLOGY).exists():  # transformers' own Trainer writes none
        return checkpoint
    saved, now = json.loads((checkpoint / TOPOLOGY).read_text(encoding="utf-8")), topology(args)
    if saved["engine"] != now["engine"]:
        raise OptionError(
            f"{checkpoint} was saved by {saved['engine']}, and this run uses {now['engine']}, which cannot read its optimiser's "
            f"state: go on with the accelerate configuration of the run that saved it."
        )
    if saved["samples"] != now["samples"]:
        raise OptionError(
            f"{checkpoint} was saved by a run of {saved['samples']} samples a step, and this one has {now['samples']}, so that "
            f"it would go on at another place in the data: change --per_device_train_batch_size or "
            f"--gradient_accumulation_steps until processes x samples x accumulation are {saved['samples']}."
        )
    if saved["processes"] == now["processes"] or not now["engine"].startswith("ZeRO"):
        return checkpoint
    args.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    target = unfinished / f"{checkpoint.name}-universal"
    with args.main_process_first(local=False):
        if args.process_index == 0:
            print(
                f"Making {checkpoint}, saved by {saved['processes']} processes, fit {now['processes']} ...", flush=True
            )
            _make_universal(checkpoint, target)
    return target


def _make_universal(checkpoint: Path, target: Path) -> None:
    """Writes a checkpoint of ZeRO's in DeepSpeed's universal form: each tensor whole, in a file of its own."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    command = [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(target / f"{tag}_universal")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        reason = (done.stdout.strip() or "no output").splitlines()[-1]
        raise CheckpointError(f"{checkpoint} could not be made to fit this number of processes: {reason}")
    try:
        for path in checkpoint.iterdir():  # what transformers reads: its state, the scheduler, the random numbers
            if path.is_file() and path.suffix in (".json", ".pt", ".pth"):
                shutil.copy(path, target)
    except OSError as error:
        if no_room(error):
            raise CheckpointError(f"The disk of {target} is full ({error}). Free some space.") from error
        raise
