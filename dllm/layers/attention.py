"""Bidirectional attention: every real position sees every real position.

Shapes: B batch, L positions, H query heads, G key/value heads, K head width.

The kernel is chosen by the model's `attn_implementation` through transformers' attention interface (sdpa, eager,
flash_attention_2, flex_attention, ...), so whatever is registered there works here. One choice is made on top:
`sdpa` on a CPU in bf16 with few positions runs the explicit product, which is several times as fast there as torch's
fused kernel (benchmarks/attention_cpu.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EXPLICIT_CPU_POSITIONS = 256
"""Up to this many positions the explicit product beats torch's fused kernel on a CPU in bf16."""


def explicit_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """softmax(QK^T * scaling + mask) V, written out, with the softmax in fp32.

    Args:
        module: gives `scaling`.
        query: [B, H, L, K].
        key: [B, G, L, K] with H a multiple of G.
        value: [B, G, L, K].
        attention_mask: boolean (True = may be seen) or additive, broadcastable to [B, H, L, L], or None.
        **kwargs: what the interface passes and this kernel has no use for.

    Returns:
        (output [B, L, H, K], weights [B, H, L, L]).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query * module.scaling, key.transpose(2, 3))
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any) -> Tensor:
    """Attention by the implementation that `module.config` names.

    Args:
        module: has `config`, `scaling` (a float), `is_causal = False` and `num_key_value_groups`.
        query: [B, H, L, K].
        key: [B, G, L, K].
        value: [B, G, L, K].
        attention_mask: what `padding_mask` gave for this implementation.

    Returns:
        [B, L, H, K].
    """
    name = module.config._attn_implementation
    few_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= EXPLICIT_CPU_POSITIONS
    if name == "sdpa" and few_on_cpu:
        return explicit_attention(module, query, key, value, attention_mask)[0]
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(name, explicit_attention)
    return kernel(module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling, is_causal=False)[0]


def padding_mask(config: PreTrainedConfig, embeddings_BLD: Tensor, attention_mask_BL: Tensor | None) -> Any:
    """Turns a [B, L] mask of real positions into what the chosen kernel takes; None stays None, so no mask is paid for."""
    if attention_mask_BL is None:
        return None
    return create_bidirectional_mask(config=config, inputs_embeds=embeddings_BLD, attention_mask=attention_mask_BL)
