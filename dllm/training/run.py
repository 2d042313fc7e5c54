"""The two jobs, `pretrain` and `sft`, from command-line arguments to a saved model. A family brings its models.

Everything that can be wrong with the arguments, the data and the disk is found before the first step.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import datasets
import torch
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)

from dllm.data.collators import PretrainingCollator, SFTCollator
from dllm.data.maps import pretraining_rows, sft_rows
from dllm.data.sources import load_splits
from dllm.errors import (
    CheckpointError,
    DataError,
    DllmError,
    NonFiniteError,
    OptionError,
    did_you_mean,
)
from dllm.training.arguments import DataArguments, ModelArguments, TrainingArguments
from dllm.training.callbacks import Bar, JsonLog, LogLines, StopOnSignal, hide_bars
from dllm.training.checkpoints import SEAL, fault, last_whole, no_room
from dllm.training.curves import draw_losses
from dllm.training.record import record_start
from dllm.training.samples import Sample, make_sampler
from dllm.training.trainer import MaskedDiffusionTrainer

FINAL = "checkpoint-final"
DEFAULT_LENGTH = 1024
"""Tokens in a row, where nothing is said and the context holds them."""
BYTES_A_WEIGHT, BYTES_A_STATE = 4, 8
"""A parameter in fp32, and an optimiser's two moments of it."""

Task = Literal["pretrain", "sft"]
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    # LLaDA's recipe (arXiv:2502.09992, section 2.3 and GUIDELINES)
    "sft": dict(
        loss_normalisation="sequence",
        learning_rate=2.5e-5,
        model_name_or_path="builtin:sudoku9",
        dataset_args="builtin:addition",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family of models brings to training."""

    presets: Sequence[str]
    make_tokenizer: Callable[[str, Any], PreTrainedTokenizerBase]
    """(name, function that gives training texts) -> tokenizer; the name is a path, an id, builtin:char or bpe:N."""
    load_config: Callable[[str], Any]
    load_model: Callable[..., PreTrainedModel]
    fresh_model: Callable[..., PreTrainedModel]
    fits: Callable[[Any, PreTrainedTokenizerBase], bool]
    """(configuration, tokenizer): whether a model of the one reads the ids of the other."""
    trainer: type[MaskedDiffusionTrainer]
    sample: Sample
    """(model, tokenizer, ids of each prompt, tokens to write, seed) -> texts; its noise is keyed by the seed."""


class _Parser(HfArgumentParser):
    """argparse whose errors are ours: one line, not two hundred lines of usage before it."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}. See  {self.prog} --help")


def parse_arguments(
    task: Task, argv: Sequence[str] | None = None
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Reads the command line.

    Raises:
        OptionError: an option that does not exist (with the nearest name), or a value that does not fit.
        SystemExit: --help.
    """
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    parser = _Parser(kinds, allow_abbrev=False, prog=f"dllm {task}", description=_DESCRIPTIONS[task])
    # not None, for which transformers would write into a folder of its own choice
    parser.set_defaults(output_dir="", **TASK_DEFAULTS[task])
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            None if argv is None else list(argv), return_remaining_strings=True
        )
    except DllmError:
        raise
    except ValueError as error:
        raise OptionError(str(error)) from error
    if unknown:
        names = {f"--{field.name}" for kind in kinds for field in fields(kind)}
        raise OptionError(f"There is no option {unknown[0]!r}.{did_you_mean(unknown[0].split('=')[0], names)}")
    model_args, data_args, training_args = parsed
    if not 0 <= data_args.random_length <= 1:
        raise OptionError(f"--random_length {data_args.random_length}: it is a share, between 0 and 1.")
    if data_args.max_length is not None and data_args.max_length < 2:
        raise OptionError(f"--max_length {data_args.max_length}: a row has at least 2 tokens.")
    return model_args, data_args, training_args


_DESCRIPTIONS = {
    "pretrain": "Pretrain a masked-diffusion language model on plain text.",
    "sft": "Fine-tune a masked-diffusion language model on conversations.",
}


def run(task: Task, family: Family, argv: Sequence[str] | None = None) -> Path:
    """Trains, and saves model and tokenizer to `output_dir/checkpoint-final`.

    Args:
        task: "pretrain" or "sft".
        family: the models.
        argv: the command line; `sys.argv` by default.

    Returns:
        The folder of the final model.

    Raises:
        DllmError: the arguments, the data, the checkpoint or the disk; before training starts.
        SystemExit: 130 or 143 after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    model_args, data_args, args = parse_arguments(task, argv)
    folder, stopped_by = _train(task, family, model_args, data_args, args)
    leave_group()
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)
    return folder


def _train(
    task: Task, family: Family, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> tuple[Path, int | None]:
    """The folder of the final model, and the signal that stopped the run before there was one."""
    resume = check_output_dir(args)
    hide_bars(everywhere=args.process_index > 0)
    set_seed(args.seed)
    tokenizer, model, train, test = prepare(task, family, model_args, data_args)
    if args.eval_strategy != "no" and test is None:
        raise DataError(f"--eval_strategy {args.eval_strategy.value} needs test rows: write  NAME[train:N,test:M].")
    check_disk(args, model, len(train))
    sampler = make_sampler(
        args,
        family.sample,
        tokenizer,
        model,
        chat=task == "sft",
        row=(train if test is None else test)[0],
        resume=resume,
    )

    stop = StopOnSignal()
    trainer = family.trainer(
        model,
        args,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=test,
        make_collator=make_collator(task, data_args, tokenizer),
    )
    trainer.add_callback(stop)
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    if sys.stderr.isatty() and not args.disable_tqdm:
        trainer.add_callback(Bar())
    trainer.add_callback(LogLines())
    hide_bars(everywhere=True)
    trainer.add_callback(JsonLog(lambda: trainer.tokens_seen))
    trainer.sampler = sampler
    if trainer.is_world_process_zero():
        rows = {"train": len(train), "test": None if test is None else len(test)}
        record_start(args, (model_args, data_args), task=task, rows=rows, resumed=resume)
        print(
            f"{task}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} rows; a step is "
            f"{args.world_size} process{'es' * (args.world_size > 1)} x {args.train_batch_size} samples x "
            f"{args.gradient_accumulation_steps} accumulated; "
            f"{f'{trainer.accelerator.distributed_type.value}, ' if args.world_size > 1 else ''}"
            f"{'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'} on {args.device}",
            flush=True,
        )
    try:
        trainer.train(resume_from_checkpoint=resume)
        if stop.stopped_by is None:
            if test is not None:
                trainer.evaluate()
            _save(trainer, Path(str(args.output_dir)) / FINAL)
        if trainer.is_world_process_zero():
            draw_losses(Path(str(args.output_dir)), task)
    except NonFiniteError:
        if trainer.is_world_process_zero():
            draw_losses(Path(str(args.output_dir)), task)
        raise
    except Exception as error:
        if no_room(error):
            raise CheckpointError(
                f"The disk of {args.output_dir} is full ({error}). Free some space; then go on from the last whole checkpoint "
                f"with --resume_from_checkpoint auto."
            ) from error
        raise
    finally:
        stop.restore()
    if stop.stopped_by is not None and trainer.is_world_process_zero():
        print(
            f"Stopped at step {trainer.state.global_step}. Go on with the same command and --resume_from_checkpoint auto"
        )
    return Path(str(args.output_dir)) / FINAL, stop.stopped_by


def leave_group() -> None:
    """Ends the process group, if there is one, before Python ends.

    A thread of gloo's that still drops its last collective asks for Python's lock, and where Python has begun to end that
    aborts the process (seen with torch 2.13 on a busy machine). Without references to the group its threads are joined; who
    keeps one (DeepSpeed does) leaves the threads the moment that they need.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gc.collect()  # the trainer and its model, which refer to each other
    torch.distributed.destroy_process_group()
    time.sleep(0.1)


def prepare(
    task: Task, family: Family, model_args: ModelArguments, data_args: DataArguments
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, datasets.Dataset, datasets.Dataset | None]:
    """Tokenizer, model, and rows of ids; cheap checks come first, weights last."""
    name = model_args.model_name_or_path
    preset = name in family.presets
    if task == "sft" and preset:
        raise OptionError(
            f"{name!r} is a shape without weights: pretrain it first, then fine-tune the folder that it made."
        )
    if task == "sft" and str(model_args.tokenizer_name_or_path).startswith("bpe:"):
        raise OptionError(
            f"--tokenizer_name_or_path {model_args.tokenizer_name_or_path}: a BPE is trained in pretraining, and fine-tuning "
            f"uses the tokenizer that the model was pretrained with. Leave the option out."
        )
    config = None if preset else family.load_config(name)
    context = DEFAULT_LENGTH if config is None else config.max_position_embeddings
    max_length = data_args.max_length or min(DEFAULT_LENGTH, context)
    if config is not None and max_length > context:
        raise OptionError(f"--max_length {max_length} exceeds the model's context of {context}.")
    column = "text" if task == "pretrain" else "messages"
    train, test = load_splits(
        data_args.dataset_args, column=column, source_column=getattr(data_args, f"{column}_column")
    )
    tokenizer = family.make_tokenizer(
        model_args.tokenizer_name_or_path or ("builtin:char" if preset else name), lambda: iter(train["text"])
    )
    rows = partial(pretraining_rows if task == "pretrain" else sft_rows, tokenizer=tokenizer)
    train_rows = rows(train, max_length=max_length, workers=data_args.num_proc)
    test_rows = None if test is None else rows(test, max_length=max_length, workers=data_args.num_proc)
    if task == "pretrain" and not model_args.continue_from_weights:
        model = family.fresh_model(name, tokenizer, model_args.config_overrides, max_length)
    elif model_args.config_overrides:
        raise OptionError("--config_overrides only changes a model that starts fresh: leave it out.")
    else:
        if config is not None and not family.fits(config, tokenizer):
            raise OptionError(
                f"The tokenizer {model_args.tokenizer_name_or_path!r} is not that of {name!r}: it has {len(tokenizer)} entries "
                f"and the mask {tokenizer.mask_token_id}, the model's mask is {config.mask_token_id}. Leave the option out."
            )
        model = family.load_model(name, dtype="float32")
    return tokenizer, model, train_rows, test_rows


def make_collator(
    task: Task, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> Callable[[int, int, bool], Any]:
    """The collator of a task, once the seed, the size of a step, and whether it is for evaluation are known."""

    def make(seed: int, group: int, evaluation: bool) -> Any:
        if task == "pretrain":
            share = 0.0 if evaluation else data_args.random_length
            return PretrainingCollator(seed=seed, group=group, random_length=share)
        return SFTCollator(seed=seed, eos_token_id=int(tokenizer.eos_token_id), evaluation=evaluation)

    return make


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
    weights = BYTES_A_WEIGHT * sum(p.numel() for p in model.parameters())
    state = 0 if args.save_only_model else BYTES_A_STATE // BYTES_A_WEIGHT * weights
    there = len(list(folder.glob("checkpoint-*[0-9]")))  # a run that goes on has used their room already
    checkpoints = max(0, _checkpoints_at_once(args, rows) - there)
    needed = checkpoints * (weights + state) + weights
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OptionError(
            f"The disk of {folder} has {free / 1e9:.2f} GB free, and {checkpoints} more checkpoints of about "
            f"{(weights + state) / 1e9:.2f} GB and the final model take {needed / 1e9:.2f} GB: free some space, keep fewer "
            f"(--save_total_limit), or name another --output_dir."
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


def _save(trainer: MaskedDiffusionTrainer, folder: Path) -> None:
    """The final model and tokenizer, and nothing of the run."""
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)
        trainer.state.save_to_json(str(folder.parent / "trainer_state.json"))
        print(f"Saved the model and its tokenizer to {folder}")
