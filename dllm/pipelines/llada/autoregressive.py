"""The autoregressive checkpoint that is adapted: where it is, its configuration, its tokenizer, its weights in LLaDA's names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from dllm.errors import CheckpointError, first_line
from dllm.pipelines.llada.adaptable import refuse_features
from dllm.pipelines.llada.checkpoint_files import hub_folder, is_hub_id, main_dtype, tensor_headers
from dllm.pipelines.llada.embedded import resolve
from dllm.pipelines.llada.gguf_files import GGUFHeader, check_gguf, gguf_config
from dllm.pipelines.llada.loading import refuse_misfits
from dllm.pipelines.llada.tokenizer import no_tokenizer

PUBLIC_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""Llama's name of a tensor's module -> LLaDA's."""


@dataclass(frozen=True)
class Source:
    """Where an autoregressive checkpoint is."""

    name: str
    """As the user wrote it."""
    where: str
    """A folder or a hub id."""
    gguf_file: str | None = None
    """A file in it, where the checkpoint is one."""
    header: GGUFHeader | None = None
    """Of that file."""

    @property
    def reading(self) -> dict[str, Any]:
        """For transformers' `from_pretrained`."""
        given: dict[str, Any] = {"pretrained_model_name_or_path": self.where, "trust_remote_code": False}
        return given if self.gguf_file is None else {**given, "gguf_file": self.gguf_file}


def find_source(name: str | Path, gguf_file: str | None = None) -> Source:
    """Where a checkpoint is; of a GGUF file, also that its weights can be read.

    Args:
        name: a folder, a hub id, or the path of a GGUF file.
        gguf_file: which GGUF file of a folder or a hub id.

    Raises:
        CheckpointError: it is not there, or a GGUF file is damaged or holds what cannot be adapted.
        MissingExtraError: a GGUF file without the package `gguf`.
    """
    name = str(name)
    path = Path(resolve(name)).expanduser()
    if gguf_file is None and path.suffix == ".gguf":
        path, gguf_file = path.parent, path.name
    if not path.is_dir() and not (is_hub_id(name) and path == Path(name)):
        raise CheckpointError(
            f"There is no checkpoint {name!r} (taken from {Path.cwd()}). Give the folder of one, a hub id such as "
            f"meta-llama/Meta-Llama-3-8B, or a .gguf file."
        )
    if gguf_file is None:
        if path.is_dir() and not (path / "config.json").exists():
            files = ", ".join(sorted(file.name for file in path.glob("*.gguf")))
            raise CheckpointError(
                f"The folder {name!r} has no config.json: "
                f"{f'name its GGUF file with --gguf_file ({files}).' if files else 'it is not a checkpoint.'}"
            )
        return Source(name, str(path) if path.is_dir() else name)
    if not path.is_dir():
        path = _downloaded(name, gguf_file)
        path, gguf_file = path.parent, path.name
    if not (path / gguf_file).is_file():
        there = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
        raise CheckpointError(f"There is no file {str(path / gguf_file)!r}; GGUF files there: {there}.")
    return Source(name, str(path), gguf_file, check_gguf(path / gguf_file))


def _downloaded(name: str, gguf_file: str) -> Path:
    try:
        return Path(str(cached_file(name, gguf_file)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{gguf_file} of {name!r} could not be had from the hub: {first_line(error)}") from error


def read_config(source: Source) -> PreTrainedConfig:
    """A source's configuration, of which LLaDA's dense block has everything.

    Raises:
        CheckpointError: there is none, or it asks for what the block has not.
    """
    import dllm.pipelines.llada.models.configuration_llada  # noqa: F401  so that a LLaDA checkpoint is known as one

    try:
        if source.header is not None:
            config = gguf_config(source.header, source.name)
        else:
            config = AutoConfig.from_pretrained(**source.reading)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"The configuration of {source.name!r} cannot be read: {first_line(error)}") from error
    refuse_features(config, source.name)
    return config


def read_weights(source: Source, config: PreTrainedConfig, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A source's tensors in LLaDA's names; tied ones once.

    Args:
        source: of `find_source`.
        config: of `read_config`.
        dtype: of the tensors; None for the one that most are stored in, and for fp32 of a GGUF file.

    Raises:
        CheckpointError: files are missing or damaged, tensors do not fit the configuration, or one holds NaN or infinity.
    """
    asked: torch.dtype | str = dtype or "float32"
    reading = source.reading
    if source.gguf_file is None:
        folder = Path(source.where) if Path(source.where).is_dir() else hub_folder(source.where)
        headers = tensor_headers(folder)
        asked = dtype or main_dtype(headers, source.name)
        reading = {"pretrained_model_name_or_path": str(folder), "use_safetensors": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            **reading, config=config, dtype=asked, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"The weights of {source.name!r} could not be loaded: {first_line(error)}") from error
    wrong = {name: (tuple(stored), tuple(asked)) for name, stored, asked in report["mismatched_keys"]}
    refuse_misfits(source.name, wrong, report["missing_keys"])
    if extra := sorted(name for name in report["unexpected_keys"] if "rotary_emb" not in name):
        raise CheckpointError(
            f"{source.name!r} holds {len(extra)} tensors that its configuration says nothing of, such as {extra[0]}: dllm adapts "
            f"plain {config.model_type} checkpoints. Is it another model's configuration?"
        )
    tied = config.tie_word_embeddings
    weights = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{source.name!r} holds NaN or infinity in {name}, read as {str(asked).removeprefix('torch.')}: no model works "
                f"with that. Copy it again, or take a wider dtype (--dtype float32)."
            )
    return {public_name(name): tensor for name, tensor in weights.items()}


def public_name(name: str) -> str:
    """The name of a Llama checkpoint's tensor in a LLaDA one."""
    module, _, kind = name.rpartition(".")
    if block := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"model.transformer.blocks.{block[1]}.{BLOCK_NAMES[block[2]]}.{kind}"
    return f"{PUBLIC_NAMES[module]}.{kind}"


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """A source's own tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be read here.
    """
    # of a GGUF file AutoTokenizer would read the whole vocabulary once more, to learn what class is the right one
    read: Callable[..., PreTrainedTokenizerBase] = AutoTokenizer.from_pretrained
    if source.gguf_file is not None:
        read = PreTrainedTokenizerFast.from_pretrained
    try:
        return read(**source.reading)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise no_tokenizer(source.name, error) from error
