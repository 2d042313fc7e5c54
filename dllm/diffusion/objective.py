"""The one masked loss: weighted cross-entropy at masked positions, and the three ways to normalise it.

Shapes: B samples, L positions, N masked positions of the batch, V vocabulary, D width.

    loss = sum over masked i of  weight_i * CE_i * share_i / denominator

| normalisation | share_i                 | denominator                         | meaning                                 |
|---------------|-------------------------|-------------------------------------|-----------------------------------------|
| token         | 1                       | maskable tokens of the global batch | nats per token; LLaDA's pretraining     |
| sequence      | 1 / maskable of its row | rows of the global batch            | LLaDA's SFT: each answer counts once    |
| batch         | 1                       | rows of the global batch            | nats per sequence: the evidence bound   |

The denominator spans the global batch, all ranks and accumulation steps together, so the loss and its gradient do not
depend on how a batch was split. Where documents are packed into rows, "row" means document. Sources: LLaDA,
arXiv:2502.09992, eq. 3 and 5, and its GUIDELINES page.

The cross-entropy takes hidden states, not logits: head and softmax go through the masked positions in chunks, so neither
[B, L, V] nor an fp32 copy of it ever exists. The weights are known before the forward, so the gradient of a chunk is taken
while its logits are at hand, and nothing is computed twice. (The idea of a fused head and loss is that of Cut
Cross-Entropy, arXiv:2411.09009, and of Liger Kernel, arXiv:2410.10989.)
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dllm.errors import OptionError, did_you_mean

Normalisation = Literal["token", "sequence", "batch"]
CHUNK_ELEMENTS = 1 << 26
"""Logits that exist at once: 256 MB in fp32, and half as much beside it in bf16."""
LEAST_ROWS = 256
"""Rows of a chunk at least, however large the vocabulary: fewer would starve the matrix products."""


def is_plain(head: nn.Module) -> bool:
    """Whether a head is nothing but its weight [V, D]: not quantised, adapted, sharded, hooked, or empty until it is called."""
    weight = getattr(head, "weight", None)
    return (
        type(head) in (nn.Linear, nn.Embedding)
        and getattr(head, "bias", None) is None
        and isinstance(weight, Tensor)
        and type(weight) in (Tensor, nn.Parameter)
        and weight.dim() == 2  # dim 1: divided by ZeRO-3; meta: offloaded
        and weight.device.type != "meta"
        and not (head._forward_hooks or head._forward_pre_hooks)  # of tensor parallelism: the weight is a part
    )


class HeadLoss(NamedTuple):
    """What the masked positions of a forward cost."""

    loss: Tensor
    """The weighted sum of `nll_N`: a scalar of the accumulation dtype, differentiable."""
    nll_N: Tensor
    """-log p(target), in nats, without a gradient."""


def chunk_rows(vocabulary: int) -> int:
    """Rows of a chunk."""
    return max(LEAST_ROWS, CHUNK_ELEMENTS // vocabulary)


def masked_nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) of each masked position, in fp32 (fp64 for fp64) whatever the logits' dtype.

    Args:
        logits_NV: [N, V].
        targets_N: int64 [N], the clean tokens.

    Returns:
        [N], in nats.
    """
    return nn.functional.cross_entropy(_wide(logits_NV), targets_N, reduction="none")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of masked positions changes from step to step
def head_loss(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor) -> HeadLoss:
    """sum_i weight_i * CE_i through the head, in chunks of rows; exact gradients for the hidden states and the head.

    Args:
        head: a linear layer D -> V without bias, or the embedding whose weight it shares: the chunked path with its own
            gradient. Any other module (quantised, adapted, sharded over devices) is called chunk by chunk and again in
            the backward.
        hidden_ND: the masked positions' states after the last norm.
        targets_N: int64 [N], the clean tokens.
        weights_N: [N], what each cross-entropy counts; without a gradient.

    Returns:
        Loss and cross-entropies; fp32, or fp64 where the states are. Under autocast the products are of its dtype, and the
        softmax is fp32 all the same.
    """
    weight = getattr(head, "weight", None)
    if is_plain(head):
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        with torch.autocast(device, enabled=False):  # what is to be in `dtype` is cast by hand
            return HeadLoss(*_LinearLoss.apply(hidden_ND, weight, targets_N, weights_N, dtype))  # type: ignore[no-untyped-call]
    rows = chunk_rows(getattr(head, "out_features", len(weight) if weight is not None else CHUNK_ELEMENTS))
    if isinstance(head, nn.Embedding):  # whose own forward looks ids up
        head = partial(nn.functional.linear, weight=weight)  # type: ignore[assignment, arg-type]
    parts = [
        checkpoint(_nll_of_chunk, head, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    nll_N = torch.cat(parts)
    return HeadLoss((nll_N * weights_N).sum(), nll_N.detach())


def _nll_of_chunk(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    return masked_nll(head(hidden_ND), targets_N)


def _times(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor in `dtype`, multiplied in place in the wider of the two."""
    return x.to(torch.promote_types(x.dtype, dtype)).mul_(factor).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _LinearLoss(torch.autograd.Function):
    """(hidden_ND, weight_VD, targets_N, weights_N, dtype of the products) -> (loss, nll_N). Gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        N, rows = len(hidden), chunk_rows(len(weight))
        nll_N = torch.empty(N, dtype=wide, device=hidden.device)
        # the largest weight is taken out of the products, so that fp16 does not lose the small ones
        weights_N = weights_N.to(wide)
        scale = weights_N.abs().max().clamp(min=torch.finfo(wide).tiny) if N else torch.ones((), dtype=wide)
        # the range of fp16 holds logits, but not sums of many rows' gradients
        exact = wide if dtype == torch.float16 else dtype
        states, table = hidden.to(exact), weight.to(exact)
        share_N1 = (weights_N / scale).to(exact)[:, None]
        grad_hidden = torch.empty_like(hidden, dtype=wide) if wants_hidden else None
        grad_weight: Tensor | None = None
        for start in range(0, N, rows):
            here = slice(start, start + rows)
            targets_R1 = targets_N[here, None]
            log_p_RV = torch.log_softmax(hidden[here] @ weight.T, dim=-1, dtype=wide)
            nll_N[here] = -log_p_RV.gather(1, targets_R1)[:, 0]
            if not (wants_hidden or wants_weight):
                continue
            error_RV = log_p_RV.exp_()
            error_RV.scatter_add_(1, targets_R1, torch.full_like(targets_R1, -1, dtype=wide))
            error_RV = error_RV.to(exact)
            if grad_hidden is not None:
                grad_hidden[here] = (error_RV @ table) * share_N1[here]
            if wants_weight:
                shared_RD = states[here] * share_N1[here]
                if grad_weight is None and rows >= N:
                    grad_weight = error_RV.T @ shared_RD
                elif grad_weight is None:
                    grad_weight = (error_RV.T @ shared_RD).to(wide)
                elif exact == wide:
                    grad_weight.addmm_(error_RV.T, shared_RD)
                else:
                    grad_weight += error_RV.T @ shared_RD
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(table)
        ctx.save_for_backward(grad_hidden, grad_weight, scale)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(nll_N)
        ctx.set_materialize_grads(False)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight, scale = ctx.saved_tensors
        if grad_loss is None:
            return None, None, None, None, None
        factor = grad_loss * scale
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else (grad_hidden * factor).to(hidden_dtype),
            None if grad_weight is None else _times(grad_weight, factor, weight_dtype),
            None,
            None,
            None,
        )


def batch_count(maskable_BL: Tensor, normalisation: Normalisation, documents_BL: Tensor | None = None) -> Tensor:
    """What this part of the global batch adds to the denominator: maskable tokens, or rows that have one (fp64 scalar).

    Args:
        maskable_BL: bool [B, L].
        normalisation: see the table above.
        documents_BL: see `token_weights`; documents are counted in place of rows.

    Raises:
        OptionError: an unknown normalisation.
    """
    check_normalisation(normalisation)
    if normalisation == "token":
        return maskable_BL.sum().double()
    if documents_BL is not None:
        return (documents_BL[maskable_BL].bincount() > 0).sum().double()
    return maskable_BL.any(1).sum().double()


def token_weights(
    weight_BL: Tensor,
    masked_BL: Tensor,
    maskable_BL: Tensor,
    normalisation: Normalisation,
    documents_BL: Tensor | None = None,
) -> Tensor:
    """What each masked token's cross-entropy counts in the loss, before division by the denominator.

    Args:
        weight_BL: fp32 [B, L], the weights 1 / p.
        masked_BL: bool [B, L] with N True.
        maskable_BL: bool [B, L], what could have been masked.
        normalisation: see the table above.
        documents_BL: int64 [B, L], where rows hold several documents: which one of the batch each position is in, -1 for
            none.

    Returns:
        fp32 [N], in row order.

    Raises:
        OptionError: an unknown normalisation.
    """
    check_normalisation(normalisation)
    weight_N = weight_BL[masked_BL]
    if normalisation != "sequence":
        return weight_N
    if documents_BL is None:
        return weight_N / maskable_BL.sum(1, keepdim=True).expand_as(masked_BL)[masked_BL]
    return weight_N / documents_BL[maskable_BL].bincount()[documents_BL[masked_BL]]


def check_normalisation(name: str) -> None:
    """Raises OptionError, with the nearest right name, unless `name` is a normalisation."""
    if name not in get_args(Normalisation):
        raise OptionError(f"loss_normalisation={name!r} does not exist.{did_you_mean(name, get_args(Normalisation))}")
