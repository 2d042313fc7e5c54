"""What the network says of the places that it was asked for, laid out as the policies and the rules of lengths read it.

Shapes: R rows, W places that are looked at (see `dllm.sampling.view`), N places that were asked for, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dllm.sampling.config import SamplingConfig
from dllm.sampling.proposals import Keys, Proposals, chance


class Found(NamedTuple):
    """Each [R, W] holds 0 where nothing was asked."""

    asked_RW: Tensor
    """bool: what was asked."""
    token_RW: Tensor
    """int64: candidates."""
    probability_RW: Tensor
    """fp32: theirs, without noise."""
    confidence_RW: Tensor
    """fp32: how sure they are, in the measure of `remasking`; -inf where nothing was asked."""
    entropy_RW: Tensor | None
    """fp32: nats."""
    given_RW: Tensor | None
    """fp32: the probability of the token that stands there."""
    gap_RW: Tensor | None
    """fp32: best logit less second best."""
    watched_RW: Tensor | None
    """fp32: the probability of end-of-text."""
    log_p_NV: Tensor | None
    """fp32: whole distributions."""
    row_N: Tensor
    """int64: the row of each that was asked."""
    w_N: Tensor
    """int64: its column."""

    def laid(self, values_N: Tensor, fill: float = 0) -> Tensor:
        """Values of the places that were asked for, [R, W]."""
        return _laid(values_N, self.asked_RW.shape, self.row_N, self.w_N, fill)


def sureness(found: Proposals, keys: Keys, config: SamplingConfig, ends: Tensor) -> Tensor:
    """fp32 [N]: how sure each candidate is, in the measure that the settings ask for.

    Args:
        found: the candidates.
        keys: of the noise, for the random order.
        config: says `remasking` and `eos_last`.
        ends: int64, the tokens that come last with `eos_last`.
    """
    confidence_N = found.probability_N
    if config.remasking == "random":
        confidence_N = chance(keys)
    elif config.remasking == "margin":
        assert found.second_N is not None
        confidence_N = found.best_N - found.second_N
    elif config.remasking == "entropy":
        assert found.entropy_N is not None
        confidence_N = -found.entropy_N
    if config.eos_last:
        # below every other, their own order kept; an entropy is at most the log of the vocabulary
        lower = 64 if config.remasking == "entropy" else 2
        confidence_N = confidence_N - lower * torch.isin(found.token_N, ends)
    return confidence_N


def spread(proposals: Proposals, confidence_N: Tensor, asked_RW: Tensor, row_N: Tensor, w_N: Tensor) -> Found:
    """Lays the answers out.

    Args:
        proposals: of N places.
        confidence_N: fp32, how sure the candidates are.
        asked_RW: bool, what was asked; answers to other places mean nothing.
        row_N: int64, the row of each answer.
        w_N: int64, its column.
    """

    def laid(values_N: Tensor | None, fill: float = 0) -> Tensor | None:
        return None if values_N is None else _laid(values_N, asked_RW.shape, row_N, w_N, fill)

    token_RW, probability_RW = laid(proposals.token_N), laid(proposals.probability_N)
    confidence_RW = laid(confidence_N, -torch.inf)
    assert token_RW is not None
    assert probability_RW is not None
    assert confidence_RW is not None
    return Found(
        asked_RW=asked_RW,
        token_RW=token_RW,
        probability_RW=probability_RW,
        confidence_RW=confidence_RW,
        entropy_RW=laid(proposals.entropy_N),
        given_RW=laid(proposals.given_N),
        gap_RW=laid(proposals.gap_N),
        watched_RW=laid(proposals.watched_N),
        log_p_NV=proposals.log_p_NV,
        row_N=row_N,
        w_N=w_N,
    )


def _laid(values_N: Tensor, shape: torch.Size, row_N: Tensor, w_N: Tensor, fill: float) -> Tensor:
    whole_RW = torch.full(shape, fill, dtype=values_N.dtype, device=values_N.device)
    return whole_RW.index_put((row_N, w_N), values_N)
