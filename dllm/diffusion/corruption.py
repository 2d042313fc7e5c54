"""The corruption plan: which tokens of which sample are masked, as a pure function of (seed, sample).

Shapes: B samples, L positions.

A *sample* is a place in the order in which training sees the data, counted through all epochs. N consecutive samples
make one optimiser step (N = processes x accumulation steps x samples per device), so step = sample // N and the place
in the step is sample % N. No rank, no worker and no micro-batch enters, so one process and sixteen mask the same
tokens, and a resumed run goes on where it stopped.

Sources: LLaDA, arXiv:2502.09992, Algorithms 1 and 2; the low-discrepancy times of MDLM, arXiv:2406.07524, section 3.4,
after Kingma et al., arXiv:2107.00630.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dllm.diffusion.noise import Purpose, keyed_permutation, keyed_uniform
from dllm.diffusion.schedule import EPS, elbo_weight, mask_probability


class Corrupted(NamedTuple):
    """A batch with masks in it."""

    xt_BL: Tensor
    """int64 [B, L]: the tokens, some replaced by the mask."""
    masked_BL: Tensor
    """bool [B, L]: where they were replaced."""
    weight_BL: Tensor
    """fp32 [B, L]: the weight of each masked token's cross-entropy, 1 / p; 0 elsewhere."""
    t_B: Tensor
    """fp64 [B]: the time of each sample (of each document, where rows hold several)."""


class Documents(NamedTuple):
    """Where the documents of packed rows lie. D of them are in the batch."""

    index_BL: Tensor
    """int64 [B, L]: which one each position is in, -1 for none."""
    position_BL: Tensor
    """int64 [B, L]: the position within it."""
    step_D: Tensor
    """int64 [D]: the optimiser step."""
    place_D: Tensor
    """int64 [D]: the place among the documents of the step."""
    of_D: Tensor
    """int64 [D]: how many documents the step has."""


@dataclass(frozen=True, kw_only=True)
class CorruptionPlan:
    """How samples get their masks."""

    group: int
    """N, the samples of one optimiser step: times are stratified over them."""
    times: Literal["stratified", "independent"] = "stratified"
    """stratified: the N times of a step are spread evenly with one common offset; independent: each is its own draw."""
    masking: Literal["bernoulli", "exact"] = "bernoulli"
    """bernoulli: each token by itself with p_mask(t); exact: exactly k of n tokens, k uniform in 1 .. n by way of t."""
    min_time: float = 0.0
    """Times are drawn from [min_time, max_time]: the whole of [0, 1] gives the evidence bound, a part of it that part of
    the bound's integral, with less variance (the clipped schedules of BD3-LM, arXiv:2503.09573, section 5)."""
    max_time: float = 1.0
    eps: float = EPS
    """The smallest probability of a mask."""
    seed: int = 0
    """Another seed, other masks."""

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"group={self.group}: a step has at least one sample")
        if self.times not in ("stratified", "independent"):
            raise ValueError(f"times={self.times!r}: it is 'stratified' or 'independent'")
        if self.masking not in ("bernoulli", "exact"):
            raise ValueError(f"masking={self.masking!r}: it is 'bernoulli' or 'exact'")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps}: it lies between 0 and 1")
        if not 0 <= self.min_time < self.max_time <= 1:
            raise ValueError(
                f"min_time={self.min_time}, max_time={self.max_time}: 0 <= min_time < max_time <= 1 is needed"
            )

    def sample_times(self, samples_B: Tensor) -> Tensor:
        """t of each sample, fp64 [B] in (min_time, max_time).

        Stratified: t_i = (u + order_i / N) mod 1 with one u per step, where `order` is a keyed permutation of the N
        places. Each t is uniform by itself, and every interval of length 1/N holds exactly one of a step's times. Both
        kinds are then stretched from (0, 1) to (min_time, max_time).

        Args:
            samples_B: int64 [B].
        """
        return self._stretched(self._unit_times(samples_B))

    def _stretched(self, unit_B: Tensor) -> Tensor:
        return self.min_time + (self.max_time - self.min_time) * unit_B

    def _unit_times(self, samples_B: Tensor, documents: Documents | None = None) -> Tensor:
        """The same before it is stretched, in (0, 1); a packed step is stratified over its documents."""
        if self.times == "independent":
            return keyed_uniform(self.seed, Purpose.TIME, samples_B)
        if documents is None:
            step_B, place_B = samples_B // self.group, samples_B % self.group
            of_B = torch.full_like(samples_B, self.group)
        else:
            step_B, place_B, of_B = documents.step_D, documents.place_D, documents.of_D
        order_B = torch.empty_like(place_B)
        for step, of in torch.stack([step_B, of_B], 1).unique(dim=0).tolist():
            here = step_B == step
            order = keyed_permutation(of, self.seed, Purpose.TIME_ORDER, step).to(place_B.device)
            order_B[here] = order[place_B[here]]
        u_B = keyed_uniform(self.seed, Purpose.TIME, step_B)
        return (u_B + order_B.to(u_B.dtype) / of_B.to(u_B.dtype)) % 1.0  # a quotient of integers would be fp32

    def corrupt(
        self,
        ids_BL: Tensor,
        maskable_BL: Tensor,
        samples_B: Tensor,
        mask_token_id: int,
        documents: Documents | None = None,
    ) -> Corrupted:
        """Masks a batch.

        Args:
            ids_BL: int64 [B, L], the clean tokens.
            maskable_BL: bool [B, L], which of them may be masked (not the prompt, not the padding).
            samples_B: int64 [B], the sample of each row (of each document, where rows hold several).
            mask_token_id: what a masked token becomes.
            documents: of packed rows. A document at a given time has the masks that it has in a row of its own.

        Returns:
            The masked batch. A row that is padded masks its tokens the same way; so does one that is cut, if masking is
            bernoulli (an exact number is a share of what the row has).
        """
        t_B = self._stretched(self._unit_times(samples_B, documents))
        if documents is None:
            index_BL = torch.arange(len(ids_BL), device=ids_BL.device)[:, None].expand_as(ids_BL)
            position_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
        else:
            index_BL, position_BL = documents.index_BL.clamp(min=0), documents.position_BL
        u_BL = keyed_uniform(self.seed, Purpose.MASK, samples_B[index_BL], position_BL)
        if self.masking == "bernoulli":
            p_B = mask_probability(t_B, self.eps)
            masked_BL = maskable_BL & (u_BL < p_B[index_BL])
        else:
            n_B = torch.zeros_like(samples_B).index_add(
                0, index_BL[maskable_BL], torch.ones_like(index_BL[maskable_BL])
            )
            k_B = (t_B * n_B).floor().long().add(1).minimum(n_B)
            p_B = (k_B.to(t_B.dtype) / n_B.clamp(min=1)).clamp(min=torch.finfo(t_B.dtype).tiny)
            # the maskable tokens, document by document, in the order of their numbers: the first k of each are masked
            index_M, u_M = index_BL[maskable_BL], u_BL[maskable_BL]
            by_number_M = u_M.argsort(stable=True)
            sorted_M = by_number_M[index_M[by_number_M].argsort(stable=True)]
            first_B = n_B.cumsum(0) - n_B
            place_M = torch.empty_like(index_M)
            place_M[sorted_M] = torch.arange(len(index_M), device=ids_BL.device) - first_B[index_M[sorted_M]]
            masked_BL = torch.zeros_like(maskable_BL)
            masked_BL[maskable_BL] = place_M < k_B[index_M]
        p_BL = p_B[index_BL]
        weight_BL = torch.where(masked_BL, elbo_weight(p_BL), 0.0).float()
        return Corrupted(ids_BL.masked_fill(masked_BL, mask_token_id), masked_BL, weight_BL, t_B)
