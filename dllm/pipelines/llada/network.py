"""A LLaDA model as the denoising loop sees it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from dllm.sampling.network import Network, Pass
from dllm.sampling.proposals import Proposals


def network_of(model: PreTrainedModel) -> Network:
    """The model as the loop sees it."""

    def network(work: Pass, readout: Callable[[nn.Module, Tensor], Proposals], /) -> Proposals:
        output = model(
            input_ids=work.ids_T[None],
            position_ids=work.position_T[None],
            attention_mask=work.plan,
            logits_to_keep=work.wanted_M,
            readout=readout,
        )
        return output.readout

    return network
