"""Packed rows: every document once, no row too long, and each document learnt as if it were alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dllm.data.collators import SFTCollator
from dllm.data.packing import PackedDataset, ends_of_text, pack
from dllm.diffusion.corruption import CorruptionPlan, Documents
from dllm.diffusion.objective import token_weights
from dllm.pipelines.llada import fresh_model
from dllm.pipelines.llada.tokenizer import char_tokenizer

EOS = 2


class Rows:
    """Conversations of one or two turns, as `sft_rows` makes them."""

    def __init__(self, n: int) -> None:
        self.rows = []
        for i in range(n):
            first = 2 + i % 3
            turns = [first, first + 2 + i % 5]
            if i % 4 == 0:
                turns += [turns[-1] + 2, turns[-1] + 5]
            self.rows.append({"input_ids": [3 + (7 * i + j) % 50 for j in range(turns[-1])], "turns": turns})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def packed(n: int = 23, *, ends: str = "2", group: int = 4, seed: int = 3) -> PackedDataset:
    return PackedDataset(Rows(n), capacity=24, ends=ends, seed=seed, group=group)


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_every_document_is_packed_once_and_rows_hold_them(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    used = [sum(lengths[document] for document in row) for row in rows]
    assert all(0 < each <= capacity for each in used)
    # no two rows fit into one: best fit would have put the second's documents into the first
    assert all(a + b > capacity for a, b in zip(sorted(used), sorted(used)[1:], strict=False))


def test_packing_finds_the_rows_of_a_worked_example() -> None:
    assert pack([3, 7, 5, 2, 3], 10) == [[1, 0], [2, 4, 3]]


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="document 1 has 11 tokens, and a row holds 10"):
        pack([3, 11], 10)


def test_a_fixed_number_of_ends_fits_into_the_row() -> None:
    assert ends_of_text(np.array([5, 9, 10]), 10, rule="4", seed=0, group=8).tolist() == [4, 1, 0]


def test_mirrored_ends_are_those_of_padded_steps() -> None:
    lengths = np.array([3, 5, 9, 20] * 500)
    tails = ends_of_text(lengths, 30, rule="mirror", seed=1, group=4)
    assert (lengths + tails <= 20).all()
    # the longest of a row and three others: 20 for three quarters cubed of the draws less
    expected = {}
    for own in (3, 5, 9, 20):
        longest = [max(own, a, b, c) for a in (3, 5, 9, 20) for b in (3, 5, 9, 20) for c in (3, 5, 9, 20)]
        expected[own] = sum(longest) / len(longest) - own
    for own, mean in expected.items():
        assert tails[lengths == own].mean() == pytest.approx(mean, abs=0.8)


def test_an_epoch_has_every_sample_once_and_the_next_has_others() -> None:
    data = packed(group=4)
    seen: list[int] = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        rows = [data[position] for position in range(len(data))]
        assert len(rows) % 4 == 0
        samples = [each["sample"] for row in rows for each in row["documents"]]
        assert len(samples) == len(set(samples))
        assert {data.row_number(sample) for sample in samples} == set(range(23))
        for step in range(0, len(rows), 4):
            here = rows[step : step + 4]
            assert {(row["step"], row["of"]) for row in here} == {
                (epoch * len(rows) // 4 + step // 4, sum(len(row["documents"]) for row in here))
            }
            places = [row["place"] + i for row in here for i in range(len(row["documents"]))]
            assert places == list(range(here[0]["of"]))
        assert not set(seen) & set(samples)
        seen += samples


def documents_of(batch: dict[str, Tensor]) -> Documents:
    return Documents(*(batch[name] for name in ("document", "position", "step", "place", "of")))


@pytest.mark.parametrize("masking", ["bernoulli", "exact"])
@pytest.mark.parametrize("times", ["stratified", "independent"])
def test_a_packed_document_has_the_masks_and_the_loss_that_it_has_alone(masking: Any, times: Any) -> None:
    data, collate = packed(), SFTCollator(seed=3, eos_token_id=EOS)
    plan = CorruptionPlan(group=4, masking=masking, times=times, seed=3)
    model = fresh_model("tiny", char_tokenizer(), "n_layers=2,d_model=32,mlp_hidden_size=64,n_heads=2", 32).double()
    items = [data[position] for position in range(4)]
    whole = collate(items)
    assert whole["document"].max() + 1 == len(whole["sample"]) == items[0]["of"]

    def learn(batch: dict[str, Tensor]) -> tuple[Tensor, list[float]]:
        noisy = plan.corrupt(batch["input_ids"], batch["maskable"], batch["sample"], 1, documents_of(batch))
        weights = token_weights(noisy.weight_BL, noisy.masked_BL, batch["maskable"], "sequence", batch["document"])
        output = model(
            input_ids=noisy.xt_BL, document_ids=batch["document"], logits_to_keep=noisy.masked_BL,
            targets=batch["input_ids"][noisy.masked_BL], target_weights=weights,
        )  # fmt: skip
        return output.loss, noisy.t_B.tolist()

    loss, t = learn(whole)
    if times == "stratified":
        assert sorted(int((each - min(t)) * len(t) + 0.5) for each in t) == list(range(len(t)))
    alone = [
        {**item, "documents": [each], "place": item["place"] + i} for item in items for i, each in enumerate(item["documents"])
    ]  # fmt: skip
    losses, t_alone = zip(*(learn(collate([item])) for item in alone), strict=True)
    assert [each for (each,) in t_alone] == t
    assert float(loss.detach()) == pytest.approx(sum(float(each.detach()) for each in losses), rel=1e-9)
    grads = torch.autograd.grad(loss, model.parameters()), torch.autograd.grad(sum(losses), model.parameters())
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_prompts_and_what_is_left_of_a_row_are_not_learnt() -> None:
    data, collate = packed(), SFTCollator(seed=3, eos_token_id=EOS)
    batch = collate([data[0], data[1]])
    assert not batch["maskable"][batch["document"] < 0].any()
    for number, (sample, row) in enumerate(zip(batch["sample"], batch["row"], strict=True)):
        here = batch["document"] == number
        assert here.any(1).nonzero().tolist() == [[int(row)]]
        source = data.rows[data.row_number(int(sample))]
        start, end = collate.answer(source, int(sample))
        ids = batch["input_ids"][here].tolist()
        assert ids == source["input_ids"][:end] + [EOS] * 2
        assert batch["maskable"][here].tolist() == [False] * start + [True] * (end - start + 2)
        assert batch["position"][here].tolist() == list(range(end + 2))


def test_rows_hold_little_but_documents() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 2000)
    rows = pack(lengths, 512)
    assert lengths.sum() / (512 * len(rows)) > 0.97
