"""Which candidates to commit: pure functions of the statistics of the positions that may be committed now.

Shapes: R rows, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def most_confident(confidence_RL: Tensor, open_RL: Tensor, count_R: Tensor) -> Tensor:
    """The `count` open positions of each row with the highest confidence; of equal ones the leftmost.

    Args:
        confidence_RL: any float [R, L], finite where open; larger is surer. Only its order matters.
        open_RL: bool [R, L], positions that may be committed.
        count_R: int64 [R], how many of them.

    Returns:
        bool [R, L], True where to commit: exactly min(count, open) per row.

    Source: LLaDA, arXiv:2502.09992, Algorithm 5.
    """
    keyed = confidence_RL.masked_fill(~open_RL, -torch.inf)
    order = keyed.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return open_RL & (place < count_R[:, None])
