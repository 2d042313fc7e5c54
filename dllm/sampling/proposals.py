"""What the model proposes for a mask: a candidate token, and how sure it is of it.

Shapes: N masked positions that may be committed now, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.diffusion.noise import Purpose, keyed_gumbel, keyed_uniform


class Keys(NamedTuple):
    """What the noise of a position depends on: nothing about the batch that it is in."""

    seed: int
    request_N: Tensor
    position_N: Tensor
    step_N: Tensor


def guide(conditional_NV: Tensor, unconditional_NV: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance: un + (s + 1)(cond - un).

    Source: LLaDA, arXiv:2502.09992, appendix A.2; Nie et al., arXiv:2410.18514, unsupervised guidance.
    """
    return unconditional_NV + (cfg_scale + 1) * (conditional_NV - unconditional_NV)


def propose(logits_NV: Tensor, temperature: float, never: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
    """A candidate for each position, and its probability.

    Args:
        logits_NV: [N, V], any float dtype.
        temperature: 0 for the argmax; above it, a draw from softmax(logits / temperature) by Gumbel's trick.
        never: ids that must not be proposed; they take no probability either.
        keys: of the noise.

    Returns:
        (tokens int64 [N], probability fp32 [N]): the probability is that of the *unnoised* softmax at temperature 1.
    """
    logits_NV = logits_NV.float()
    if never:
        logits_NV = logits_NV.index_fill(1, torch.tensor(list(never), device=logits_NV.device), -torch.inf)
    if temperature > 0:
        vocabulary = torch.arange(logits_NV.shape[1], device=logits_NV.device)
        key = (keys.request_N[:, None], keys.position_N[:, None], keys.step_N[:, None], vocabulary[None])
        gumbel_NV = keyed_gumbel(keys.seed, Purpose.TOKEN, *key)
        token_N = (logits_NV.to(gumbel_NV.dtype) / temperature + gumbel_NV).argmax(1)
        best_N = logits_NV.gather(1, token_N[:, None])[:, 0]
    else:
        best_N, token_N = logits_NV.max(1)
    return token_N, (best_N - logits_NV.logsumexp(1)).exp()


def chance(keys: Keys) -> Tensor:
    """Uniform numbers [N] that stand in for confidence where positions are committed in random order."""
    return keyed_uniform(keys.seed, Purpose.RANK, keys.request_N, keys.position_N, keys.step_N).float()
