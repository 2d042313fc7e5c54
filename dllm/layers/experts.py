"""A mixture of experts: a router, the experts' weights stacked, and the loss that keeps the load even.

Shapes: T tokens, D width, E experts, k experts a token, F expert width.

How the experts are multiplied is chosen by the model's `experts_implementation` through transformers' interface
(grouped_mm, batched_mm, deepgemm, ...): one grouped product a projection on a GPU. `eager` is the path written out here:
tokens sorted by expert, then one product for each expert that was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation


class TopKRouter(nn.Module):
    """Chooses k experts for each token.

    Args:
        width: D.
        experts: E.
        top_k: k.
        renormalise: whether the k chosen weights are scaled to sum to 1; if not, they are the softmax over all experts.
    """

    def __init__(self, width: int, experts: int, top_k: int, renormalise: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.top_k, self.renormalise = top_k, renormalise

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights fp32 [T, k], experts int64 [T, k]); the softmax is in fp32."""
        logits_TE = nn.functional.linear(x_TD, self.weight)
        weight_Tk, expert_Tk = logits_TE.float().softmax(-1).topk(self.top_k, dim=-1)
        if self.renormalise:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
        return logits_TE, weight_Tk, expert_Tk


@use_experts_implementation
class Experts(nn.Module):
    """E gated SiLU networks, each projection of all of them in one tensor: gate_up_proj [E, 2F, D], down_proj [E, D, F]."""

    def __init__(self, config: Any, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over each token's experts of weight * expert(x).

        Args:
            hidden_states: [T, D].
            top_k_index: int64 [T, k].
            top_k_weights: [T, k].

        Returns:
            [T, D] in the dtype of `hidden_states`.
        """
        k = top_k_index.shape[1]
        order = top_k_index.flatten().argsort(stable=True)
        per_expert = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
        parts = hidden_states[order // k].split(per_expert)
        # unbound at once: the gradient of each index by itself would be as large as the whole stack
        experts = zip(parts, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        done = []
        for x, gate_up, down in experts:
            if len(x):
                gate, up = nn.functional.linear(x, gate_up).chunk(2, dim=-1)
                done.append(nn.functional.linear(self.act_fn(gate) * up, down))
        sorted_out = torch.cat(done) * top_k_weights.flatten()[order, None]
        # back into token order, so that a token's k terms lie side by side and are summed in a fixed order, in fp32
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return sorted_out[back].view(-1, k, hidden_states.shape[1]).sum(1).to(hidden_states.dtype)


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, real_BL: Tensor | None = None) -> Tensor:
    """E * sum over experts of (choices a token that fell on it) * (its mean probability): k if the load is even.

    Args:
        router_logits: one [B * L, E] a layer.
        top_k: k.
        real_BL: [B, L], non-zero at real positions; padding does not count.

    Returns:
        fp32 scalar, over all layers and tokens together.

    Source: Fedus et al., Switch Transformers, arXiv:2101.03961, eq. 4 to 6.
    """
    logits_NTE = torch.stack([part.float() for part in router_logits])
    probability_NTE = logits_NTE.softmax(-1)
    chosen_NTE = torch.zeros_like(probability_NTE).scatter_(-1, probability_NTE.topk(top_k, dim=-1).indices, 1.0)
    real_T1 = torch.ones_like(logits_NTE[0, :, :1]) if real_BL is None else (real_BL.reshape(-1, 1) != 0).float()
    tokens = real_T1.sum() * len(router_logits)
    share_E = (chosen_NTE * real_T1).sum((0, 1)) / tokens
    mean_E = (probability_NTE * real_T1).sum((0, 1)) / tokens
    return logits_NTE.shape[-1] * (share_E * mean_E).sum()
