"""The output folder: whether it can be written, what lies there already, and whether the disk has room."""

from __future__ import annotations

import math
import os
from pathlib import Path

from rich.filesize import decimal
from transformers import PreTrainedModel

from dllm.disk import check_room
from dllm.errors import OptionError
from dllm.training.adapters import count_parameters
from dllm.training.arguments import TrainingArguments
from dllm.training.checkpoints import SEAL, UNFINISHED, fault, has_checkpoints, last_whole
from dllm.training.engines import checkpoint_bytes, weight_bytes


def check_output_dir(args: TrainingArguments) -> str | None:
    """Makes sure that the output folder can be written and holds nothing that would be lost.

    Returns:
        The checkpoint to resume from, if that was asked for.

    Raises:
        OptionError: none is given, it is not empty, it cannot be written, or there is no whole checkpoint to resume from.
    """
    if not args.output_dir:
        raise OptionError("Give --output_dir, the folder for checkpoints and the final model.")
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    auto = isinstance(resume, str) and resume.lower() in ("auto", "true", "last")
    try:
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if auto and folder.is_dir() and not empty:
            last = last_whole(folder)
            if last is None and not has_checkpoints(folder) and _is_of_a_run(folder):
                return None  # stopped before its first checkpoint
            if last is None:
                raise OptionError(
                    f"--resume_from_checkpoint {resume}: {folder} holds no whole checkpoint to go on from. Name another folder, "
                    f"or empty this one, and start anew."
                )
            return str(last)
        if resume and not auto:
            return _given_checkpoint(Path(resume))
        if args.process_index == 0:
            if not empty:
                raise OptionError(
                    f"--output_dir {folder} is not empty: name another folder, empty this one, or go on from its last "
                    f"checkpoint with --resume_from_checkpoint auto."
                    if folder.is_dir()
                    else f"--output_dir {folder} is a file: name a folder."
                )
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OptionError(f"--output_dir {folder} cannot be written to. Name another folder.")
    except OSError as error:
        raise OptionError(
            f"--output_dir {folder} cannot be made or read: {error.strerror}. Name another folder."
        ) from error
    return None


def _is_of_a_run(folder: Path) -> bool:
    """Whether an output folder is one that a run began to write."""
    return any((folder / name).exists() for name in ("log.jsonl", "run.json", UNFINISHED))


def _given_checkpoint(folder: Path) -> str:
    if not (folder / "trainer_state.json").exists():
        raise OptionError(
            f"--resume_from_checkpoint {folder}: that is no checkpoint folder. Say auto for the last one."
        )
    damage = fault(folder) if (folder / SEAL).exists() else None  # transformers' own Trainer seals none
    if damage is not None:
        raise OptionError(
            f"--resume_from_checkpoint {folder}: that checkpoint is damaged: {damage}. Say auto for the last whole one."
        )
    return str(folder)


def check_disk(args: TrainingArguments, model: PreTrainedModel, rows: int) -> None:
    """Whether there is room for the checkpoints that are kept, the one being written, and the final model.

    Raises:
        OptionError: there is not.
    """
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    parameters = count_parameters(model)[0]
    weights, checkpoint = weight_bytes(args) * parameters, checkpoint_bytes(args) * parameters
    there = len(list(folder.glob("checkpoint-*[0-9]")))  # a run that goes on has used their room already
    checkpoints = max(0, _checkpoints_at_once(args, rows) - there)
    needed = checkpoints * checkpoint + weights
    check_room(
        folder,
        needed,
        f"{checkpoints} more checkpoints of about {decimal(checkpoint)} and the final model take",
        "keep fewer (--save_total_limit), or name another --output_dir",
    )


def _checkpoints_at_once(args: TrainingArguments, rows: int) -> int:
    """The most that lie on the disk together: the oldest is deleted once the newest is whole."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    an_epoch = math.ceil(rows / (args.train_batch_size * args.world_size * args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    every = {"steps": args.save_steps if args.save_steps >= 1 else args.save_steps * steps, "epoch": an_epoch}
    saves = math.ceil(steps / max(1, every.get(strategy, 1)))
    limit = args.save_total_limit or 0  # transformers deletes none for 0 either
    return min(saves, limit + 1) if limit > 0 else saves
