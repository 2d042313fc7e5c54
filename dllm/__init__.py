"""dllm: pretrain, fine-tune and sample LLaDA, the masked-diffusion language models.

    import dllm

    model, tokenizer = dllm.load_model("GSAI-ML/LLaDA-8B-Instruct"), dllm.load_tokenizer("GSAI-ML/LLaDA-8B-Instruct")
    result = dllm.generate(model, tokenizer, ["Why is the sky blue?"], gen_length=64)

Names are imported when they are first used: `import dllm` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dllm.errors import CheckpointError, DataError, DllmError, MissingExtraError, OptionError

if TYPE_CHECKING:
    from dllm.pipelines.llada.engine import Engine
    from dllm.pipelines.llada.generate import generate, infill, infilling
    from dllm.pipelines.llada.loading import load_model
    from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig
    from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig
    from dllm.pipelines.llada.models.modeling_llada import LLaDAModelLM
    from dllm.pipelines.llada.models.modeling_lladamoe import LLaDAMoEModelLM
    from dllm.pipelines.llada.result import SamplingResult
    from dllm.pipelines.llada.tokenizer import load_tokenizer
    from dllm.pipelines.llada.trainer import LLaDATrainer, pretrain, sft
    from dllm.sampling.config import SamplingConfig

__version__ = "0.1.0"

_LAZY = {
    "Engine": "dllm.pipelines.llada.engine",
    "LLaDAConfig": "dllm.pipelines.llada.models.configuration_llada",
    "LLaDAMoEConfig": "dllm.pipelines.llada.models.configuration_lladamoe",
    "LLaDAMoEModelLM": "dllm.pipelines.llada.models.modeling_lladamoe",
    "LLaDAModelLM": "dllm.pipelines.llada.models.modeling_llada",
    "LLaDATrainer": "dllm.pipelines.llada.trainer",
    "SamplingConfig": "dllm.sampling.config",
    "SamplingResult": "dllm.pipelines.llada.result",
    "generate": "dllm.pipelines.llada.generate",
    "infill": "dllm.pipelines.llada.generate",
    "infilling": "dllm.pipelines.llada.generate",
    "load_model": "dllm.pipelines.llada.loading",
    "load_tokenizer": "dllm.pipelines.llada.tokenizer",
    "pretrain": "dllm.pipelines.llada.trainer",
    "sft": "dllm.pipelines.llada.trainer",
}

__all__ = [
    "CheckpointError",
    "DataError",
    "DllmError",
    "Engine",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "LLaDATrainer",
    "MissingExtraError",
    "OptionError",
    "SamplingConfig",
    "SamplingResult",
    "generate",
    "infill",
    "infilling",
    "load_model",
    "load_tokenizer",
    "pretrain",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
