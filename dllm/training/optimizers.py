"""Muon for the matrices of the blocks, AdamW for everything else, as one optimiser.

Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024); torch.optim.Muon does the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dllm.errors import OptionError


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers behind one face: the parameter groups are theirs, so one learning-rate schedule drives both.

    Args:
        muon_groups: parameter groups of matrices [m, n].
        adamw_groups: all other parameter groups.

    Raises:
        OptionError: this torch has no Muon (it came with torch 2.9).
    """

    def __init__(self, muon_groups: list[dict[str, Any]], adamw_groups: list[dict[str, Any]]) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise OptionError(f"--optimizer muon needs torch 2.9 or newer; this is {torch.__version__}. Use adamw.")
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(muon_groups),
            torch.optim.AdamW(adamw_groups),
        ]
        # the base class would make groups of its own; these are the parts' very dicts
        super().__init__([{"params": [nn.Parameter(torch.empty(0))]}], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_muon(
    model: nn.Module,
    *,
    muon_learning_rate: float,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    decayed: set[str],
) -> MuonWithAdamW:
    """Sorts a model's parameters: matrices inside the blocks go to Muon; embeddings, head and norms to AdamW.

    Args:
        model: its blocks are the modules that `_no_split_modules` names.
        muon_learning_rate: of the matrices.
        learning_rate: of the rest.
        weight_decay: for the matrices, and for those of the rest that `decayed` names.
        betas: of AdamW.
        eps: of AdamW.
        decayed: names of the parameters that weight decay applies to.
    """
    block_names = tuple(getattr(model, "_no_split_modules", None) or ())
    inside = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if type(module).__name__ in block_names
        for name, _ in module.named_parameters()
    }
    matrices: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in inside and parameter.dim() == 2:
            matrices.append(parameter)
        else:
            (plain if name in decayed else undecayed).append(parameter)
    adam = {"lr": learning_rate, "betas": betas, "eps": eps}
    return MuonWithAdamW(
        [{"params": matrices, "lr": muon_learning_rate, "weight_decay": weight_decay}],
        [
            {"params": params, "weight_decay": decay, **adam}
            for params, decay in ((plain, weight_decay), (undecayed, 0.0))
            if params
        ],
    )


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the command line decides of each parameter group: weight decay and the like; not its tensors and learning rate."""
    changing = ("params", "lr", "initial_lr")
    return [{key: value for key, value in group.items() if key not in changing} for group in optimizer.param_groups]
