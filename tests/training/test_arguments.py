"""Settings of a run: masked diffusion's defaults, and values that do not fit."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dllm.errors import OptionError
from dllm.layers.processors import bf16_is_fast
from dllm.training.adapters import AdapterArguments
from dllm.training.arguments import DataArguments, ModelArguments, TrainingArguments


def arguments(tmp_path: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), **options)


def test_defaults_are_those_of_masked_diffusion(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert (args.loss_normalisation, args.times, args.masking, args.pad_to) == (
        "token",
        "stratified",
        "bernoulli",
        "global",
    )
    assert (args.min_time, args.max_time, args.optimizer) == (0.0, 1.0, "adamw")
    assert args.learning_rate == 4e-4
    assert args.weight_decay == 0.1
    assert args.ddp_find_unused_parameters is False
    assert args.remove_unused_columns is False
    assert args.save_total_limit == 2
    assert DataArguments().random_length == 0.01


def test_without_an_accelerator_training_is_on_the_processor(tmp_path: Path) -> None:
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert arguments(tmp_path).use_cpu is not accelerated
    assert arguments(tmp_path, use_cpu=True).use_cpu is True


def test_bf16_is_on_where_it_is_fast_unless_said_otherwise(tmp_path: Path) -> None:
    assert arguments(tmp_path).bf16 is bf16_is_fast(cpu=not torch.cuda.is_available())
    assert arguments(tmp_path, bf16=False).bf16 is False
    assert arguments(tmp_path, bf16=True).bf16 is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_normalisation": "tokn"}, "loss_normalisation='tokn' does not exist. Did you mean 'token'?"),
        (
            {"loss_normalisation": "mean"},
            "loss_normalisation='mean' does not exist. It can be one of: batch, sequence, to",
        ),
        ({"times": "uniform"}, "--times 'uniform' does not exist: it is stratified or independent."),
        ({"masking": "gauss"}, "--masking 'gauss' does not exist: it is bernoulli or exact."),
        ({"pad_to": "batch"}, "--pad_to 'batch' does not exist: it is global or local."),
        ({"optimizer": "sgd"}, "--optimizer 'sgd' does not exist: it is adamw or muon."),
        ({"min_time": 0.5, "max_time": 0.5}, "--min_time 0.5 --max_time 0.5: 0 <= min_time < max_time <= 1 is needed."),
        ({"min_time": -0.1}, "--min_time -0.1 --max_time 1.0: 0 <= min_time"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: it is 1 or more."),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size 0: it is 1 or more."),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0: it is 1 or more."),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
            "workers that live on would keep the firs",
        ),
        ({"max_time": 1.5}, "--min_time 0.0 --max_time 1.5: 0 <= min_time"),
        (
            {"train_sampling_strategy": "sequential"},
            "sequential: the order of the data is a keyed shuffle, random or",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        arguments(tmp_path, **options)


def test_every_option_that_we_add_or_change_has_a_help_text() -> None:
    theirs = {field.name: field for field in fields(transformers.TrainingArguments)}
    for kind in (ModelArguments, DataArguments, TrainingArguments, AdapterArguments):
        for field in fields(kind):
            if field.name not in theirs or field.default != theirs[field.name].default:
                assert field.metadata["help"].endswith("."), field.name
                assert field.default is not MISSING or field.default_factory is not MISSING
