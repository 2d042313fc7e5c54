"""Bidirectional attention: every real position sees every real position.

Shapes: B batch, L positions, H query heads, G key/value heads, K head width.

The kernel is chosen by the model's `attn_implementation` through transformers' attention interface (sdpa, eager,
flash_attention_2, flex_attention, ...), so whatever is registered there works here. One choice is made on top:
`sdpa` on a CPU in bf16 with few positions trains through the explicit product, which with its backward is 1.3 to 5.4
times as fast there as torch's fused kernel (benchmarks/results/attention_cpu_2026-11-25.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask, packed_sequence_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dllm.layers.rope import rotate

EXPLICIT_CPU_POSITIONS = 256
"""Up to this many positions the explicit product, with its backward, beats torch's fused kernel on a CPU in bf16."""


class PackedDocuments(NamedTuple):
    """Where documents start, in the form of the variable-length kernels (flash attention)."""

    starts: Tensor
    """int32 [documents + 1]: cumulative lengths over the flattened batch."""
    longest: int
    """No document is longer."""


class AttentionPlan(ABC):
    """Decides for a pass over packed tokens who sees whom, and where keys and values are kept. Given as the attention mask."""

    @abstractmethod
    def mix(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One layer's attention.

        Args:
            module: the attention, as in `attend`.
            query: [1, H, T, K], rotated.
            key: [1, G, T, K], rotated.
            value: [1, G, T, K].

        Returns:
            [1, T, H, K].
        """


def explicit_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """softmax(QK^T * scaling + mask) V, written out, with the softmax in fp32.

    Query heads that share a key head are rows of one product, so keys and values are not repeated in memory.

    Args:
        module: gives `scaling`.
        query: [B, H, L, K].
        key: [B, G, L, K] with H a multiple of G.
        value: [B, G, L, K].
        attention_mask: boolean (True = may be seen) or additive, [B or 1, 1, L, L], or None.
        **kwargs: what the interface passes and this kernel has no use for.

    Returns:
        (output [B, L, H, K], weights [B, H, L, L]).
    """
    B, H, L, K = query.shape
    G = key.shape[1]
    rows = (query * module.scaling).reshape(B, G, H // G * L, K)
    scores = torch.matmul(rows, key.transpose(2, 3)).view(B, H, L, -1)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1)  # torch sums in fp32 and rounds once, without a copy in fp32
    mixed = torch.matmul(weights.view(B, G, H // G * L, -1), value)
    return mixed.view(B, H, L, K).transpose(1, 2), weights


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any) -> Tensor:
    """Attention by the implementation that `module.config` names.

    Args:
        module: has `config`, `scaling` (a float), `is_causal = False` and `num_key_value_groups`.
        query: [B, H, L, K].
        key: [B, G, L, K].
        value: [B, G, L, K].
        attention_mask: what `attention_bias` gave for this implementation, or a plan.

    Returns:
        [B, L, H, K].
    """
    if isinstance(attention_mask, AttentionPlan):
        return attention_mask.mix(module, query, key, value)
    name = module.config._attn_implementation
    few_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= EXPLICIT_CPU_POSITIONS
    if name == "sdpa" and few_on_cpu and torch.is_grad_enabled():  # of the forward alone, either may be the faster one
        return explicit_attention(module, query, key, value, attention_mask)[0]
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(name, explicit_attention)
    options: dict[str, Any] = {"dropout": 0.0, "scaling": module.scaling, "is_causal": False}
    if not isinstance(attention_mask, PackedDocuments):
        return kernel(module, query, key, value, attention_mask, **options)[0]
    B, _, L, _ = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value))
    for side in ("q", "k"):
        options |= {f"cu_seq_lens_{side}": attention_mask.starts, f"max_length_{side}": attention_mask.longest}
    return kernel(module, query, key, value, None, **options)[0].unflatten(1, (B, L))[0]


def rotary_attention(module: Any, x_BLD: Tensor, cos: Tensor, sin: Tensor, attention_mask: Any) -> Tensor:
    """Self-attention up to its output projection: queries, keys, values, their norms, rotation, mixing.

    Args:
        module: has `q_proj`, `k_proj`, `v_proj` and what `attend` needs; `q_norm` and `k_norm`, where it has them, act on
            each head before the rotation.
        x_BLD: [B, L, D].
        cos: of `rotary_tables`.
        sin: of `rotary_tables`.
        attention_mask: of `attention_bias`.

    Returns:
        [B, L, H * K].
    """
    B, L, _ = x_BLD.shape
    query, key, value = (
        projection(x_BLD).view(B, L, -1, module.config.head_dim).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    mixed = attend(module, rotate(query, cos, sin), rotate(key, cos, sin), value, attention_mask)
    return mixed.reshape(B, L, -1)


def document_starts(document_ids_BL: Tensor) -> Tensor:
    """bool [B, L]: where a row begins, or an id differs from the one before."""
    starts_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    starts_BL[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    return starts_BL


def attention_bias(
    config: PreTrainedConfig,
    embeddings_BLD: Tensor,
    attention_mask_BL: Tensor | AttentionPlan | None,
    document_ids_BL: Tensor | None = None,
) -> Any:
    """What the chosen kernel takes as its mask.

    Args:
        config: names the kernel.
        embeddings_BLD: gives sizes, dtype and device.
        attention_mask_BL: non-zero at real positions, or None: then nothing is built and nothing is paid. A plan stays itself.
        document_ids_BL: int64; equal neighbours are one document, and positions see their own document alone.

    Returns:
        None where every position sees every position. On a CPU a mask without padding counts as None; elsewhere that is not
        looked up, because it would make the host wait for the device.
    """
    if isinstance(attention_mask_BL, AttentionPlan):
        return attention_mask_BL
    if document_ids_BL is None:
        if attention_mask_BL is None:
            return None
        return create_bidirectional_mask(
            config=config,
            inputs_embeds=embeddings_BLD,
            attention_mask=attention_mask_BL,
            allow_is_bidirectional_skip=embeddings_BLD.device.type == "cpu" or "flash" in config._attn_implementation,
        )
    document_ids_BL = document_starts(document_ids_BL).cumsum(1)  # an id that comes again later is another document
    if attention_mask_BL is not None:  # padding is a document of its own, which no real position is in
        document_ids_BL = document_ids_BL.masked_fill(attention_mask_BL == 0, -1)
    if config._attn_implementation in ("sdpa", "eager"):
        return (document_ids_BL[:, :, None] == document_ids_BL[:, None, :])[:, None]
    if "flash" in config._attn_implementation:
        start = document_starts(document_ids_BL).flatten().nonzero()[:, 0].to(torch.int32)
        return PackedDocuments(
            nn.functional.pad(start, (0, 1), value=document_ids_BL.numel()), document_ids_BL.shape[1]
        )
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=embeddings_BLD,
        attention_mask=None,
        and_mask_function=packed_sequence_mask_function(document_ids_BL),
    )


class RaggedRows(AttentionPlan):
    """Rows of any lengths, packed one after the other: each sees itself alone, and no position is spent on padding.

    Only the product of queries and keys is padded, to the longest row; rows of one length are not even copied.

    Args:
        lengths: tokens of each row.
        device: where the pass runs.
        visible: bool [R, 1, longest or 1, longest], what a row's positions may see of it; all of it by default. Right padding is
            hidden without it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str, visible: Tensor | None = None) -> None:
        self.lengths, self.longest = list(lengths), max(lengths)
        self.visible = visible
        self.even = all(length == self.longest for length in self.lengths)
        if self.even:
            return
        length_R = torch.tensor(self.lengths)
        start_R = length_R.cumsum(0) - length_R
        place_L = torch.arange(self.longest)
        real_RL = place_L < length_R[:, None]
        # padding repeats the row's own last token: where one row's numbers are none, no other row sees them, hidden or not
        self.source = (start_R[:, None] + torch.minimum(place_L, length_R[:, None] - 1)).to(device)
        self.target = real_RL.flatten().nonzero()[:, 0].to(device)
        hidden = real_RL[:, None, None].to(device)
        self.visible = hidden if visible is None else hidden & visible
        self.starts = nn.functional.pad(length_R.cumsum(0), (1, 0)).to(device, torch.int32)

    def mix(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionPlan.mix`."""
        if self.even:
            query, key, value = (x[0].unflatten(1, (-1, self.longest)).transpose(0, 1) for x in (query, key, value))
            return attend(module, query, key, value, self.visible).flatten(0, 1)[None]
        if "flash" in module.config._attn_implementation:
            return attend(module, query, key, value, PackedDocuments(self.starts, self.longest))
        query, key, value = (x[0][:, self.source].transpose(0, 1) for x in (query, key, value))
        return attend(module, query, key, value, self.visible).flatten(0, 1)[self.target][None]
