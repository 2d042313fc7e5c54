"""The masked loss: unbiased, rightly normalised, and the same however a batch is split."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.loss import (
    Nll,
    any_order_loss,
    bernoulli_loss,
    exact_loss,
    normalised_loss,
    pattern_probability,
    plain_head_loss,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm.diffusion import objective
from dllm.diffusion.corruption import CorruptionPlan
from dllm.diffusion.noise import keyed_uniform
from dllm.diffusion.objective import (
    batch_count,
    check_normalisation,
    head_loss,
    masked_nll,
    token_weights,
)
from dllm.diffusion.schedule import elbo_weight, mask_probability
from dllm.errors import OptionError

V, MASK = 3, 3
NORMALISATIONS = ["token", "sequence", "batch"]


def table_logits(xt_BL: Tensor, seed: int = 0) -> Tensor:
    """fp64 [B, L, V]: a predictor that knows nothing but its table, with an entry of its own for every row with masks."""
    L = xt_BL.shape[1]
    row_B = (xt_BL * (V + 1) ** torch.arange(L)).sum(1)
    return 4 * keyed_uniform(seed, row_B[:, None, None], torch.arange(L)[:, None], torch.arange(V))


def table_nll(ids: tuple[int, ...], seed: int = 0) -> Nll:
    def nll(row: tuple[int, ...]) -> list[float]:
        log_p = table_logits(torch.tensor([row]), seed)[0].log_softmax(-1)
        return [-log_p[place, token].item() for place, token in enumerate(ids)]

    return nll


def joint_nll(ids: tuple[int, ...], joint: Tensor) -> Nll:
    """The true conditionals of a joint distribution over V^L rows."""

    def nll(row: tuple[int, ...]) -> list[float]:
        visible = joint[tuple(slice(None) if token == MASK else slice(token, token + 1) for token in row)]
        scores = []
        for place, token in enumerate(ids):
            marginal = visible.sum([axis for axis in range(visible.dim()) if axis != place])
            scores.append(-math.log(marginal[token if row[place] == MASK else 0] / visible.sum()))
        return scores

    return nll


def masked_loss(nll_N: Tensor, weight_BL: Tensor, masked_BL: Tensor, maskable_BL: Tensor, normalisation: Any) -> Tensor:
    """What `head_loss` sums, from cross-entropies that are there already."""
    return (nll_N * token_weights(weight_BL, masked_BL, maskable_BL, normalisation)).sum()


def all_masks(n: int) -> Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=n)))


def over_every_mask(ids: tuple[int, ...], maskable: tuple[int, ...], nll: Nll, p: float) -> float:
    """The expectation at one time of the package's own loss, every set of masks once, as one batch of 2^n rows."""
    masks = all_masks(len(maskable))
    masked = torch.zeros(len(masks), len(ids), dtype=torch.bool)
    masked[:, list(maskable)] = masks
    xt = torch.tensor(ids).expand_as(masked).masked_fill(masked, MASK)
    scores = torch.tensor([nll(tuple(row)) for row in xt.tolist()], dtype=torch.float64)
    weight = masked * elbo_weight(torch.tensor(p, dtype=torch.float64))
    can = torch.zeros_like(masked)
    can[:, list(maskable)] = True
    total = 0.0
    for row in range(len(masks)):
        here = slice(row, row + 1)
        part = masked_loss(scores[here][masked[here]], weight[here], masked[here], can[here], "batch")
        total += pattern_probability(int(masks[row].sum()), len(maskable), p) * part.item()
    return total


ROW = (2, 0, 1, 1, 2)
PLACES = [(0, 1, 2, 3, 4), (1, 3, 4), (2,)]


def quadrature(low: float, high: float) -> list[tuple[float, float]]:
    """Nodes and weights of Gauss and Legendre, exact for polynomials of degree 9: those of five tokens have degree 4."""
    nodes = [0.0, 0.5384693101056831, -0.5384693101056831, 0.9061798459386640, -0.9061798459386640]
    weights = [0.5688888888888889] + [0.4786286704993665] * 2 + [0.2369268850561891] * 2
    half = (high - low) / 2
    return [(low + half * (1 + node), half * weight) for node, weight in zip(nodes, weights, strict=True)]


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("p", [0.001, 0.2, 0.7, 1.0])
def test_the_loss_over_every_mask_is_the_enumerated_one(places: tuple[int, ...], p: float) -> None:
    nll = table_nll(ROW)
    assert over_every_mask(ROW, places, nll, p) == pytest.approx(bernoulli_loss(ROW, places, MASK, nll, p), rel=1e-12)


@pytest.mark.parametrize("places", PLACES)
def test_bernoulli_and_exact_masks_and_writing_in_any_order_are_one_bound(places: tuple[int, ...]) -> None:
    nll = table_nll(ROW)
    over_time = sum(
        weight * over_every_mask(ROW, places, nll, mask_probability(torch.tensor(t, dtype=torch.float64), 0.0).item())
        for t, weight in quadrature(0.0, 1.0)
    )
    assert over_time == pytest.approx(any_order_loss(ROW, places, MASK, nll), rel=1e-12)
    assert over_time == pytest.approx(exact_loss(ROW, places, MASK, nll), rel=1e-12)


def test_with_the_true_conditionals_the_bound_is_the_log_likelihood() -> None:
    joint = keyed_uniform(1, torch.arange(V**4)).view(V, V, V, V) ** 3
    joint /= joint.sum()
    for ids in [(0, 1, 2, 0), (2, 2, 1, 0)]:
        nll = joint_nll(ids, joint)
        bound = sum(w * over_every_mask(ids, (0, 1, 2, 3), nll, p) for p, w in quadrature(0.0, 1.0))
        assert bound == pytest.approx(-math.log(joint[ids]), rel=1e-10)


@pytest.mark.parametrize("masking", ["bernoulli", "exact"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.4, 0.8)])
@pytest.mark.parametrize("places", PLACES[:2])
def test_training_draws_have_the_enumerated_mean(
    masking: Any, low: float, high: float, places: tuple[int, ...]
) -> None:
    """The whole chain, as training runs it: times, masks, cross-entropies, weights, sum."""
    draws, seed = 1 << 15, 7
    maskable = torch.zeros(draws, len(ROW), dtype=torch.bool)
    maskable[:, list(places)] = True
    ids = torch.tensor(ROW).expand(draws, -1)
    plan = CorruptionPlan(group=draws, masking=masking, min_time=low, max_time=high)
    xt, masked, weight, _ = plan.corrupt(ids, maskable, torch.arange(draws), MASK)
    nll = masked_nll(table_logits(xt, seed)[masked].float(), ids[masked])
    mean = masked_loss(nll, weight, masked, maskable, "batch") / batch_count(maskable, "batch")

    reference = table_nll(ROW, seed)
    if masking == "bernoulli":
        eps = plan.eps
        nodes = [((1 - eps) * t + eps, w / (high - low)) for t, w in quadrature(low, high)]
        expected = sum(w * bernoulli_loss(ROW, places, MASK, reference, p) for p, w in nodes)
    elif (low, high) == (0.0, 1.0):
        expected = exact_loss(ROW, places, MASK, reference)
    else:
        expected = exact_loss_between(places, reference, low, high)
    per_row = torch.zeros(draws).index_add(0, masked.nonzero()[:, 0], nll * weight[masked])
    error = per_row.std().item() / math.sqrt(draws)
    assert error < 0.02 * expected
    assert abs(mean.item() - expected) < 4 * error


def exact_loss_between(places: tuple[int, ...], nll: Nll, low: float, high: float) -> float:
    """eq. 6 where t, and with it k = floor(t n) + 1, is drawn from a part of [0, 1]."""
    n = len(places)
    total = 0.0
    for k in range(1, n + 1):
        share = max(0.0, min(high, k / n) - max(low, (k - 1) / n)) / (high - low)
        for hidden in itertools.combinations(places, k):
            scores = nll(tuple(MASK if place in hidden else token for place, token in enumerate(ROW)))
            total += share * sum(scores[place] for place in hidden) * (n / k) / math.comb(n, k)
    return total


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, weight, masked and maskable [B, L], with rows that hold nothing to mask and rows without a mask."""
    rows, length, seed = draw(st.integers(2, 6)), draw(st.integers(1, 9)), draw(st.integers(0, 999))
    share_can, share_masked = draw(st.sampled_from([0.2, 0.6, 1.0])), draw(st.sampled_from([0.3, 0.8]))
    u = keyed_uniform(seed, torch.arange(4)[:, None, None], torch.arange(rows)[:, None], torch.arange(length))
    maskable = u[0] < share_can
    maskable[0, 0] = True
    masked = maskable & (u[1] < share_masked)
    return (10 * u[2]).float(), (masked / u[3]).float(), masked, maskable


@given(batches(), st.sampled_from(NORMALISATIONS))
def test_each_normalisation_is_the_slow_one(batch: tuple[Tensor, ...], normalisation: Any) -> None:
    nll, weight, masked, maskable = batch
    loss = masked_loss(nll[masked], weight, masked, maskable, normalisation) / batch_count(maskable, normalisation)
    expected = normalised_loss(nll.tolist(), weight.tolist(), masked.tolist(), maskable.tolist(), normalisation)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@given(batches(), st.sampled_from(NORMALISATIONS), st.randoms())
def test_the_loss_and_its_gradient_do_not_depend_on_how_a_batch_is_split(
    batch: tuple[Tensor, ...], normalisation: Any, random: Any
) -> None:
    nll, weight, masked, maskable = batch
    nll = nll.double()  # so that what is left of a difference is no rounding
    nll.requires_grad_()
    total = batch_count(maskable, normalisation)
    whole = masked_loss(nll[masked], weight, masked, maskable, normalisation) / total
    (slope,) = torch.autograd.grad(whole, nll)

    order = random.sample(range(len(nll)), len(nll))
    cut = random.randint(1, len(nll) - 1)
    parts = [order[:cut], order[cut:]]
    assert sum(batch_count(maskable[part], normalisation) for part in parts) == total
    pieces = [masked_loss(nll[p][masked[p]], weight[p], masked[p], maskable[p], normalisation) / total for p in parts]
    torch.testing.assert_close(sum(pieces), whole, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(sum(pieces), nll)[0], slope, rtol=1e-6, atol=1e-9)


@given(batches(), st.sampled_from(NORMALISATIONS), st.integers(1, 5))
def test_padding_changes_nothing(batch: tuple[Tensor, ...], normalisation: Any, padding: int) -> None:
    nll, weight, masked, maskable = batch
    wide = [torch.nn.functional.pad(x, (0, padding)) for x in batch]
    assert torch.equal(
        masked_loss(nll[masked], weight, masked, maskable, normalisation),
        masked_loss(wide[0][wide[2]], *wide[1:], normalisation),
    )
    assert batch_count(wide[3], normalisation) == batch_count(maskable, normalisation)


def test_a_batch_without_masks_has_loss_zero_and_a_gradient() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    logits = torch.randn(0, 5, requires_grad=True)
    for normalisation in NORMALISATIONS:
        nll = masked_nll(logits, torch.zeros(0, dtype=torch.int64))
        loss = masked_loss(nll, torch.zeros(2, 3), nothing, nothing, normalisation)  # type: ignore[arg-type]
        assert loss.item() == 0
        loss.backward()


class CalledHead(nn.Linear):
    """A head that is more than a weight, as adapters and quantisation make them."""


def head_case(rows: int, dtype: torch.dtype, kind: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    head: nn.Module = nn.Embedding(11, 6) if kind == "tied" else nn.Linear(6, 11, bias=False)
    if kind == "called":
        head = CalledHead(6, 11, bias=False)
    hidden = (3 * torch.randn(rows, 6)).to(dtype).requires_grad_()
    return head.to(dtype), hidden, torch.arange(rows) * 7 % 11, 1 / (0.001 + torch.rand(rows))


@pytest.mark.parametrize("kind", ["linear", "tied", "called"])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9])
def test_the_loss_in_chunks_is_the_plain_loss_in_fp64(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "chunk_rows", lambda vocabulary: 4)
    head, hidden, targets, weights = head_case(rows, torch.float64, kind)
    done = head_loss(head, hidden, targets, weights)
    (done.loss * 0.3).backward()
    mine = done.loss.detach(), done.nll_N, hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    loss, nll = plain_head_loss(head.weight, hidden, targets, weights)
    (loss * 0.3).backward()
    assert done.loss.dtype == torch.float64
    assert not done.nll_N.requires_grad
    for ours, theirs in zip(mine, (loss.detach(), nll.detach(), hidden.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_low_precision_the_loss_is_near_the_one_in_fp64(
    dtype: torch.dtype, tolerance: float, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "chunk_rows", lambda vocabulary: 4)
    head, hidden, targets, weights = head_case(9, torch.float32 if autocast else dtype, "linear")
    weights = weights * 1e-6  # fp16 alone would lose them
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        done = head_loss(head, hidden, targets, weights)
    (done.loss * 1024).backward()
    assert done.loss.dtype == done.nll_N.dtype == torch.float32
    mine = done.loss.detach(), hidden.grad, head.weight.grad
    assert hidden.grad is not None
    assert hidden.grad.dtype == hidden.dtype
    wide_hidden, wide_head = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    loss, _ = plain_head_loss(wide_head, wide_hidden, targets, weights)
    (loss * 1024).backward()
    for ours, theirs in zip(mine, (loss.detach(), wide_hidden.grad, wide_head.grad), strict=True):
        assert ours is not None
        assert theirs is not None
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_fp16_holds_the_gradient_of_many_equal_targets() -> None:
    head = nn.Linear(4, 8, bias=False)
    hidden = torch.full((800, 4), 120.0, requires_grad=True)
    targets, weights = torch.zeros(800, dtype=torch.int64), torch.full((800,), 1 / 800)
    with torch.autocast("cpu", torch.float16):
        head_loss(head, hidden, targets, weights).loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()
    assert head.weight.grad.abs().max() > 1


@pytest.mark.parametrize("trained", ["hidden", "head", "neither"])
def test_what_is_frozen_costs_no_gradient(trained: str) -> None:
    head, hidden, targets, weights = head_case(9, torch.float64, "linear")
    head.weight.requires_grad_(trained == "head")
    hidden.requires_grad_(trained == "hidden")
    loss = head_loss(head, hidden, targets, weights).loss
    assert loss.requires_grad == (trained != "neither")
    if trained != "neither":
        mine, theirs = (
            torch.autograd.grad(each, head.weight if trained == "head" else hidden)[0]
            for each in (loss, plain_head_loss(head.weight, hidden, targets, weights)[0])
        )
        torch.testing.assert_close(mine, theirs)


def test_no_tensor_is_as_large_as_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "chunk_rows", lambda vocabulary: 16)
    head, hidden = nn.Linear(4, 512, bias=False), torch.randn(256, 4, requires_grad=True)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    with Watch():
        head_loss(head, hidden, torch.zeros(256, dtype=torch.int64), torch.ones(256)).loss.backward()
    assert max(largest) == 16 * 512  # one chunk; all rows are 256 x 512, and the head is 4 x 512


@pytest.mark.parametrize("vocabulary", [12, 32_768, 126_464, 10_000_000])
def test_chunks_bound_the_logits(vocabulary: int) -> None:
    rows = objective.chunk_rows(vocabulary)
    assert rows * vocabulary <= objective.CHUNK_ELEMENTS or rows == objective.LEAST_ROWS


def test_documents_in_a_row_count_like_rows() -> None:
    """Rows of 3, 2 and 4 positions, alone and packed into two rows of 6."""
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, -1, -1]])
    maskable = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    masked = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    weight = torch.rand(2, 6)
    alone = [tuple(x[documents == each][None] for x in (weight, masked, maskable)) for each in range(3)]
    for normalisation in NORMALISATIONS:
        counts = [batch_count(can, normalisation) for _, _, can in alone]
        assert batch_count(maskable, normalisation, documents) == sum(counts)
        expected = torch.cat([token_weights(*each, normalisation) for each in alone])
        torch.testing.assert_close(token_weights(weight, masked, maskable, normalisation, documents), expected)


@pytest.mark.parametrize("use", [check_normalisation, lambda name: batch_count(torch.ones(1, 1).bool(), name)])
def test_unknown_normalisations_name_the_nearest(use: Any) -> None:
    with pytest.raises(OptionError, match=r"loss_normalisation='tokens' does not exist\. Did you mean 'token'\?"):
        use("tokens")
    with pytest.raises(OptionError, match=r"loss_normalisation='mean' .* It can be one of: batch, sequence, token\."):
        use("mean")
    with pytest.raises(OptionError, match=r"'seqence' does not exist\. Did you mean 'sequence'\?"):
        masked_loss(torch.zeros(0), *[torch.zeros(1, 1, dtype=torch.bool)] * 3, "seqence")  # type: ignore[arg-type]
