"""Muon for the matrices of the blocks, AdamW for everything else, as one optimiser.

Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024); torch.optim.Muon does the step
where bf16 is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dllm.errors import OptionError
from dllm.layers.processors import bf16_is_fast

if hasattr(torch.optim, "Muon"):

    class Fp32Muon(torch.optim.Muon):
        """torch's Muon with products in fp32. Its own are bf16, which a processor without it imitates at a tenth of the speed."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
            """One step."""
            loss = closure() if closure is not None else None
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, parameter.grad, group)
            return loss

        def _step(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
            update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
            m, n = parameter.shape
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * max(1.0, m / n) ** 0.5)


def orthogonal(update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix with the singular vectors of another and singular values near 1, by Newton-Schulz steps in fp32.

    Args:
        update: [m, n].
        coefficients: a, b, c of x <- a x + (b A + c A A) x, with A = x x^T.
        steps: how many.
        eps: the least norm that is divided by.

    Source: Jordan et al., Muon (2024).
    """
    a, b, c = coefficients
    x = update.float()
    if x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if update.shape[0] > update.shape[1] else x).to(update.dtype)


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
        on_cpu = all(parameter.device.type == "cpu" for group in muon_groups for parameter in group["params"])
        muon = Fp32Muon if on_cpu and not bf16_is_fast(cpu=True) else torch.optim.Muon
        self.parts: list[torch.optim.Optimizer] = [
            muon(muon_groups),
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
