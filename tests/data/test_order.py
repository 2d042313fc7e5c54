"""The order in which training sees the data, and how its samples are numbered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.data.order import OrderedDataset


def rows(count: int) -> list[dict[str, Any]]:
    return [{"row": i, "length": 3 + i * 7 % 11} for i in range(count)]


def epoch_of(data: OrderedDataset, epoch: int) -> list[dict[str, Any]]:
    data.set_epoch(epoch)
    return [data[i] for i in range(len(data))]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 30))
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(
    count: int, group: int, seed: int, epoch: int
) -> None:
    data = OrderedDataset(rows(count), seed=seed, group=group)
    first = epoch_of(data, epoch)
    assert sorted(row["row"] for row in first[:count]) == list(range(count))
    epoch_of(data, epoch + 1)
    assert epoch_of(data, epoch) == first
    other_group = epoch_of(OrderedDataset(rows(count), seed=seed, group=group + 1), epoch)
    assert [row["row"] for row in other_group[:count]] == [row["row"] for row in first[:count]]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30))
def test_the_last_step_is_filled_up_from_the_beginning(count: int, group: int, epoch: int) -> None:
    order = [row["row"] for row in epoch_of(OrderedDataset(rows(count), seed=0, group=group), epoch)]
    assert len(order) == -(-count // group) * group
    assert order == (order[:count] * group)[: len(order)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        [row["row"] for row in epoch_of(OrderedDataset(rows(50), seed=seed, group=4), epoch)]
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == 6


@given(st.integers(1, 40), st.integers(1, 9))
def test_samples_count_through_the_epochs_each_starting_a_step(count: int, group: int) -> None:
    data = OrderedDataset(rows(count), seed=0, group=group)
    samples = [[row["sample"] for row in epoch_of(data, epoch)] for epoch in range(4)]
    steps = -(-count // group)
    for epoch, of_epoch in enumerate(samples):
        assert of_epoch == list(range(epoch * steps * group, (epoch + 1) * steps * group))


def test_evaluation_keeps_the_order_of_the_rows() -> None:
    data = OrderedDataset(rows(9), seed=0, group=9, shuffle=False)
    assert [(row["row"], row["sample"]) for row in epoch_of(data, 0)] == [(i, i) for i in range(9)]


@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 3), st.randoms(use_true_random=False))
def test_pad_to_is_the_longest_of_the_step_in_any_order_of_reading(
    count: int, group: int, epoch: int, random: Any
) -> None:
    # a length that depends on the sample too, as a drawn turn's does
    def length_of(row: dict[str, Any], sample: int) -> int:
        return int(row["length"]) + sample % 3

    data = OrderedDataset(rows(count), seed=1, group=group, length_of=length_of)
    data.set_epoch(epoch)
    places = list(range(len(data)))
    random.shuffle(places)
    seen = {place: data[place] for place in places}
    for place, row in seen.items():
        step = [seen[p] for p in places if p // group == place // group]
        assert row["pad_to"] == max(length_of(other, other["sample"]) for other in step)


def test_a_new_epoch_forgets_the_longest_of_the_old_one() -> None:
    # one step an epoch, and another turn, so another length, of a row in each epoch
    data = OrderedDataset(rows(6), seed=2, group=6, length_of=lambda row, sample: 10 + sample // 6)
    assert [{row["pad_to"] for row in epoch_of(data, epoch)} for epoch in range(4)] == [{10}, {11}, {12}, {13}]


def test_without_lengths_there_is_no_pad_to() -> None:
    assert "pad_to" not in OrderedDataset(rows(3), seed=0, group=2)[0]


def test_rows_are_not_changed() -> None:
    source = rows(3)
    data = OrderedDataset(source, seed=0, group=2, length_of=lambda row, sample: 1)
    epoch_of(data, 1)
    assert source == rows(3)
    for outside in (-1, 4):
        with pytest.raises(IndexError):
            data[outside]


@pytest.mark.parametrize(("count", "group"), [(400, 4), (301, 6), (3, 4)])
def test_steps_of_one_length_are_still_a_keyed_permutation(count: int, group: int) -> None:
    lengths = [row["length"] for row in rows(count)]
    data = OrderedDataset(rows(count), seed=5, group=group, lengths=lengths)
    epochs = [epoch_of(data, epoch) for epoch in (0, 1)]
    for number, epoch in enumerate(epochs):
        assert sorted(row["row"] for row in epoch[:count]) == list(range(count))
        assert all(data.row_number(row["sample"]) == row["row"] for row in epoch)
        assert epoch == epoch_of(OrderedDataset(rows(count), seed=5, group=group, lengths=lengths), number)
        steps = [epoch[i : i + group] for i in range(0, count - group + 1, group)]
        spread = [max(r["length"] for r in step) - min(r["length"] for r in step) for step in steps]
        plain = epoch_of(OrderedDataset(rows(count), seed=5, group=group), number)
        unsorted = [plain[i : i + group] for i in range(0, count - group + 1, group)]
        padded = [sum(group * max(r["length"] for r in step) for step in each) for each in (steps, unsorted)]
        if count > group:
            assert sum(spread) / len(spread) < 1
            assert padded[0] < 0.8 * padded[1]
            longest = [max(r["length"] for r in step) for step in steps]
            assert longest != sorted(longest, reverse=True), "whole steps are shuffled"
    assert count < group or [row["row"] for row in epochs[0]] != [row["row"] for row in epochs[1]]
