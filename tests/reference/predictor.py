"""Networks for the sampler's tests whose logits do not depend, to the last bit, on the batch that a row is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from reference.sampler import Logits
from torch import Tensor, nn

from dllm.diffusion.noise import keyed_bits, keyed_uniform
from dllm.sampling.network import Network, Pass
from dllm.sampling.proposals import Proposals


@dataclass
class HashPredictor:
    """Random logits that depend on every token of the row, on its place, and on nothing else; it notes what it is shown."""

    vocabulary: int
    seed: int = 0
    spread: float = 8.0
    shown: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)

    def __call__(self, ids_RL: Tensor, attention_mask_RL: Tensor | None, wanted_RL: Tensor) -> Tensor:
        self.shown.append((ids_RL.clone(), attention_mask_RL, wanted_RL))
        positions_L = torch.arange(ids_RL.shape[1], device=ids_RL.device)
        bits_RL = keyed_bits(self.seed, positions_L[None], ids_RL)
        if attention_mask_RL is not None:
            bits_RL = bits_RL * attention_mask_RL
        row_N, position_N = wanted_RL.nonzero(as_tuple=True)
        context_N = bits_RL.sum(1)[row_N]  # whole numbers: their sum has no rounding
        vocabulary_V = torch.arange(self.vocabulary, device=ids_RL.device)
        u_NV = keyed_uniform(self.seed, context_N[:, None], position_N[:, None], vocabulary_V)
        return (self.spread * u_NV).float()


@dataclass
class FlatPredictor:
    """The same logits everywhere, whole numbers with ties: all that decides is the rule for ties."""

    vocabulary: int

    def __call__(self, ids_RL: Tensor, attention_mask_RL: Tensor | None, wanted_RL: Tensor) -> Tensor:
        row_V = ((torch.arange(self.vocabulary) + 2) % 4).float()
        return row_V.expand(int(wanted_RL.sum()), -1)


def as_network(predict: Callable[[Tensor, Tensor | None, Tensor], Tensor], branches: int = 1) -> Network:
    """A function of whole rows as the loop's network: what is packed is laid side by side again, branch after branch."""

    def network(work: Pass, readout: Callable[[nn.Module, Tensor], Proposals]) -> Proposals:
        longest, total = max(work.tokens_P), sum(work.tokens_P)
        rows = [row for branch in range(branches) for row in range(branch, len(work.tokens_P), branches)]
        starts = [sum(work.tokens_P[:row]) for row in range(len(work.tokens_P))]
        wanted_T = torch.zeros(total, dtype=torch.bool, device=work.ids_T.device)
        wanted_T[work.wanted_M] = True
        ids, mask, wanted = (
            torch.zeros(len(rows), longest, dtype=torch.int64, device=work.ids_T.device) for _ in "123"
        )
        for place, row in enumerate(rows):
            here = slice(starts[row], starts[row] + work.tokens_P[row])
            assert work.position_T[here].tolist() == list(range(work.tokens_P[row]))
            ids[place, : work.tokens_P[row]], wanted[place, : work.tokens_P[row]] = work.ids_T[here], wanted_T[here]
            mask[place, : work.tokens_P[row]] = 1
        even = bool(mask.all())
        return readout(nn.Identity(), predict(ids, None if even else mask.bool(), wanted.bool()))

    return network


def one_row(predict: Callable[[Tensor, Tensor | None, Tensor], Tensor]) -> Logits:
    """The network as the slow sampler sees it: one row without padding, logits of all of its positions."""

    def logits_of(ids: list[int]) -> list[list[float]]:
        return predict(torch.tensor([ids]), None, torch.ones(1, len(ids), dtype=torch.bool)).tolist()

    return logits_of
