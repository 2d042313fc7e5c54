"""The one masked loss: weighted cross-entropy at masked positions, and the three ways to normalise it.

Shapes: B samples, L positions, N masked positions of the batch, V vocabulary.

    loss = sum over masked i of  weight_i * CE_i * share_i / denominator

| normalisation | share_i                | denominator                       | meaning                                   |
|---------------|------------------------|-----------------------------------|-------------------------------------------|
| token         | 1                      | maskable tokens of the global batch | nats per token; LLaDA's pretraining     |
| sequence      | 1 / maskable of its row | rows of the global batch         | LLaDA's SFT: each answer counts once      |
| batch         | 1                      | rows of the global batch          | nats per sequence: the evidence bound     |

The denominator spans the global batch, all ranks and accumulation steps together, so the loss and its gradient do not
depend on how a batch was split. Sources: LLaDA, arXiv:2502.09992, eq. 3 and 5, and its GUIDELINES page.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dllm.errors import OptionError, did_you_mean

Normalisation = Literal["token", "sequence", "batch"]
CHUNK = 4096
"""Rows whose logits are turned to fp32 at once. It bounds the memory of evaluation; a backward keeps every part."""


def masked_nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) of each masked position, in fp32 whatever the logits' dtype.

    Args:
        logits_NV: [N, V].
        targets_N: int64 [N], the clean tokens.

    Returns:
        fp32 [N], in nats.
    """
    parts = zip(logits_NV.split(CHUNK), targets_N.split(CHUNK), strict=True)
    return torch.cat([nn.functional.cross_entropy(part.float(), goal, reduction="none") for part, goal in parts])


def batch_count(maskable_BL: Tensor, normalisation: Normalisation) -> Tensor:
    """What this part of the global batch adds to the denominator: maskable tokens, or rows that have one (fp64 scalar).

    Raises:
        OptionError: an unknown normalisation.
    """
    check_normalisation(normalisation)
    if normalisation == "token":
        return maskable_BL.sum().double()
    return maskable_BL.any(1).sum().double()


def masked_loss(
    nll_N: Tensor, weight_BL: Tensor, masked_BL: Tensor, maskable_BL: Tensor, normalisation: Normalisation
) -> Tensor:
    """The loss of this part of the global batch, before division by the denominator.

    Args:
        nll_N: fp32 [N], cross-entropies of the masked positions in row order.
        weight_BL: fp32 [B, L], the weights 1 / p.
        masked_BL: bool [B, L] with N True.
        maskable_BL: bool [B, L], what could have been masked.
        normalisation: see the table above.

    Returns:
        fp32 scalar. Divided by the sum of `batch_count` over the global batch it is the loss.

    Raises:
        OptionError: an unknown normalisation.
    """
    check_normalisation(normalisation)
    weight_N = weight_BL[masked_BL]
    if normalisation == "sequence":
        per_row_B1 = maskable_BL.sum(1, keepdim=True).clamp(min=1)
        weight_N = weight_N / per_row_B1.expand_as(masked_BL)[masked_BL]
    return (nll_N * weight_N).sum()


def check_normalisation(name: str) -> None:
    """Raises OptionError, with the nearest right name, unless `name` is a normalisation."""
    if name not in get_args(Normalisation):
        raise OptionError(f"loss_normalisation={name!r} does not exist.{did_you_mean(name, get_args(Normalisation))}")
