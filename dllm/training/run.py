"""The two jobs, `pretrain` and `sft`, from command-line arguments to a saved model. A family brings its models.

Everything that can be wrong with the arguments, the data and the disk is found before the first step.
"""

from __future__ import annotations

import gc
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)
from transformers.hf_argparser import string_to_bool

from dllm.data.collators import PretrainingCollator, SFTCollator
from dllm.data.packing import PackedDataset
from dllm.data.streams import StreamedRows
from dllm.errors import CheckpointError, DataError, DllmError, NonFiniteError, OptionError
from dllm.training.adapters import (
    ADAPTER_DEFAULTS,
    AdapterArguments,
    check_adapter,
    check_resumed,
    count_parameters,
    wants_adapter,
)
from dllm.training.arguments import DataArguments, ModelArguments, PrepareArguments, TrainingArguments
from dllm.training.callbacks import Bar, JsonLog, LogLines, StopOnSignal, end_together, hide_bars
from dllm.training.checkpoints import UNFINISHED, no_room, put_in_place
from dllm.training.curves import draw_losses
from dllm.training.engines import check_engine, resumable, running
from dllm.training.launch import exit_status, no_such_option, options_help, tell_launcher
from dllm.training.option_rules import (
    check_data_options,
    check_prepared_options,
    check_training_options,
    former_name,
    named_options,
)
from dllm.training.output import check_disk, check_output_dir
from dllm.training.record import record_start
from dllm.training.rows import DEFAULT_DATA, prepare, prepare_data
from dllm.training.samples import Sample, make_sampler
from dllm.training.trainer import MaskedDiffusionTrainer

FINAL = "checkpoint-final"

Task = Literal["pretrain", "sft"]
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    # LLaDA's recipe (arXiv:2502.09992, section 2.3 and GUIDELINES)
    "sft": dict(
        loss_normalisation="sequence",
        learning_rate=2.5e-5,
        model_name_or_path="builtin:sudoku9",
        dataset_args=DEFAULT_DATA["sft"],
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
    kinds = (ModelArguments, DataArguments, TrainingArguments, AdapterArguments)
    parser = _Parser(
        kinds, allow_abbrev=False, prog=f"dllm {task}", description=_DESCRIPTIONS[task], epilog=options_help()
    )
    for action in parser._actions:  # transformers lets only some switches stand without a value
        if action.nargs is None and action.type is string_to_bool:
            action.nargs, action.const = "?", True
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "auto"
    # not None, for which transformers would write into a folder of its own choice
    parser.set_defaults(output_dir="", **TASK_DEFAULTS[task])
    if wants_adapter(argv):
        parser.set_defaults(**ADAPTER_DEFAULTS[task])
    model_args, data_args, training_args, model_args.adapter = _parsed(parser, kinds, argv)
    named = named_options(parser, argv)
    check_data_options(task, data_args, named)
    check_training_options(task, data_args, training_args, named)
    return model_args, data_args, training_args


def _parsed(parser: _Parser, kinds: Sequence[type], argv: Sequence[str] | None) -> list[Any]:
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            None if argv is None else list(argv), return_remaining_strings=True
        )
    except DllmError:
        raise
    except ValueError as error:
        raise OptionError(str(error)) from error
    if unknown:
        names = {f"--{field.name}" for kind in kinds for field in fields(kind) if field.init}
        if now := former_name(unknown[0]):
            raise OptionError(f"There is no option {unknown[0]!r}.{now}")
        raise OptionError(no_such_option(unknown[0], parser.prog, names))
    return parsed


def prepare_rows(task: Task, family: Family, argv: Sequence[str] | None = None) -> Path:
    """Makes the rows of a task once, from a command line; see `dllm prepare --help`. Returns their folder.

    Raises:
        DllmError: the arguments, the tokenizer, the data or the folder.
        SystemExit: --help.
    """
    kinds = (ModelArguments, DataArguments, PrepareArguments)
    parser = _Parser(kinds, allow_abbrev=False, prog=f"dllm prepare {task}", description=_DESCRIPTIONS["prepare"])
    parser.set_defaults(**{k: v for k, v in TASK_DEFAULTS[task].items() if k in ("model_name_or_path", "dataset_args")})
    model_args, data_args, where = _parsed(parser, kinds, argv)
    named = named_options(parser, argv)
    check_data_options(task, data_args, named)
    check_prepared_options(task, named)
    hide_bars(everywhere=False)
    return prepare_data(task, family, model_args, data_args, where.output_dir, say=partial(print, flush=True))


_DESCRIPTIONS = {
    "pretrain": "Pretrain a masked-diffusion language model on plain text.",
    "prepare": "Turn data into rows of tokens once, for --load_preprocessed_data of dllm pretrain and dllm sft.",
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
        SystemExit: 130, 143 or 85 after Ctrl-C, SIGTERM or SIGUSR1, with a checkpoint saved; 2 after an error that the
            launcher shows.
    """
    try:
        model_args, data_args, args = parse_arguments(task, argv)
        folder, stopped_by = _train(task, family, model_args, data_args, args)
    except DllmError as error:
        if tell_launcher(error):
            raise SystemExit(2) from error
        raise
    if stopped_by is not None and args.world_size > 1:
        end_together()
    leave_group()
    if stopped_by is not None:
        raise SystemExit(exit_status(stopped_by))
    return folder


def _train(
    task: Task, family: Family, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> tuple[Path, int | None]:
    """The folder of the final model, and the signal that stopped the run before there was one."""
    resume = check_output_dir(args)
    resume = None if resume is None else str(resumable(Path(resume), args))
    check_adapter(model_args.adapter, args, resume)
    hide_bars(everywhere=args.process_index > 0)
    set_seed(args.seed)
    tokenizer, model, train, test = prepare(task, family, model_args, data_args, args)
    check_resumed(model, resume)
    if args.eval_strategy != "no" and test is None:
        raise DataError(f"--eval_strategy {args.eval_strategy.value} needs test rows: write  NAME[train:N,test:M].")
    check_disk(args, model, len(train))
    if resume is not None and isinstance(train, StreamedRows):
        train.load(Path(resume))
    sampler = make_sampler(
        args,
        family.sample,
        tokenizer,
        model,
        chat=task == "sft",
        row=(train if test is None else test)[0] if args.sample_every else {},
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
        make_packed=make_packed(data_args) if data_args.packing else None,
    )
    check_engine(args, trainer.accelerator)
    trainer.add_callback(stop)
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    if sys.stderr.isatty() and not args.disable_tqdm:
        trainer.add_callback(Bar())
    trainer.add_callback(LogLines())
    hide_bars(everywhere=True)
    trainer.add_callback(JsonLog())
    trainer.sampler = sampler
    if trainer.is_world_process_zero():
        trained, whole = count_parameters(model)
        rows = {"train": len(train), "test": None if test is None else len(test)}
        record_start(args, (model_args, data_args), task=task, rows=rows, resumed=resume)
        print(
            f"{task}: {whole:,} parameters, {f'{trained:,} of them trained, ' if trained < whole else ''}"
            f"{len(train):,} rows; a step is "
            f"{args.world_size} process{'es' * (args.world_size > 1)} x {args.train_batch_size} samples x "
            f"{args.gradient_accumulation_steps} accumulated; "
            f"{f'{engine}, ' if (engine := running(trainer.accelerator)) else ''}"
            f"{'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'} on {args.device}",
            flush=True,
        )
    try:
        trainer.train(resume_from_checkpoint=resume)
        if isinstance(train, StreamedRows):
            tell_fates(train, args)
        if stop.stopped_by is None:
            if test is not None and not _is_evaluated(trainer):
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


def tell_fates(stream: StreamedRows, args: TrainingArguments) -> None:
    """Says what was done to the documents of a stream, all processes together."""
    fates = stream.fates().to(args.device)
    if args.world_size > 1:
        torch.distributed.all_reduce(fates, torch.distributed.ReduceOp.MAX)
    if args.process_index == 0:
        for line in stream.told(fates):
            print(line, flush=True)


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


def make_packed(data_args: DataArguments) -> Callable[[Any, int, int], PackedDataset]:
    """Gives the packed rows, once the seed and the size of a step are known."""
    return lambda rows, seed, group: PackedDataset(
        rows, capacity=int(data_args.max_length or 0), ends=data_args.pack_eos, seed=seed, group=group
    )


def make_collator(
    task: Task, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> Callable[[int, int, bool], Any]:
    """The collator of a task, once the seed, the size of a step, and whether it is for evaluation are known."""

    def make(seed: int, group: int, evaluation: bool) -> Any:
        if task == "pretrain":
            share = 0.0 if evaluation else data_args.random_length
            separator = int(tokenizer.eos_token_id) if data_args.document_masks else None
            return PretrainingCollator(seed=seed, group=group, random_length=share, separator=separator)
        return SFTCollator(seed=seed, eos_token_id=int(tokenizer.eos_token_id), evaluation=evaluation)

    return make


def _is_evaluated(trainer: MaskedDiffusionTrainer) -> bool:
    """Whether the model, as it is now, was evaluated after the last step."""
    if trainer.args.load_best_model_at_end:  # it is an earlier one
        return False
    return any("eval_loss" in row and row["step"] == trainer.state.global_step for row in trainer.state.log_history)


def _save(trainer: MaskedDiffusionTrainer, folder: Path) -> None:
    """The final model and tokenizer, and nothing of the run."""
    unfinished = folder.parent / UNFINISHED / folder.name
    if trainer.is_world_process_zero():
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(unfinished))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (unfinished / "training_args.bin").unlink(missing_ok=True)
        put_in_place(unfinished, folder)
        trainer.state.save_to_json(str(folder.parent / "trainer_state.json"))
        print(f"Saved the model and its tokenizer to {folder}")
