"""The plain trainer: rows padded to the longest, a time for each by itself, all logits, then the loss. Slow, and obvious."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def padded_batch(rows: list[dict[str, Any]], eos_token_id: int) -> tuple[Tensor, Tensor]:
    """(ids [B, L], maskable [B, L]): each row's last answer, padded with end-of-text that is learnt too."""
    longest = max(row["turns"][-1] for row in rows)
    ids = torch.full((len(rows), longest), eos_token_id)
    maskable = torch.ones(len(rows), longest, dtype=torch.bool)
    for place, row in enumerate(rows):
        start, end = row["turns"][-2:]
        ids[place, :end] = torch.tensor(row["input_ids"][:end])
        maskable[place, :start] = False
    return ids, maskable


def plain_loss(model: nn.Module, ids: Tensor, maskable: Tensor, mask_token_id: int) -> Tensor:
    """LLaDA's loss of fine-tuning (arXiv:2502.09992, Algorithm 2): logits of every position, in fp32."""
    p = (1 - 1e-3) * torch.rand(len(ids), 1) + 1e-3
    masked = (torch.rand(ids.shape) < p) & maskable
    logits = model(input_ids=ids.masked_fill(masked, mask_token_id)).logits.float()
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
    return (nll * masked / p / maskable.sum(1, keepdim=True)).sum() / len(ids)


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    maskable: Tensor,
    mask_token_id: int,
    *,
    bf16: bool,
    clip: float = 1.0,
) -> float:
    """One step; gives the loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = plain_loss(model, ids, maskable, mask_token_id)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
