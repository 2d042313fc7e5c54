"""What a run is fed with: tokenizer and rows of ids, from sources or from a folder that `dllm prepare` wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.data import mixture
from dllm.data.cache import tokenizer_fingerprint
from dllm.data.columns import ColumnNames
from dllm.data.duplicates import digests
from dllm.data.lanes import StreamPlan
from dllm.data.maps import Fitting, check_chat_template, pretraining_rows, sft_rows
from dllm.data.prepared import TOKENIZER, Manifest, load_prepared, read_manifest, versions, write_prepared
from dllm.data.shards import open_source
from dllm.data.sources import Reading, Rendering, Splits, join_splits, joined, load_sources
from dllm.data.spec import SourceSpec, parse_dataset_args
from dllm.data.streams import chained, first_documents, streamed_rows
from dllm.errors import OptionError
from dllm.training.adapters import load_to_train
from dllm.training.arguments import DataArguments, ModelArguments, TrainingArguments

if TYPE_CHECKING:
    from dllm.training.run import Family, Task

DEFAULT_LENGTH = 1024
"""Tokens in a row, where nothing is said and the context holds them."""
TOKENIZER_DOCUMENTS = 100_000
"""Documents of a stream that a tokenizer is trained on, of each source."""
DEFAULT_DATA = {"pretrain": "builtin:text", "sft": "builtin:addition"}
Say = Callable[[str], None]


class Feed(NamedTuple):
    """What a run is fed with."""

    tokenizer: PreTrainedTokenizerBase
    train: Any
    """Rows of ids: a `datasets.Dataset`, or a stream of them."""
    test: datasets.Dataset | None
    max_length: int


def load_feed(
    task: Task,
    family: Family,
    model_args: ModelArguments,
    data_args: DataArguments,
    *,
    say: Say | None,
    plan: StreamPlan | None = None,
) -> Feed:
    """Tokenizer and rows; what is wrong with the arguments is found first.

    Args:
        task: "pretrain" or "sft".
        family: the models.
        model_args: which tokenizer, and what context.
        data_args: which data.
        say: shows what was done to the rows; None on all processes but one.
        plan: what decides the order of a stream.

    Raises:
        DllmError: the arguments, the tokenizer or the data.
    """
    name = model_args.model_name_or_path
    preset = name in family.presets
    if task == "sft" and str(model_args.tokenizer_name_or_path).startswith("bpe:"):
        raise OptionError(
            f"--tokenizer_name_or_path {model_args.tokenizer_name_or_path}: a BPE is trained in pretraining, and fine-tuning "
            f"uses the tokenizer that the model was pretrained with. Leave the option out."
        )
    context = DEFAULT_LENGTH if preset else family.load_config(name).max_position_embeddings
    prepared = Path(data_args.load_preprocessed_data).expanduser() if data_args.load_preprocessed_data else None
    there = None if prepared is None else read_manifest(prepared)
    default = min(DEFAULT_LENGTH, context) if there is None else there.max_length
    max_length = data_args.max_length or default
    if not preset and max_length > context:
        what = f"--max_length {max_length}" if data_args.max_length or not prepared else f"{prepared}: its {max_length}"
        raise OptionError(f"{what} exceeds the model's context of {context}.")
    tokenizer_name = model_args.tokenizer_name_or_path or ("builtin:char" if preset else name)
    if prepared is not None:
        if preset and model_args.tokenizer_name_or_path is None:
            tokenizer_name = str(prepared / TOKENIZER)
        tokenizer = family.make_tokenizer(tokenizer_name, lambda: iter(()))
        _, train, test = load_prepared(prepared, tokenizer, partial(_asked, task, data_args))
        return Feed(tokenizer, train, test, max_length)
    specs = parse_dataset_args(data_args.dataset_args)  # a slip there is found before a tokenizer is loaded
    trained_here = tokenizer_name.startswith("bpe:")
    tokenizer = None if trained_here else family.make_tokenizer(tokenizer_name, lambda: iter(()))
    if plan is not None and is_streamed(data_args):
        make = partial(family.make_tokenizer, tokenizer_name)
        return _load_stream(task, data_args, specs, tokenizer, make, max_length, plan, say)
    sources = load_sources(data_args.dataset_args, reading(task, data_args, tokenizer, say))
    train, test = join_splits(sources)
    if tokenizer is None:
        tokenizer = family.make_tokenizer(tokenizer_name, lambda: iter(train["text"]))
    encode = encoder(task, data_args, tokenizer, max_length, say)
    train_rows = _mixed(sources, encode, say)
    return Feed(tokenizer, train_rows, None if test is None else encode(test, what="test"), max_length)


def stream_plan(data_args: DataArguments, args: TrainingArguments) -> StreamPlan:
    """What decides the order of a stream in a run."""
    return StreamPlan(
        seed=args.seed if args.data_seed is None else args.data_seed,
        group=args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        steps=args.max_steps,
        buffer=data_args.shuffle_buffer,
    )


def is_streamed(data_args: DataArguments) -> bool:
    """Whether the data are read while training."""
    return data_args.streaming or any(spec.streaming for spec in parse_dataset_args(data_args.dataset_args))


def _load_stream(
    task: Task,
    data_args: DataArguments,
    specs: list[SourceSpec],
    tokenizer: PreTrainedTokenizerBase | None,
    make_tokenizer: Callable[[Callable[[], Iterator[str]]], PreTrainedTokenizerBase],
    max_length: int,
    plan: StreamPlan,
    say: Say | None,
) -> Feed:
    """The same, from sources that are read while training."""
    if plan.steps < 1:
        raise OptionError("Streaming has no epochs: say with --max_steps how long to train.")
    if data_args.shuffle_buffer < 1:
        raise OptionError(f"--shuffle_buffer {data_args.shuffle_buffer}: it is 1 or more.")
    opened = [open_source(spec, reading(task, data_args, tokenizer, say)) for spec in specs]
    sources = chained([source for source, _ in opened])
    tests = [test for _, test in opened if test is not None and len(test)]
    held = digests(tests)
    if tokenizer is None:
        tokenizer = make_tokenizer(lambda: first_documents(sources, TOKENIZER_DOCUMENTS, held))
    fitting = None
    if task == "sft":
        check_chat_template(tokenizer)
        fitting = Fitting(
            max_length=max_length, truncation=data_args.truncation or "right", turns=data_args.turns or "drawn"
        )
    train = streamed_rows(
        sources, plan, tokenizer, length=max_length if fitting is None else None, fitting=fitting,
        held=held, key=[tokenizer_fingerprint(tokenizer), column_names(data_args)],
    )  # fmt: skip
    test = encoder(task, data_args, tokenizer, max_length, say)(joined(tests), what="test") if tests else None
    return Feed(tokenizer, train, test, max_length)


def _mixed(sources: list[Splits], encode: Callable[..., datasets.Dataset], say: Say | None) -> datasets.Dataset:
    """Training rows: the sources one after the other, or in the shares that their weights give."""
    if sources[0].spec.weight is None:
        return encode(joined([source.train for source in sources]))
    rows = [encode(source.train, what=source.spec.name) for source in sources]
    weights = [source.spec.weight or 0.0 for source in sources]
    if say is not None:
        mixture.tell(say, [source.spec.name for source in sources], [len(part) for part in rows], weights)
    return mixture.mix(rows, weights)


def prepare(
    task: Task,
    family: Family,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, Any, datasets.Dataset | None]:
    """Tokenizer, model, and rows of ids; cheap checks come first, weights last."""
    name = model_args.model_name_or_path
    preset = name in family.presets
    if task == "sft" and preset:
        raise OptionError(
            f"{name!r} is a shape without weights: pretrain it first, then fine-tune the folder that it made."
        )
    with args.main_process_first(desc="data"):  # the others find what the first one made
        say = partial(print, flush=True) if args.process_index == 0 else None
        tokenizer, train_rows, test_rows, max_length = load_feed(
            task, family, model_args, data_args, say=say, plan=stream_plan(data_args, args)
        )
    data_args.max_length = max_length
    if task == "pretrain" and not model_args.continue_from_weights:
        if model_args.adapter.lora:
            raise OptionError(
                "--lora needs weights to adapt, and pretraining starts fresh: add --continue_from_weights."
            )
        model = family.fresh_model(name, tokenizer, model_args.config_overrides, max_length)
    elif model_args.config_overrides:
        raise OptionError("--config_overrides only changes a model that starts fresh: leave it out.")
    else:
        config = None if preset else family.load_config(name)
        if config is not None and not family.fits(config, tokenizer):
            raise OptionError(
                f"The tokenizer {model_args.tokenizer_name_or_path!r} is not that of {name!r}: it has {len(tokenizer)} entries "
                f"and the mask {tokenizer.mask_token_id}, the model's mask is {config.mask_token_id}. Leave the option out."
            )
        model = load_to_train(family.load_model, name, model_args.adapter, args)
    return tokenizer, model, train_rows, test_rows


def column_names(data_args: DataArguments) -> ColumnNames:
    """The columns that the user named."""
    return ColumnNames(**{kind: getattr(data_args, f"{kind}_column") for kind in (f.name for f in fields(ColumnNames))})


def reading(
    task: Task, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase | None, say: Say | None
) -> Reading:
    """What a task reads of its sources; pretraining writes conversations out with the tokenizer's chat template."""
    render = None
    if task == "pretrain" and tokenizer is not None and tokenizer.chat_template is not None:
        render = Rendering(tokenizer_fingerprint(tokenizer), partial(tokenizer.apply_chat_template, tokenize=False))
    column = "text" if task == "pretrain" else "messages"
    return Reading(column=column, names=column_names(data_args), render=render, say=say)


def encoder(
    task: Task, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, max_length: int, say: Say | None
) -> Callable[..., datasets.Dataset]:
    """From rows of text or conversations to rows of ids: (rows, what=how lines call them)."""
    if task == "pretrain":

        def cut(rows: datasets.Dataset, what: str = "") -> datasets.Dataset:
            return pretraining_rows(rows, tokenizer, max_length, workers=data_args.num_proc)

        return cut
    check_chat_template(tokenizer)
    return partial(
        sft_rows, tokenizer=tokenizer, max_length=max_length, truncation=data_args.truncation or "right",
        turns=data_args.turns or "drawn", workers=data_args.num_proc, say=say,
    )  # fmt: skip


def _asked(task: Task, data_args: DataArguments, there: Manifest) -> Manifest:
    """A manifest with what this run asks for; what it leaves open is as it is there."""
    given = {
        name: getattr(data_args, name)
        for name in ("max_length", "truncation", "turns")
        if getattr(data_args, name) is not None
    }
    if data_args.dataset_args != DEFAULT_DATA[task]:
        given["dataset_args"] = data_args.dataset_args
    return replace(there, task=task, **given)


def prepare_data(
    task: Task, family: Family, model_args: ModelArguments, data_args: DataArguments, output_dir: str, *, say: Say
) -> Path:
    """Makes the rows of a task and writes them to a folder for `--load_preprocessed_data`.

    Raises:
        DllmError: the arguments, the tokenizer, the data or the folder.
    """
    if not output_dir:
        raise OptionError("Give --output_dir, the folder to write.")
    folder = Path(output_dir).expanduser()
    if folder.exists():
        raise OptionError(f"--output_dir {folder} is there already: name another folder, or remove this one.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{folder} cannot be written: {error.strerror}. Name another folder.") from error
    if not os.access(folder.parent, os.W_OK):
        raise OptionError(f"{folder} cannot be written: {folder.parent} is locked. Name another folder.")
    if is_streamed(data_args):
        raise OptionError("A stream is not prepared but read while training: leave streaming out.")
    if data_args.load_preprocessed_data:
        raise OptionError("--load_preprocessed_data names rows that are prepared: leave it out.")
    feed = load_feed(task, family, model_args, data_args, say=say)
    fine_tuning = task == "sft"
    manifest = Manifest(
        task=task,
        dataset_args=data_args.dataset_args,
        max_length=feed.max_length,
        truncation=(data_args.truncation or "right") if fine_tuning else None,
        turns=(data_args.turns or "drawn") if fine_tuning else None,
        tokenizer=tokenizer_fingerprint(feed.tokenizer),
        train=len(feed.train),
        test=0 if feed.test is None else len(feed.test),
        versions=versions(),
    )
    write_prepared(folder, manifest, feed.tokenizer, feed.train, feed.test, workers=data_args.num_proc)
    say(f"{manifest.train:,} training and {manifest.test:,} test rows of {feed.max_length} tokens at most in {folder}")
    return folder
