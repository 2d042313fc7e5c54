"""Batches of pretraining and of fine-tuning, as LLaDA's recipe has them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm.data.collators import PretrainingCollator, SFTCollator

EOS = 99


def rows(count: int, length: int = 8, first: int = 0) -> list[dict[str, Any]]:
    return [{"input_ids": list(range(i, i + length)), "sample": first + i} for i in range(count)]


def test_pretraining_batches_are_whole_and_all_maskable() -> None:
    batch = PretrainingCollator(seed=0, group=4, random_length=0.0)(rows(4))
    assert set(batch) == {"input_ids", "maskable", "sample"}
    assert batch["input_ids"].tolist() == [row["input_ids"] for row in rows(4)]
    assert batch["maskable"].all()
    assert batch["maskable"].shape == (4, 8)
    assert batch["sample"].tolist() == [0, 1, 2, 3]


@given(st.integers(0, 2**31), st.integers(0, 50), st.sampled_from([(6,), (3, 3), (1, 2, 3), (1,) * 6]))
def test_all_parts_of_a_step_are_cut_to_one_length(seed: int, step: int, split: tuple[int, ...]) -> None:
    collate = PretrainingCollator(seed=seed, group=6, random_length=0.5)
    whole = rows(6, first=6 * step)
    widths, start = set(), 0
    for size in split:
        batch = collate(whole[start : start + size])
        assert torch.equal(batch["maskable"], torch.ones_like(batch["input_ids"], dtype=torch.bool))
        assert batch["input_ids"].tolist() == [
            r["input_ids"][: batch["input_ids"].shape[1]] for r in whole[start:][:size]
        ]
        widths.add(batch["input_ids"].shape[1])
        start += size
    assert widths == {collate(whole)["input_ids"].shape[1]}


def test_the_share_of_cut_steps_and_their_lengths_are_as_asked() -> None:
    collate = PretrainingCollator(seed=3, group=1, random_length=0.25)
    widths = Counter(collate(rows(1, length=5, first=step))["input_ids"].shape[1] for step in range(1500))
    # a cut draws 1 .. 5 evenly: each shorter length comes in 5 % of the steps, within five standard deviations
    assert set(widths) == {1, 2, 3, 4, 5}
    assert all(abs(widths[n] - 75) < 5 * (75 * 0.95) ** 0.5 for n in (1, 2, 3, 4))


@pytest.mark.parametrize(("share", "cut"), [(0.0, False), (1.0, True)])
def test_no_step_or_every_step_is_cut(share: float, cut: bool) -> None:
    collate = PretrainingCollator(seed=1, group=2, random_length=share)
    widths = {collate(rows(2, length=50, first=2 * step))["input_ids"].shape[1] for step in range(30)}
    assert (widths != {50}) is cut


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A row as `sft_rows` makes it: prompt and answer in turn, cut after the last answer."""
    ids: list[int] = []
    turns: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        ids += draw(st.lists(st.integers(0, 90), min_size=1, max_size=5))
        turns.append(len(ids))
        ids += draw(st.lists(st.integers(0, 90), min_size=1, max_size=5))
        turns.append(len(ids))
    return {"input_ids": ids, "turns": turns}


@given(st.lists(conversations(), min_size=1, max_size=5), st.integers(0, 2**40), st.none() | st.integers(60, 70))
def test_the_prompt_is_never_masked_and_padding_is_part_of_the_answer(
    batch_rows: list[dict[str, Any]], first: int, pad_to: int | None
) -> None:
    collate = SFTCollator(seed=5, eos_token_id=EOS)
    given_rows = [{**row, "sample": first + i} for i, row in enumerate(batch_rows)]
    if pad_to is not None:
        given_rows = [{**row, "pad_to": pad_to} for row in given_rows]
    batch = collate(given_rows)
    assert set(batch) == {"input_ids", "maskable", "sample"}  # no attention mask: the padding is attended to
    ends = []
    for row, ids, maskable in zip(given_rows, batch["input_ids"].tolist(), batch["maskable"].tolist(), strict=True):
        start, end = collate.answer(row, row["sample"])
        assert (start, end) in zip(row["turns"][::2], row["turns"][1::2], strict=True)
        assert ids == row["input_ids"][:end] + [EOS] * (len(ids) - end)  # what follows the turn is cut
        assert maskable == [False] * start + [True] * (len(ids) - start)
        assert collate.length_of(row, row["sample"]) == end
        ends.append(end)
    assert batch["input_ids"].shape[1] == (max(ends) if pad_to is None else pad_to)
    assert batch["sample"].tolist() == [row["sample"] for row in given_rows]


@given(st.lists(conversations(), min_size=1, max_size=5), st.integers(0, 2**40))
def test_an_evaluated_row_is_what_it_is_alone(batch_rows: list[dict[str, Any]], first: int) -> None:
    collate = SFTCollator(seed=5, eos_token_id=EOS, evaluation=True)
    given_rows = [{**row, "sample": first + i} for i, row in enumerate(batch_rows)]
    batch = collate(given_rows)
    ends = [collate.length_of(row, row["sample"]) for row in given_rows]
    assert batch["input_ids"].shape[1] == max(ends)
    assert ("attention_mask" in batch) is (len(set(ends)) > 1)
    for place, (row, end) in enumerate(zip(given_rows, ends, strict=True)):
        alone = collate([row])
        assert set(alone) == {"input_ids", "maskable", "sample"}
        assert alone["input_ids"][0].tolist() == row["input_ids"][:end]
        for key in ("input_ids", "maskable"):
            assert torch.equal(batch[key][place, :end], alone[key][0])
        assert not batch["maskable"][place, end:].any()
        if "attention_mask" in batch:
            assert batch["attention_mask"][place].tolist() == [True] * end + [False] * (max(ends) - end)


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_every_turn_is_drawn_as_often(turns: int) -> None:
    row = {"input_ids": list(range(2 * turns)), "turns": list(range(1, 2 * turns + 1))[: 2 * turns]}
    collate = SFTCollator(seed=0, eos_token_id=EOS)
    draws, p = 1500, 1 / turns
    drawn = Counter(collate.answer(row, sample)[0] for sample in range(draws))
    assert set(drawn) == set(row["turns"][::2])
    assert all(abs(n - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5 for n in drawn.values())


def test_the_turn_depends_on_the_sample_and_the_seed_alone() -> None:
    row = {"input_ids": list(range(20)), "turns": list(range(1, 17))}
    draws = [[SFTCollator(seed=s, eos_token_id=EOS).answer(row, i) for i in range(50)] for s in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(set(draws[0])) == 8


def test_documents_of_a_pretraining_row_are_told_apart_by_what_ends_them() -> None:
    rows = [{"input_ids": [5, 6, 2, 7, 2, 8], "sample": 0}, {"input_ids": [2, 2, 5, 5, 5, 5], "sample": 1}]
    plain = PretrainingCollator(seed=0, group=2, random_length=0)(rows)
    assert "document_ids" not in plain
    ids = PretrainingCollator(seed=0, group=2, random_length=0, separator=2)(rows)["document_ids"]
    assert ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2]]
