"""What a checkpoint is, without loading its weights: architecture, parameters, special tokens, memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from dllm.errors import CheckpointError
from dllm.layers.adapters import base_of
from dllm.pipelines.llada.checkpoint_files import DTYPE_NAMES, tensor_headers
from dllm.pipelines.llada.embedded import resolve
from dllm.pipelines.llada.loading import adapter_folder, load_config
from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig, is_mixture
from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig
from dllm.pipelines.llada.presets import PRESETS
from dllm.pipelines.llada.tokenizer import load_tokenizer

DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
TRAINING_BYTES = {
    "AdamW": 4 + 4 + 8,
    "AdamW with 8-bit moments": 4 + 4 + 2,
    "Muon and AdamW": 4 + 4 + 4,
    "SGD": 4 + 4,
}
"""Bytes a parameter: fp32 weight, fp32 gradient, moments. Muon keeps one moment for matrices (the few others keep two)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Everything `dllm info` says."""

    name: str
    architecture: str
    sizes: dict[str, int]
    """Layers, widths, heads, context, vocabulary, experts."""
    parameters: int
    active_parameters: int
    """Those that one token goes through: of the experts, only the chosen ones."""
    embedding_parameters: int
    """Input embedding and head; once where they are one."""
    linear_parameters: int
    """Those of the blocks' linear layers, which quantisation packs; a mixture's experts are not among them."""
    dtype: str | None
    """Of the stored weights; None where there are none, or where they are not here."""
    stored_bytes: int | None
    special_tokens: dict[str, tuple[str | None, int]]
    """mask, eos, ... -> (text, id); the text is None where only the configuration says the id."""

    def memory(self) -> dict[str, float]:
        """Gigabytes (10^9 bytes) of weights for inference, and of weights, gradients and moments for training; without
        activations.
        """
        linear, rest = self.linear_parameters, self.parameters - self.linear_parameters
        inference = {f"inference, {name}": (a * linear + b * rest) / 1e9 for name, (a, b) in _INFERENCE.items()}
        return inference | {f"training, {name}": b * self.parameters / 1e9 for name, b in TRAINING_BYTES.items()}


_INFERENCE = {"float32": (4.0, 4.0), "bfloat16": (2.0, 2.0), "8 bit": (1.0, 2.0), "4 bit": (0.5, 2.0)}
"""Bytes of a weight in the blocks' linear layers, and of any other: quantisation leaves embedding, head and experts in bf16."""


def inspect(name_or_path: str) -> CheckpointInfo:
    """Reads configuration, tokenizer and the headers of the weights; builds the shape without memory.

    Args:
        name_or_path: a folder, a hub id, `builtin:NAME` or a preset.

    Raises:
        CheckpointError: no such checkpoint, one whose files are damaged, or an adapter.
    """
    preset = PRESETS.get(name_or_path)
    adapter = None if preset is not None else adapter_folder(name_or_path)
    if adapter is not None:
        raise CheckpointError(
            f"{name_or_path!r} is an adapter of {base_of(adapter)!r}: ask for that, or merge the two with  dllm convert."
        )
    if preset is None:
        config = load_config(name_or_path)
    else:
        config = LLaDAMoEConfig(**preset) if is_mixture(preset) else LLaDAConfig(**preset)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    headers, stored = {}, None
    folder = Path(resolve(name_or_path)).expanduser()
    if preset is None and folder.is_dir():
        headers = tensor_headers(folder)
        stored = sum(DTYPE_BYTES.get(dtype, 4) * torch.Size(shape).numel() for dtype, shape in headers.values())
    return CheckpointInfo(
        name=name_or_path,
        architecture=type(model).__name__,
        sizes=_sizes(config),
        parameters=total,
        active_parameters=total - _resting(model, config),
        embedding_parameters=_embedding(model),
        linear_parameters=sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
        ),
        dtype=", ".join(sorted({DTYPE_NAMES.get(dtype, dtype) for dtype, _ in headers.values()})) or None,
        stored_bytes=stored,
        special_tokens={} if preset is not None else _special_tokens(name_or_path, config),
    )


def _sizes(config: LLaDAConfig | LLaDAMoEConfig) -> dict[str, int]:
    sizes: dict[str, int | None] = {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "query heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
    }
    if isinstance(config, LLaDAMoEConfig):
        mixture = {"experts": config.num_experts, "experts a token": config.num_experts_per_tok}
        sizes |= {**mixture, "expert width": config.expert_intermediate_size}
    else:
        sizes["feed-forward width"] = config.mlp_hidden_size
    return {name: int(size) for name, size in sizes.items() if size is not None}


def _resting(model: PreTrainedModel, config: LLaDAConfig | LLaDAMoEConfig) -> int:
    if not isinstance(config, LLaDAMoEConfig):
        return 0
    stacked = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return stacked * (config.num_experts - config.num_experts_per_tok) // config.num_experts


def _embedding(model: PreTrainedModel) -> int:
    ends = {
        id(p): p
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in module.parameters()
    }
    return sum(p.numel() for p in ends.values())


def _special_tokens(name_or_path: str, config: LLaDAConfig | LLaDAMoEConfig) -> dict[str, tuple[str | None, int]]:
    try:
        tokenizer = load_tokenizer(name_or_path)
    except CheckpointError:  # a folder of weights alone still has ids in its configuration
        found = {name: getattr(config, f"{name}_token_id") for name in ("mask", "bos", "eos", "pad")}
        return {name: (None, id_) for name, id_ in found.items() if id_ is not None}
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("mask", "bos", "eos", "pad", "eot")}
    return {name: (tokenizer.convert_ids_to_tokens(id_), id_) for name, id_ in ids.items() if id_ is not None}
