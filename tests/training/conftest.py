"""A model of a few thousand weights, a few rows, and a trainer of them."""

from __future__ import annotations

import functools
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from training.commands import PRETRAIN, Done

from dllm.data.builtin import builtin_rows
from dllm.data.maps import pretraining_rows, sft_rows
from dllm.pipelines import llada
from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig
from dllm.pipelines.llada.models.modeling_llada import LLaDAModelLM
from dllm.pipelines.llada.tokenizer import char_tokenizer
from dllm.pipelines.llada.trainer import LLaDATrainer
from dllm.training.arguments import DataArguments, TrainingArguments
from dllm.training.run import Task, make_collator, make_packed

MakeTrainer = Callable[..., LLaDATrainer]
TOKENIZER = char_tokenizer()


def tiny_model(seed: int = 0) -> LLaDAModelLM:
    ids = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("mask", "bos", "eos", "pad")}
    shape = dict(d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=24, max_sequence_length=128)
    torch.manual_seed(seed)
    return LLaDAModelLM(LLaDAConfig(vocab_size=len(TOKENIZER), **shape, **ids))


@functools.cache
def tiny_rows(task: Task, count: int, split: str = "train") -> datasets.Dataset:
    """Pretraining: rows of 12 tokens. Fine-tuning: conversations of one to three turns, of many lengths."""
    if task == "pretrain":
        text = builtin_rows("addition", split, 3 * count, column="text")
        return pretraining_rows(datasets.Dataset.from_list(text), TOKENIZER, 12).select(range(count))
    chats = []
    for i in range(count):
        first = builtin_rows("addition", split, i + 1, column="messages")[-1]["messages"]
        more = [{"role": "user", "content": "+" * (5 * i % 7)}, {"role": "assistant", "content": "1" * (3 * i % 11)}]
        chats.append([*first, *more * (i % 3)])
    return sft_rows(datasets.Dataset.from_dict({"messages": chats}), TOKENIZER, 120)


@pytest.fixture(scope="session", autouse=True)
def imports_are_not_garbage() -> Iterator[None]:
    # accelerate collects garbage at the start of every training; the objects of all imports would be walked each time
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """(task, trainer class, rows, random_length, training arguments) -> a trainer that logs every step, in fp32."""

    def make(
        task: Task = "pretrain",
        *,
        kind: type[LLaDATrainer] = LLaDATrainer,
        train: datasets.Dataset | None = None,
        test: datasets.Dataset | None = None,
        random_length: float = 0.0,
        packed: int | None = None,
        **options: Any,
    ) -> LLaDATrainer:
        settings = dict(
            output_dir=str(tmp_path / "run"), bf16=False, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        data = DataArguments(random_length=random_length)
        return kind(
            tiny_model(),
            TrainingArguments(**{**settings, **options}),
            processing_class=TOKENIZER,
            train_dataset=tiny_rows(task, 10) if train is None else train,
            eval_dataset=test,
            make_collator=make_collator(task, data, TOKENIZER),
            make_packed=None if packed is None else make_packed(DataArguments(max_length=packed, pack_eos="2")),
        )

    return make


@pytest.fixture
def rows_of() -> Callable[..., datasets.Dataset]:
    return tiny_rows


@pytest.fixture
def tokenizer() -> Any:
    return TOKENIZER


@pytest.fixture
def model() -> LLaDAModelLM:
    return tiny_model()


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run of 4 steps with checkpoints 2 and 4; not to be changed."""
    output = tmp_path_factory.mktemp("pretrained") / "run"
    return Done(output, llada.pretrain([*PRETRAIN, "--output_dir", str(output)]))


@pytest.fixture
def copied(pretrained: Done, tmp_path: Path) -> Path:
    """The output folder of that run as if it had been killed before it saved the final model."""
    shutil.copytree(pretrained.output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-final")
    return tmp_path / "run"
