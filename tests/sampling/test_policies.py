"""Which candidates are committed: each policy against its rule, and what holds for all of them."""

from __future__ import annotations

import inspect
import itertools
import math
from functools import cache
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.policies import RULES, Outcome, Row, single
from torch import Tensor

from dllm.sampling.config import POLICY_OPTIONS, SamplingConfig
from dllm.sampling.policies import POLICIES, most_confident
from dllm.sampling.statistics import Statistics

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


# --- the policies

EXACT = [0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.9, 0.92, 1.0]  # with the thresholds below among them
OPTIONS: dict[str, list[dict[str, float]]] = {
    "fixed": [{}],
    "threshold": [{"threshold": x} for x in (0.9, 0.4, 0.0, 1.0)],
    "factor": [{"factor": x} for x in (1.0, 0.25, 0.0, 3.0, 8.0)],
    "entropy_bound": [{"gamma": x} for x in (0.1, 0.6, 0.0, 5.0)],
    "klass": [
        {"threshold": threshold, "kl_threshold": kl_threshold, "kl_steps": kl_steps}
        for threshold, kl_threshold, kl_steps in ((0.6, 0.015, 2), (0.25, 1.0, 1), (0.0, 0.015, 3))
    ],
    "wino": [{"threshold": x, "verify_threshold": y} for x, y in ((0.7, 0.9), (0.25, 0.5), (0.0, 1.0))],
    "hierarchical": [{"threshold": x, "low_threshold": y} for x, y in ((0.92, 0.5), (0.6, 0.25), (1.0, 0.0))],
    "remdm": [{"eta": x} for x in (0.1, 0.5, 1.0, 0.0)],
}
few = settings(max_examples=40)  # of up to four rows each
every_policy = pytest.mark.parametrize("name", POLICIES)


class Case(NamedTuple):
    rows: list[Row]
    options: dict[str, float]


def numbers(random: Random, width: int, examples: list[float], high: float) -> list[float]:
    """Some of the examples and some between them, all of which fp32 holds."""
    drawn = [random.choice(examples) if random.random() < 0.6 else random.uniform(0, high) for _ in range(width)]
    return np.array(drawn, dtype=np.float32).tolist()


def block(name: str, random: Random, width: int) -> Row:
    """The places of a row's block: with ties, gaps between positions, and none, some or all of them open."""
    state = random.choices(random.choice(["oooccx", "o", "oc", "cx"]), k=width)  # open, committed, neither
    confidence = numbers(random, width, EXACT, 1)
    if random.random() < 0.5:
        confidence = [random.choice([x, x, x - 2]) for x in confidence]  # where ends come last, they are 2 lower
    verified = numbers(random, width, EXACT, 1)
    return Row(
        open=[x == "o" for x in state],
        confidence=[single(x) for x in confidence],
        entropy=numbers(random, width, [0.0, 0.05, 0.1, 0.3, 0.6], 12),
        change=numbers(random, width, [0.0, 0.0149, 0.015, 1.0, math.inf], 2),
        verified=[x if place == "c" else 0.0 for x, place in zip(verified, state, strict=True)],
        committed=[x == "c" for x in state],
        position=list(itertools.accumulate(random.choices([1, 1, 1, 2, 7], k=width))),
        memory=random.choices([0.0, 1.0, 2.0], k=width) if name == "klass" else numbers(random, width, EXACT, 1),
        count=random.randint(0, width + 2),
    )


@cache
def cases(name: str) -> st.SearchStrategy[Case]:
    """One to four rows of up to nine places, and the policy's options. What is in the rows hangs on a seed: that is fast."""

    def make(seed: int, widths: list[int], options: dict[str, float]) -> Case:
        random = Random(seed)
        return Case([block(name, random, width) for width in widths], options)

    widths = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    return st.builds(make, st.integers(0, 2**32), widths, st.sampled_from(OPTIONS[name]))


def stacked(rows: list[Row], padding: int = 0) -> tuple[Statistics, Tensor, Tensor]:
    """Rows side by side, as the loop gives them: -inf where not open, padded on the right with places of no row."""
    width = max(len(row.open) for row in rows) + padding

    def table(field: str, fill: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(row, field) + [fill] * (width - len(row.open)) for row in rows], dtype=dtype)

    open_places = table("open", False, torch.bool)
    statistics = Statistics(
        open_RW=open_places,
        token_RW=torch.zeros(len(rows), width, dtype=torch.int64),
        confidence_RW=table("confidence", 0.5, torch.float32).masked_fill(~open_places, -torch.inf),
        entropy_RW=table("entropy", 0.0, torch.float32),
        change_RW=table("change", 0.0, torch.float32),
        verified_RW=table("verified", 0.0, torch.float32),
        committed_RW=table("committed", False, torch.bool),
        position_RW=table("position", 0, torch.int64),
    )
    return statistics, table("memory", 0.0, torch.float32), torch.tensor([row.count for row in rows])


def decide(name: str, rows: list[Row], options: dict[str, float], padding: int = 0) -> list[Outcome]:
    """What a policy decides for each row, without the padding, which has to be left alone."""
    statistics, memory, count = stacked(rows, padding)
    decision = POLICIES[name].decide(statistics, memory, count, **options)
    assert (decision.remask_RW is not None) == POLICIES[name].revocable
    remask = torch.zeros_like(decision.commit_RW) if decision.remask_RW is None else decision.remask_RW
    assert decision.commit_RW.dtype == remask.dtype == torch.bool
    assert decision.memory_RW.dtype == torch.float32
    assert decision.commit_RW.shape == remask.shape == decision.memory_RW.shape == statistics.open_RW.shape
    found = []
    for row, commit, again, kept in zip(rows, decision.commit_RW, remask, decision.memory_RW, strict=True):
        width = len(row.open)
        assert not commit[width:].any()
        assert not again[width:].any()
        found.append(Outcome(commit.nonzero()[:, 0].tolist(), again.nonzero()[:, 0].tolist(), kept[:width].tolist()))
    return found


@every_policy
@given(st.data())
def test_a_policy_is_its_rule_row_by_row(name: str, data: st.DataObject) -> None:
    rows, options = data.draw(cases(name))
    assert decide(name, rows, options) == [RULES[name](row, **options) for row in rows]


@every_policy
@few
@given(st.data())
def test_a_decision_does_not_depend_on_company(name: str, data: st.DataObject) -> None:
    rows, options = data.draw(cases(name))
    together = decide(name, rows, options)
    assert together == [decide(name, [row], options)[0] for row in rows]
    assert together == decide(name, rows[::-1], options)[::-1] == decide(name, rows, options, padding=3)


@every_policy
@few
@given(st.data())
def test_a_step_commits_masks_alone_and_more_than_it_takes_back(name: str, data: st.DataObject) -> None:
    rows, options = data.draw(cases(name))
    for row, found in zip(rows, decide(name, rows, options), strict=True):
        assert set(found.commit) <= set(row.masks())
        assert set(found.remask) <= set(row.written())
        assert bool(found.commit) == any(row.open)
        assert len(found.remask) < max(1, len(found.commit))


@every_policy
@few
@given(st.data())
def test_closed_places_play_no_part(name: str, data: st.DataObject) -> None:
    (row, *_), options = data.draw(cases(name))
    (found,) = decide(name, [row], options)
    statistics, memory, count = stacked([row])
    closed = ~statistics.open_RW
    for value in (9.0, 0.0, torch.nan):
        changed = statistics._replace(
            confidence_RW=statistics.confidence_RW.masked_fill(closed, -torch.inf),
            entropy_RW=statistics.entropy_RW.masked_fill(closed, value),  # type: ignore[union-attr]
            change_RW=statistics.change_RW.masked_fill(closed, value),  # type: ignore[union-attr]
            verified_RW=statistics.verified_RW.masked_fill(~statistics.committed_RW, value),  # type: ignore[union-attr]
        )
        commit, remask, kept = POLICIES[name].decide(changed, memory, count, **options)
        assert commit[0].nonzero()[:, 0].tolist() == found.commit
        assert (remask[0].nonzero()[:, 0].tolist() if remask is not None else []) == found.remask
        assert kept[0].tolist() == found.memory


@every_policy
@few
@given(st.data())
def test_nothing_is_read_back_to_the_host(refuses_reads: Any, name: str, data: st.DataObject) -> None:
    rows, options = data.draw(cases(name))
    statistics, memory, count = stacked(rows)
    with refuses_reads():
        POLICIES[name].decide(statistics, memory, count, **options)


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
        lambda x: torch.equal(x, x),
        lambda x: torch.where(x > 0),
        lambda x: x.to("meta"),
    ],
)
def test_reading_back_would_be_seen(refuses_reads: Any, reads: Any) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the device"), refuses_reads():
        reads(x)


@every_policy
def test_nothing_depends_on_values_that_are_not_there(name: str) -> None:
    """On the meta device there are shapes and no values: what looks at one fails, tolist() too."""
    statistics, memory, count = stacked([Row([True], [0.5], [0.1], [0.1], [0.0], [False], [1], [0.0], 1)] * 2)
    nowhere = Statistics(*(x.to("meta") for x in statistics))  # type: ignore[union-attr]
    decision = POLICIES[name].decide(nowhere, memory.to("meta"), count.to("meta"), **OPTIONS[name][0])
    assert decision.commit_RW.shape == (2, 1)


@every_policy
@few
@given(st.integers(0, 2**32), st.integers(1, 8), st.data())
def test_a_block_ends_in_as_many_steps_as_it_has_masks(name: str, seed: int, width: int, data: st.DataObject) -> None:
    """Played to the end on statistics that are drawn anew at every step, however they come."""
    options, random = data.draw(st.sampled_from(OPTIONS[name])), Random(seed)
    row = block(name, random, width)._replace(open=[True] * width, committed=[False] * width, memory=[0.0] * width)
    steps = 0
    while any(row.open):
        (found,) = decide(name, [row], options)
        is_open = [(x and i not in found.commit) or i in found.remask for i, x in enumerate(row.open)]
        row = block(name, random, width)._replace(open=is_open, committed=[not x for x in is_open], memory=found.memory)
        steps += 1
        assert steps <= width


@given(st.data())
def test_remdm_leaves_as_many_masks_as_the_fixed_schedule(data: st.DataObject) -> None:
    rows, options = data.draw(cases("remdm"))
    for found, plain in zip(decide("remdm", rows, options), decide("fixed", rows, {}), strict=True):
        assert len(found.commit) - len(found.remask) == len(plain.commit)


# --- what single policies are about, by hand


def one(open_places: str, confidence: list[float], **fields: Any) -> Row:
    """A row of `o` open, `c` committed and `x` other places."""
    width = len(open_places)
    row = Row(
        open=[x == "o" for x in open_places],
        confidence=confidence,
        entropy=[0.0] * width,
        change=[math.inf] * width,
        verified=[0.0] * width,
        committed=[x == "c" for x in open_places],
        position=list(range(width)),
        memory=[0.0] * width,
        count=1,
    )
    return row._replace(**fields)


@pytest.mark.parametrize(
    ("name", "options", "row", "commit", "remask"),
    [
        ("fixed", {}, one("oooo", [0.1, 0.4, 0.4, 0.2], count=2), [1, 2], []),
        ("threshold", {"threshold": 0.9}, one("oooo", [0.9, 0.89, 0.95, 0.1]), [0, 2], []),
        ("threshold", {"threshold": 0.9}, one("oxoo", [0.3, 0.99, 0.5, 0.5]), [2], []),
        # (2) 0.2 = 0.4, (3) 0.25 = 0.75, (4) 0.3 = 1.2: two; with factor 1.3 three
        ("factor", {"factor": 1.0}, one("ooo", [0.75, 0.8, 0.7]), [0, 1], []),
        ("factor", {"factor": 1.3}, one("ooo", [0.75, 0.8, 0.7]), [0, 1, 2], []),
        # the third alone would fail, and the fourth, sure as it is, comes before it
        ("factor", {"factor": 1.0}, one("oooo", [1.0, 0.5, 1.0, 0.9]), [0, 2, 3], []),
        # 0; 0.04; 0.04 + 0.05; 0.04 + 0.05 + 0.3
        ("entropy_bound", {"gamma": 0.1}, one("oooo", [0.5] * 4, entropy=[0.3, 0.05, 0.04, 2.0]), [0, 1, 2], []),
        ("entropy_bound", {"gamma": 0.0}, one("oooo", [0.5] * 4, entropy=[0.3, 0.0, 0.0, 2.0]), [0, 1, 2], []),
        ("entropy_bound", {"gamma": 0.0}, one("ooo", [0.5] * 3, entropy=[0.3, 0.2, 0.2]), [1], []),
        # an end that comes last waits, however little its entropy
        ("entropy_bound", {"gamma": 9.0}, one("ooo", [0.5, -1.0, 0.4], entropy=[0.3, 0.0, 0.2]), [0, 2], []),
        # stable but unsure, stable and sure, sure but changing
        (
            "klass",
            {"threshold": 0.6, "kl_threshold": 0.015, "kl_steps": 2},
            one("ooo", [0.5, 0.7, 0.9], change=[0.0, 0.01, 0.02], memory=[1.0, 1.0, 1.0]),
            [1],
            [],
        ),
        # at a block's first step nothing is stable
        ("klass", {"threshold": 0.6, "kl_threshold": 0.015, "kl_steps": 1}, one("oo", [0.7, 0.9]), [1], []),
        # two are committed, so one of the three doubted ones goes
        (
            "wino",
            {"threshold": 0.7, "verify_threshold": 0.9},
            one("ococco", [0.8, 0, 0.9, 0, 0, 0.1], verified=[0, 0.5, 0, 0.3, 0.95, 0]),
            [0, 2],
            [3],
        ),
        (
            "wino",
            {"threshold": 0.7, "verify_threshold": 0.9},
            one("oc", [0.8, 0], verified=[0, 0.0]),
            [0],
            [],
        ),
        # runs 0-1, 3, 5-6 (a gap between 6 and 7), 7
        (
            "hierarchical",
            {"threshold": 0.92, "low_threshold": 0.5},
            one(
                "ooxoxooo",
                [0.6, 0.7, 0.99, 0.4, 0.0, 0.95, 0.93, 0.51],
                position=[0, 1, 2, 3, 4, 5, 6, 9],
            ),
            [1, 5, 6, 7],
            [],
        ),
        # four are written, a half of them is 2, but only 3 - 2 = 1 may go; position 4 was the least sure
        (
            "remdm",
            {"eta": 0.5},
            one("ooocccc", [0.3, 0.2, 0.1, 0, 0, 0, 0], memory=[0, 0, 0, 0.9, 0.5, 0.6, 0.8], count=2),
            [0, 1, 2],
            [4],
        ),
    ],
)
def test_by_hand(name: str, options: dict[str, float], row: Row, commit: list[int], remask: list[int]) -> None:
    (found,) = decide(name, [row], options)
    assert (found.commit, found.remask) == (commit, remask)


def test_klass_counts_steps_in_succession() -> None:
    options = {"threshold": 0.0, "kl_threshold": 0.015, "kl_steps": 2}
    row = one("ooo", [0.3, 0.2, 0.1])
    lengths = []
    for change in (math.inf, 0.01, 0.02, 0.01, 0.01):
        (found,) = decide("klass", [row._replace(change=[change] * 3)], options)
        row = row._replace(memory=found.memory)
        lengths.append(found.memory[0])
    assert lengths == [0, 1, 0, 1, 2]
    assert found.commit == [0, 1, 2]


@pytest.mark.parametrize("name", ["threshold", "factor", "klass", "wino", "hierarchical"])
@few
@given(st.data())
def test_ends_that_come_last_are_committed_alone(name: str, data: st.DataObject) -> None:
    rows, _ = data.draw(cases(name))
    options = SamplingConfig(policy=name).policy_options  # type: ignore[arg-type]
    for row, found in zip(rows, decide(name, rows, options), strict=True):
        if any(row.confidence[place] < 0 for place in found.commit):
            assert len(found.commit) == 1
            assert all(row.confidence[place] < 0 for place in row.masks())


def test_the_table_is_that_of_the_settings() -> None:
    assert tuple(POLICIES) == tuple(POLICY_OPTIONS) == tuple(RULES) == tuple(OPTIONS)
    for name, policy in POLICIES.items():
        parameters = inspect.signature(policy.decide).parameters.values()
        options = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        assert options == list(POLICY_OPTIONS[name])
        fields = {"entropy": "entropy_RW", "change": "change_RW", "verified": "verified_RW"}
        statistics, memory, count = stacked([one("oc", [0.5, 0.5])])
        only = statistics._replace(**{field: None for need, field in fields.items() if need not in policy.needs})
        policy.decide(only, memory, count, **POLICY_OPTIONS[name])  # what it does not name it does not look at
        for need in policy.needs:
            with pytest.raises(ValueError, match=f"{fields[need]} is missing"):
                policy.decide(only._replace(**{fields[need]: None}), memory, count, **POLICY_OPTIONS[name])
