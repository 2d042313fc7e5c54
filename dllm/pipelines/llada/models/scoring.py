"""What both mask predictors do with the states after their last norm: logits, or the loss without logits.

Shapes: B batch, L positions, D width, V vocabulary, N positions of a boolean mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from dllm.diffusion.objective import head_loss
from dllm.layers.trunk import logits_at


@dataclass
class LLaDAOutput(MaskedLMOutput):
    """What a mask predictor gives."""

    nll: Tensor | None = None
    """fp32 [N], -log p(target) in nats at the masked positions, without a gradient; with targets. `loss` is their weighted
    sum, with one."""


class Scores(TypedDict, total=False):
    """The part of the output that comes from the head."""

    loss: Tensor
    nll: Tensor
    logits: Tensor


def score(
    head: nn.Module,
    hidden_BLD: Tensor,
    logits_to_keep: int | Tensor,
    targets_N: Tensor | None,
    weights_N: Tensor | None,
) -> Scores:
    """Logits where they are asked for, or with targets the loss there.

    Args:
        head: see `dllm.diffusion.objective.head_loss`.
        hidden_BLD: states after the last norm.
        logits_to_keep: see `dllm.layers.trunk.logits_at`; with targets a boolean mask [B, L] of N positions.
        targets_N: int64 [N], the clean tokens, or None.
        weights_N: [N], what each target counts; 1 by default.

    Raises:
        ValueError: targets without a boolean mask.
    """
    if targets_N is None:
        return {"logits": logits_at(head, hidden_BLD, logits_to_keep)}
    if not isinstance(logits_to_keep, Tensor) or logits_to_keep.dtype != torch.bool:
        raise ValueError("targets belong to the True positions of logits_to_keep: a boolean mask [B, L]")
    if weights_N is None:
        weights_N = torch.ones(len(targets_N), device=hidden_BLD.device)
    done = head_loss(head, hidden_BLD[logits_to_keep], targets_N, weights_N)
    return {"loss": done.loss, "nll": done.nll_N}
