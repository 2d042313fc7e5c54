"""The buffers: room, places, and rows that move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dllm.engine.buffers import KeyValues, bytes_per_position
from dllm.errors import OptionError
from dllm.sampling.rows import compacted

LAYERS, G, K = 2, 3, 4


def buffers(rows: int, length: int) -> KeyValues:
    kept = KeyValues(LAYERS, G, K, torch.float32, "cpu")
    kept.reserve(rows, length)
    return kept


def filled(rows: int, length: int) -> KeyValues:
    kept = buffers(rows, length)
    for tensor in (*kept.key, *kept.value):
        tensor.copy_(torch.randn(tensor.shape))
    return kept


def all_of(kept: KeyValues) -> list[Tensor]:
    return [tensor.clone() for tensor in (*kept.key, *kept.value)]


def addresses(kept: KeyValues) -> list[int]:
    return [tensor.data_ptr() for tensor in (*kept.key, *kept.value)]


def test_writes_in_place_and_reads_views() -> None:
    kept = buffers(3, 5)
    before = addresses(kept)
    row_T, position_T = torch.tensor([0, 0, 2]), torch.tensor([1, 4, 0])
    key, value = torch.randn(3, G, K), torch.randn(3, G, K)
    kept.write(1, row_T, position_T, key, value)
    assert addresses(kept) == before
    keys, values = kept.read(1, slice(0, 3), 5)
    assert (keys.data_ptr(), values.data_ptr()) == (kept.key[1].data_ptr(), kept.value[1].data_ptr())
    for t, (row, position) in enumerate([(0, 1), (0, 4), (2, 0)]):
        assert torch.equal(keys[row, :, position], key[t])
        assert torch.equal(values[row, :, position], value[t])
    assert keys.count_nonzero() == values.count_nonzero() == 3 * G * K
    assert not kept.key[0].any()  # the other layer


def test_grows_only_where_there_is_no_room_and_keeps_what_is_there() -> None:
    kept = filled(2, 3)
    old, before = all_of(kept), addresses(kept)
    assert not kept.reserve(2, 3)
    assert not kept.reserve(1, 1)
    assert (kept.rows, kept.length) == (2, 3)
    assert addresses(kept) == before
    assert kept.reserve(1, 7)  # a longer row
    assert (kept.rows, kept.length) == (2, 7)
    assert kept.reserve(4, 1)  # more rows
    assert (kept.rows, kept.length) == (4, 7)
    for was, now in zip(old, all_of(kept), strict=True):
        assert torch.equal(now[:2, :, :3], was)
        assert not now[2:].any()
        assert not now[:, :, 3:].any()


def test_counts_its_bytes() -> None:
    kept = KeyValues(LAYERS, G, K, torch.bfloat16, "cpu")
    assert kept.bytes == 0
    assert kept.bytes_per_position == 2 * LAYERS * G * K * 2
    kept.reserve(3, 5)
    taken = sum(tensor.untyped_storage().nbytes() for tensor in (*kept.key, *kept.value))
    assert kept.bytes == taken == 15 * kept.bytes_per_position
    assert bytes_per_position(32, 32, 128, torch.bfloat16) == 524288  # LLaDA-8B: half a megabyte a position


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_keep_moves_rows_to_their_new_places(stay: list[bool]) -> None:
    kept = filled(len(stay), 4)
    old = all_of(kept)
    index = compacted(len(stay), [row for row, goes_on in enumerate(stay) if not goes_on])
    assert sorted(index) == [row for row, goes_on in enumerate(stay) if goes_on]
    # fewest: only the holes among the first places are filled
    assert sum(place != row for place, row in enumerate(index)) == stay[: len(index)].count(False)
    kept.keep(index)
    for was, now in zip(old, all_of(kept), strict=True):
        assert torch.equal(now[: len(index)], was[index])


@given(st.permutations(range(5)), st.integers(0, 5))
def test_keep_takes_any_order(order: list[int], count: int) -> None:
    kept = filled(5, 4)
    old = all_of(kept)
    kept.keep(order[:count], length=3)
    for was, now in zip(old, all_of(kept), strict=True):
        assert torch.equal(now[:count, :, :3], was[order[:count]][:, :, :3])


class Copies(TorchDispatchMode):
    """Counts the numbers that are put into tensors by index."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::index_put_":
            self.numbers += args[2].numel()
        return func(*args, **(kwargs or {}))


def test_keep_copies_only_what_moves() -> None:
    kept = filled(6, 4)
    with Copies() as copies:
        kept.keep([0, 1, 2])
    assert copies.numbers == 0
    with Copies() as copies:
        kept.keep([0, 5, 2, 3], length=3)
    assert copies.numbers == 2 * LAYERS * G * 3 * K  # one row, three positions


@pytest.mark.parametrize("index", [[0, 0], [3], [-1]])
def test_keep_refuses_places_that_are_not_there(index: list[int]) -> None:
    kept = filled(3, 2)
    with pytest.raises(OptionError, match="each number is a place from 0 to 2, and comes once"):
        kept.keep(index)
