"""The front door to training: LLaDA's Trainer, and its two jobs as functions of a command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.errors import OptionError
from dllm.pipelines.llada.generate import generate
from dllm.pipelines.llada.loading import fits, fresh_model, load_config, load_model
from dllm.pipelines.llada.presets import PRESETS
from dllm.pipelines.llada.tokenizer import bpe_tokenizer, char_tokenizer, load_tokenizer
from dllm.training.run import Family, Task, prepare_rows, run
from dllm.training.trainer import MaskedDiffusionTrainer


class LLaDATrainer(MaskedDiffusionTrainer):
    """Trains LLaDA. Nothing differs from masked diffusion at large: linear schedule, cross-entropy over p_mask at masks.

    Source: LLaDA, arXiv:2502.09992, Algorithms 1 and 2.
    """


def make_tokenizer(name: str, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerBase:
    """A tokenizer by name: builtin:char, bpe:N (trained on the texts), a folder or a hub id.

    Raises:
        OptionError: bpe: without a number.
        CheckpointError: see `load_tokenizer`.
    """
    if name == "builtin:char":
        return char_tokenizer()
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:").replace("_", "")
        if not size.isdigit():
            raise OptionError(
                f"--tokenizer_name_or_path {name}: write bpe:N with the number of entries, such as bpe:8192."
            )
        return bpe_tokenizer(texts(), int(size))
    return load_tokenizer(name)


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], length: int, seed: int
) -> list[str]:
    """Texts of `length` tokens at most after each prompt, a token a step, the likeliest first."""
    return generate(model, tokenizer, prompts, gen_length=length, steps=length, seed=seed).texts


LLADA = Family(
    presets=tuple(PRESETS),
    make_tokenizer=make_tokenizer,
    load_config=load_config,
    load_model=load_model,
    fresh_model=fresh_model,
    fits=fits,
    trainer=LLaDATrainer,
    sample=sample,
)


def pretrain(argv: Sequence[str] | None = None) -> Path:
    """Pretrains from command-line arguments; see `dllm pretrain --help`. Returns the folder of the final model."""
    return run("pretrain", LLADA, argv)


def sft(argv: Sequence[str] | None = None) -> Path:
    """Fine-tunes from command-line arguments; see `dllm sft --help`. Returns the folder of the final model."""
    return run("sft", LLADA, argv)


def prepare(task: Task, argv: Sequence[str] | None = None) -> Path:
    """Makes rows of tokens for a task, once; see `dllm prepare --help`. Returns their folder."""
    return prepare_rows(task, LLADA, argv)
