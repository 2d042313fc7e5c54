"""The mixture: each token's experts one by one, whatever multiplies them, and the loss that keeps their load even.

Shapes: T tokens, D width, E experts, k experts a token, F expert width.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.models import mixture
from torch import Tensor

from dllm.layers.experts import Experts, TopKRouter, load_balancing_loss
from dllm.pipelines.llada import LLaDAMoEConfig

WIDTH, HIDDEN = 16, 8
every_path = pytest.mark.parametrize("path", ["eager", "grouped_mm", "batched_mm"])


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(path: str, experts: int, top_k: int, renormalise: bool = False) -> tuple[TopKRouter, Experts]:
    config = LLaDAMoEConfig(num_experts=experts, num_experts_per_tok=top_k)
    config._experts_implementation = path
    router, stack = TopKRouter(WIDTH, experts, top_k, renormalise), Experts(config, experts, WIDTH, HIDDEN)
    with torch.no_grad():
        for seed, parameter in enumerate([*router.parameters(), *stack.parameters()]):
            parameter.copy_(normal(*parameter.shape, seed=seed, std=0.5))
    return router, stack


def mixed(router: TopKRouter, stack: Experts, x_TD: Tensor) -> Tensor:
    _, weight_Tk, expert_Tk = router(x_TD)
    return stack(x_TD, expert_Tk, weight_Tk)


def one_by_one(router: TopKRouter, stack: Experts) -> dict[str, Tensor]:
    """The public tensors of the same layer."""
    tensors = {"mlp.gate.weight": router.weight}
    for e in range(stack.num_experts):
        gate, up = stack.gate_up_proj[e].chunk(2)
        for part, tensor in (("gate", gate), ("up", up), ("down", stack.down_proj[e])):
            tensors[f"mlp.experts.{e}.{part}_proj.weight"] = tensor
    return tensors


@every_path
@settings(max_examples=12)
@given(tokens=st.integers(1, 9), experts=st.integers(1, 6), top_k=st.integers(1, 6), renormalise=st.booleans())
def test_is_the_sum_of_the_chosen_experts(path: str, tokens: int, experts: int, top_k: int, renormalise: bool) -> None:
    top_k = min(top_k, experts)
    router, stack = made(path, experts, top_k, renormalise)
    x = normal(tokens, WIDTH, seed=tokens)
    settings_ = SimpleNamespace(num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=renormalise)
    expected = mixture(x, one_by_one(router, stack), settings_)
    torch.testing.assert_close(mixed(router, stack, x), expected, rtol=0, atol=1e-5)


@every_path
def test_gradients_are_those_of_the_sum_written_out(path: str) -> None:
    router, stack = made(path, 5, 2)
    x = normal(7, WIDTH)
    parameters = [*router.parameters(), *stack.parameters()]
    settings_ = SimpleNamespace(num_experts=5, num_experts_per_tok=2, norm_topk_prob=False)
    weight = normal(7, WIDTH, seed=3)
    found = torch.autograd.grad((mixed(router, stack, x) * weight).sum(), parameters)
    expected = torch.autograd.grad((mixture(x, one_by_one(router, stack), settings_) * weight).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@every_path
def test_a_token_gives_the_same_in_any_company_and_any_order(path: str) -> None:
    router, stack = made(path, 6, 3)
    x = normal(10, WIDTH)
    together = mixed(router, stack, x)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mixed(router, stack, x[order]), together[order], rtol=0, atol=1e-5)
    for place in range(10):
        alone = mixed(router, stack, x[place : place + 1])[0]
        torch.testing.assert_close(alone, together[place], rtol=0, atol=1e-5)  # of values of 1 to 20


@every_path
def test_experts_that_nobody_asked_for_may_hold_anything(path: str) -> None:
    _, stack = made(path, 6, 2)
    x, weight = normal(4, WIDTH), torch.full((4, 2), 0.5)
    expert = torch.tensor([[1, 4]] * 4)
    before = stack(x, expert, weight)
    with torch.no_grad():
        for unasked in (0, 2, 3, 5):
            stack.gate_up_proj[unasked] = 1e4
            stack.down_proj[unasked] = -1e4
    assert torch.equal(stack(x, expert, weight), before)


@every_path
def test_bf16_stays_near_fp32(path: str) -> None:
    router, stack = made(path, 6, 2)
    x = normal(20, WIDTH)
    _, weight, expert = router(x)
    exact = stack(x, expert, weight)
    rough = stack.bfloat16()(x.bfloat16(), expert, weight)
    assert rough.dtype == torch.bfloat16
    # weights, products and sums rounded to 8 bits, each to at most 0.4 %
    assert (rough.float() - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_router_takes_the_likeliest_experts(renormalise: bool) -> None:
    router, _ = made("eager", 6, 3, renormalise)
    x = normal(11, WIDTH)
    logits, weight, expert = router(x)
    assert torch.equal(logits, x @ router.weight.T)
    chances = logits.detach().double().softmax(-1)
    for row, chosen in enumerate(expert.tolist()):
        assert chosen == sorted(range(6), key=lambda e, row=row: -float(chances[row, e]))[:3]
        share = chances[row, chosen]
        expected = share / share.sum() if renormalise else share
        torch.testing.assert_close(weight[row].detach().double(), expected, rtol=0, atol=1e-6)


def test_the_routers_softmax_is_in_fp32() -> None:
    router, _ = made("eager", 6, 3)
    logits, weight, _ = router.bfloat16()(normal(5, WIDTH).bfloat16())
    assert (logits.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(weight, logits.float().softmax(-1).topk(3).values, rtol=0, atol=0)


# --- the loss that keeps the load even


def loss_by_counting(layers: list[Tensor], top_k: int, real: list[bool]) -> float:
    """One token, one layer, one expert at a time (arXiv:2101.03961, eq. 4 to 6)."""
    experts = layers[0].shape[1]
    chosen, chance, tokens = [0.0] * experts, [0.0] * experts, 0
    for logits in layers:
        for row, counts in zip(logits.double().softmax(-1).tolist(), real, strict=True):
            if not counts:
                continue
            tokens += 1
            for e in sorted(range(experts), key=lambda e, row=row: -row[e])[:top_k]:
                chosen[e] += 1
            for e in range(experts):
                chance[e] += row[e]
    return experts * sum(c / tokens * p / tokens for c, p in zip(chosen, chance, strict=True))


@settings(max_examples=25)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(2, 6),
    top_k=st.integers(1, 2),
    real=st.lists(st.booleans(), min_size=2, max_size=8).filter(any),
    seed=st.integers(0, 1000),
)
def test_the_loss_is_that_of_counting(layers: int, experts: int, top_k: int, real: list[bool], seed: int) -> None:
    logits = [normal(len(real), experts, seed=seed + i) for i in range(layers)]
    mask = torch.tensor(real).long()[None]
    assert load_balancing_loss(logits, top_k, mask).item() == pytest.approx(
        loss_by_counting(logits, top_k, real), rel=1e-5
    )
    everything = [True] * len(real)
    assert load_balancing_loss(logits, top_k).item() == pytest.approx(
        loss_by_counting(logits, top_k, everything), rel=1e-5
    )


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_loss_is_k_where_the_load_is_even_and_more_where_it_is_not(top_k: int) -> None:
    favours = normal(5)
    even = torch.stack([favours.roll(shift) for shift in range(5)])
    assert load_balancing_loss([even, even], top_k).item() == pytest.approx(top_k, rel=1e-6)
    collapsed = load_balancing_loss([favours[None].expand(5, -1)], top_k).item()
    assert collapsed > top_k + 0.1 or top_k == 5


def test_padding_does_not_count() -> None:
    logits = [normal(8, 4, seed=layer) for layer in range(2)]
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    other = [torch.where(mask.flatten()[:, None] == 1, part, 9.0) for part in logits]
    expected = load_balancing_loss([part[mask.flatten() == 1] for part in logits], 2)
    for given_ in (logits, other):
        torch.testing.assert_close(load_balancing_loss(given_, 2, mask), expected)
        torch.testing.assert_close(load_balancing_loss(given_, 2, mask.bool()), expected)


def test_going_down_the_loss_evens_the_load() -> None:
    logits = normal(32, 4, std=0.1) + torch.tensor([2.0, 0.0, 0.0, 0.0])
    logits.requires_grad_()
    before = load_balancing_loss([logits], 1)
    (gradient,) = torch.autograd.grad(before, logits)
    assert (gradient[:, 0] > 0).all()
    assert load_balancing_loss([logits - 200 * gradient], 1) < before


def test_the_loss_is_in_fp32() -> None:
    rough = [normal(6, 4).bfloat16()]
    assert load_balancing_loss(rough, 2).dtype == torch.float32
    assert torch.equal(load_balancing_loss(rough, 2), load_balancing_loss([rough[0].float()], 2))
