"""LLaDA: dense models, tokenizers, sampling and training.

Use:

    from dllm.pipelines import llada

    llada.generate(model, tokenizer, prompts, ...)
    llada.infilling(model, tokenizer, inputs, ...)
    llada.Engine(model, tokenizer).stream(prompt, ...)
    llada.pretrain([...]), llada.sft([...])
    llada.adapt("Qwen/Qwen2.5-0.5B", "models/qwen")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported here and not lazily: a submodule of the same name would otherwise stand where the function should.
from dllm.pipelines.llada.adaptation import adapt
from dllm.pipelines.llada.engine import Engine
from dllm.pipelines.llada.generate import generate, infill, infilling
from dllm.pipelines.llada.loading import best_device, compile_blocks, fresh_model, load_model, to_device
from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig
from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig
from dllm.pipelines.llada.models.modeling_llada import LLaDAModel, LLaDAModelLM
from dllm.pipelines.llada.models.modeling_lladamoe import LLaDAMoEModel, LLaDAMoEModelLM
from dllm.pipelines.llada.result import SamplingResult
from dllm.pipelines.llada.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from dllm.pipelines.llada.streamer import DraftStreamer
    from dllm.pipelines.llada.trainer import LLaDATrainer, pretrain, sft

__all__ = [
    "DraftStreamer",
    "Engine",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModel",
    "LLaDAMoEModelLM",
    "LLaDAModel",
    "LLaDAModelLM",
    "LLaDATrainer",
    "SamplingResult",
    "adapt",
    "best_device",
    "compile_blocks",
    "fresh_model",
    "generate",
    "infill",
    "infilling",
    "load_model",
    "load_tokenizer",
    "pretrain",
    "sft",
    "to_device",
]


# transformers' Trainer takes seconds to import
_LATER = {"DraftStreamer": "streamer", "LLaDATrainer": "trainer", "pretrain": "trainer", "sft": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"dllm.pipelines.llada.{_LATER[name]}"), name)
