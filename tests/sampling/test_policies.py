"""Which candidates are committed."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dllm.sampling.policies import most_confident

confidences = st.sampled_from([-2.0, -1.5, 0.0, 0.25, 0.5, 1.0]) | st.floats(-2, 1, width=32)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    count, length = draw(st.integers(1, 4)), draw(st.integers(1, 10))
    size = {"min_size": count * length, "max_size": count * length}
    confidence = torch.tensor(draw(st.lists(confidences, **size)), dtype=torch.float32).view(count, length)
    open_places = torch.tensor(draw(st.lists(st.booleans(), **size))).view(count, length)
    return confidence, open_places, torch.tensor(draw(st.lists(st.integers(0, 12), min_size=count, max_size=count)))


@given(rows())
def test_the_most_confident_and_of_equal_ones_the_leftmost(case: tuple[Tensor, Tensor, Tensor]) -> None:
    confidence, open_places, count = case
    chosen = most_confident(confidence, open_places, count)
    for row in range(len(confidence)):
        places = [place for place in range(confidence.shape[1]) if open_places[row, place]]
        best = sorted(places, key=lambda place: (-confidence[row, place].item(), place))[: int(count[row])]
        assert chosen[row].nonzero()[:, 0].tolist() == sorted(best)


@given(rows())
def test_what_is_closed_plays_no_part_and_only_the_order_matters(case: tuple[Tensor, Tensor, Tensor]) -> None:
    confidence, open_places, count = case
    chosen = most_confident(confidence, open_places, count)
    for closed in (-torch.inf, torch.nan, 9.0):
        assert torch.equal(most_confident(confidence.masked_fill(~open_places, closed), open_places, count), chosen)
    # doubling is exact, so no two numbers become equal
    assert torch.equal(most_confident(confidence * 2 - 0.0, open_places, count), chosen)
    assert torch.equal(most_confident(confidence.double() ** 3, open_places, count), chosen)


@given(rows())
def test_a_row_does_not_depend_on_its_company(case: tuple[Tensor, Tensor, Tensor]) -> None:
    confidence, open_places, count = case
    chosen = most_confident(confidence, open_places, count)
    for row in range(len(confidence)):
        alone = most_confident(confidence[row : row + 1], open_places[row : row + 1], count[row : row + 1])
        assert torch.equal(alone[0], chosen[row])
    wide = (torch.nn.functional.pad(confidence, (0, 3), value=5.0), torch.nn.functional.pad(open_places, (0, 3)), count)
    assert torch.equal(most_confident(*wide)[:, :-3], chosen)
