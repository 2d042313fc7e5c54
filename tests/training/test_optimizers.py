"""Muon for the matrices inside the blocks, AdamW for the rest, as one optimiser."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dllm.errors import OptionError
from dllm.training import optimizers
from dllm.training.optimizers import MuonWithAdamW, build_muon, orthogonal

SETTINGS: dict[str, Any] = dict(
    muon_learning_rate=0.02, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
)


def decayed(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dim() > 1}


def build(model: nn.Module) -> MuonWithAdamW:
    return build_muon(model, decayed=decayed(model), **SETTINGS)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_embeddings_head_and_norms_go_to_adamw_and_the_matrices_to_muon(model: nn.Module) -> None:
    optimizer = build(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ([{names[id(p)] for p in group["params"]} for group in part.param_groups] for part in optimizer.parts)
    matrices = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert muon == [{f"model.transformer.blocks.{i}.{name}.weight" for i in range(2) for name in matrices}]
    norms = {f"model.transformer.blocks.{i}.{name}.weight" for i in range(2) for name in ("attn_norm", "ff_norm")}
    assert adamw == [
        {"model.transformer.wte.weight", "model.transformer.ff_out.weight"},
        {"model.transformer.ln_f.weight", *norms},
    ]
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.02, 0.1), (1e-3, 0.1), (1e-3, 0.0)]


def test_a_frozen_parameter_is_left_out(model: nn.Module) -> None:
    first = next(model.parameters())
    first.requires_grad = False
    assert all(p is not first for group in build(model).param_groups for p in group["params"])


@pytest.mark.parametrize("fast", [True, False])
def test_a_step_is_that_of_the_two_optimisers(model: nn.Module, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "bf16_is_fast", lambda cpu: fast)
    twin = copy.deepcopy(model)
    optimizer = build(model)
    named = dict(twin.named_parameters())
    matrices = [p for name, p in named.items() if ".blocks." in name and p.dim() == 2]
    others = [p for name, p in named.items() if ".blocks." not in name and p.dim() == 2]
    parts = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(others, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        torch.optim.AdamW([p for p in named.values() if p.dim() == 1], lr=1e-3, weight_decay=0, betas=(0.9, 0.95)),
    ]
    for seed in range(3):
        step(model, optimizer, seed)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        for part in parts:
            part.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if fast or p.dim() == 1 or ".blocks." not in name:
            assert torch.equal(p, q), name
        else:  # torch rounds its products to bf16
            torch.testing.assert_close(p, q, rtol=0, atol=0.02 * 3 * 0.03)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_singular_values_of_a_muon_step_are_near_one(shape: tuple[int, int]) -> None:
    """The coefficients are made for speed: they bring values to about [0.7, 1.2], and singular vectors stay."""
    m, n = shape
    u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    update = u @ torch.diag(torch.linspace(1, 2, min(m, n), dtype=torch.float64)) @ v.T
    x = orthogonal(update, (3.4445, -4.775, 2.0315), 5, 1e-7)
    core = u.T @ x @ v
    assert (core - torch.diag(core.diag())).abs().max() < 1e-5
    assert core.diag().min() > 0.6
    assert core.diag().max() < 1.3
    assert x.dtype == torch.float64


def test_one_schedule_drives_both(model: nn.Module) -> None:
    optimizer = build(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    step(model, optimizer, 0)
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.01, 5e-4]


def test_a_state_that_is_saved_and_loaded_goes_on_the_same(model: nn.Module) -> None:
    optimizer = build(model)
    for seed in range(2):
        step(model, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 0.003
    twin = copy.deepcopy(model)
    loaded = build(twin)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in loaded.param_groups] == [0.003, 1e-3, 1e-3]
    for seed in range(2, 4):
        step(model, optimizer, seed)
        step(twin, loaded, seed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    loaded.param_groups[0]["lr"] = 0.5  # what a schedule sets after loading is what the parts use
    assert loaded.parts[0].param_groups[0]["lr"] == 0.5


def test_gradients_are_forgotten(model: nn.Module) -> None:
    optimizer = build(model)
    step(model, optimizer, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_an_old_torch_is_told(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(OptionError, match=r"--optimizer muon needs torch 2.9 or newer; this is .*\. Use adamw\."):
        build(model)
