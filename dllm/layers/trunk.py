"""What every mask predictor does around its blocks: embed, place, mask, run the blocks, and the head where it is asked for.

Shapes: B batch, L positions, D width, V vocabulary, N positions that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dllm.layers.attention import AttentionPlan, attention_bias, document_starts
from dllm.layers.rope import rotary_tables


class Encoded(NamedTuple):
    """What the blocks made of the input."""

    last: Tensor
    """[B, L, D], after the last norm."""
    states: tuple[Tensor, ...] | None
    """Every block's input and `last`, if asked for."""
    router_logits: tuple[Tensor, ...]
    """[B * L, E] of every block that has a router."""


def document_positions(document_ids_BL: Tensor) -> Tensor:
    """int64 [B, L]: each position counted from the start of its document."""
    place_L = torch.arange(document_ids_BL.shape[1], device=document_ids_BL.device)
    return place_L - torch.where(document_starts(document_ids_BL), place_L, 0).cummax(1).values


def encode(
    config: PreTrainedConfig,
    embed: nn.Module,
    blocks: Iterable[nn.Module],
    norm: nn.Module,
    *,
    rotary_dim: int,
    rope_theta: float,
    input_ids: Tensor | None,
    attention_mask: Tensor | AttentionPlan | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    output_hidden_states: bool | None,
) -> Encoded:
    """Runs a model up to its last norm.

    Args:
        config: names the attention kernel, and says whether hidden states are returned by default.
        embed: ids -> [B, L, D].
        blocks: called as block(x, cos, sin, bias); each gives x, or (x, router logits).
        norm: the last one.
        rotary_dim: width of a head.
        rope_theta: of the rotary embedding.
        input_ids: int64 [B, L], or None with `inputs_embeds`.
        attention_mask: [B, L], non-zero at real positions; None where there is no padding, and nothing is paid for it; or a
            plan for rows that are packed into one, with their `position_ids`.
        position_ids: int64 [B, L] or [1, L]; from 0 by default, and with documents from 0 in each. Positions are relative,
            so padding on the left needs none.
        document_ids: int64 [B, L]: equal neighbours are one document, and no position sees another document.
        inputs_embeds: [B, L, D] in place of `input_ids`.
        output_hidden_states: keep every block's input.

    Raises:
        ValueError: both or neither of `input_ids` and `inputs_embeds`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    x_BLD = embed(input_ids) if inputs_embeds is None else inputs_embeds
    if position_ids is None:
        if document_ids is None:
            position_ids = torch.arange(x_BLD.shape[1], device=x_BLD.device)[None]
        else:
            position_ids = document_positions(document_ids)
    cos, sin = rotary_tables(position_ids, rotary_dim, rope_theta)
    bias = attention_bias(config, x_BLD, attention_mask, document_ids)
    wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    states: list[Tensor] = []
    routers: list[Tensor] = []
    for block in blocks:
        if wanted:
            states.append(x_BLD)
        out = block(x_BLD, cos, sin, bias)
        if isinstance(out, tuple):
            x_BLD, logits = out
            routers.append(logits)
        else:
            x_BLD = out
    x_BLD = norm(x_BLD)
    return Encoded(x_BLD, (*states, x_BLD) if wanted else None, tuple(routers))


def states_at(hidden_BLD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The states of the positions that are asked for.

    Args:
        hidden_BLD: [B, L, D].
        logits_to_keep: 0 for all positions; n for the last n; int64 [n] for those positions of every row; boolean [B, L]
            for the N positions that are True, in row order.

    Returns:
        [B, L, D], [B, n, D], or [N, D] for a boolean mask.
    """
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dtype != torch.bool and logits_to_keep.dim() != 1:
            raise ValueError("logits_to_keep is a number, positions [n] that all rows share, or a boolean mask [B, L]")
        return hidden_BLD[logits_to_keep] if logits_to_keep.dtype == torch.bool else hidden_BLD[:, logits_to_keep]
    return hidden_BLD[:, -logits_to_keep:] if logits_to_keep else hidden_BLD


def logits_at(head: nn.Module, hidden_BLD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The head, only where it is asked for.

    Args:
        head: a linear layer D -> V, or the embedding whose weight it shares.
        hidden_BLD: [B, L, D].
        logits_to_keep: see `states_at`.

    Returns:
        [B, L, V], [B, n, V], or [N, V] for a boolean mask.
    """
    return apply_head(head, states_at(hidden_BLD, logits_to_keep))


def apply_head(head: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [..., V] of states [..., D]."""
    if isinstance(head, nn.Embedding):
        return nn.functional.linear(hidden, head.weight)
    # called as a module: quantised, adapted and sharded heads are more than a weight
    return head(hidden)
