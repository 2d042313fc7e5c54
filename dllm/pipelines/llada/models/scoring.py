"""What both mask predictors do with the states after their last norm: logits, or the loss without logits.

Shapes: B batch, L positions, D width, V vocabulary, N positions of a boolean mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from dllm.diffusion.objective import head_loss
from dllm.layers.trunk import logits_at, states_at

Readout = Callable[[nn.Module, Tensor], Any]
"""(head, states [N, D] where logits are asked for) -> what the caller wants of them, without all logits at once."""


@dataclass
class LLaDAOutput(MaskedLMOutput):
    """What a mask predictor gives."""

    nll: Tensor | None = None
    """fp32 [N], -log p(target) in nats at the masked positions, without a gradient; with targets. `loss` is their weighted
    sum, with one."""
    readout: Any = None
    """What the caller's readout gave."""


class Scores(TypedDict, total=False):
    """The part of the output that comes from the head."""

    loss: Tensor
    nll: Tensor
    logits: Tensor
    readout: Any


def score(
    head: nn.Module,
    hidden_BLD: Tensor,
    logits_to_keep: int | Tensor,
    targets_N: Tensor | None,
    weights_N: Tensor | None,
    readout: Readout | None = None,
) -> Scores:
    """Logits where they are asked for, or with targets the loss there, or what a readout makes of the states there.

    Args:
        head: see `dllm.diffusion.objective.head_loss`.
        hidden_BLD: states after the last norm.
        logits_to_keep: see `dllm.layers.trunk.logits_at`; with targets a boolean mask [B, L] of N positions.
        targets_N: int64 [N], the clean tokens, or None.
        weights_N: [N], what each target counts; 1 by default.
        readout: called with the head and the states [N, D] in place of the logits. It runs inside the model's forward, where
            engines that divide weights among processes have them whole.

    Raises:
        ValueError: targets without a boolean mask.
    """
    if readout is not None:
        return {"readout": readout(head, states_at(hidden_BLD, logits_to_keep).reshape(-1, hidden_BLD.shape[-1]))}
    if targets_N is None:
        return {"logits": logits_at(head, hidden_BLD, logits_to_keep)}
    if not isinstance(logits_to_keep, Tensor) or logits_to_keep.dtype != torch.bool:
        raise ValueError("targets belong to the True positions of logits_to_keep: a boolean mask [B, L]")
    if weights_N is None:
        weights_N = torch.ones(len(targets_N), device=hidden_BLD.device)
    done = head_loss(head, hidden_BLD[logits_to_keep], targets_N, weights_N)
    return {"loss": done.loss, "nll": done.nll_N}
