"""A LLaDA model as the denoising loop sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from dllm.sampling.network import Network, Pass
from dllm.sampling.proposals import Proposals


@dataclass(frozen=True)
class _ModelNetwork:
    model: PreTrainedModel
    shifted: bool

    def __call__(self, work: Pass, readout: Callable[[nn.Module, Tensor], Proposals], /) -> Proposals:
        output = self.model(
            input_ids=work.ids_T[None],
            position_ids=work.position_T[None],
            attention_mask=work.plan,
            logits_to_keep=work.wanted_M,
            readout=readout,
        )
        return output.readout


def network_of(model: PreTrainedModel) -> Network:
    """The model as the loop sees it."""
    return _ModelNetwork(model, getattr(model.config, "shift_logits", False))
