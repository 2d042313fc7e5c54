"""The trace: replaying it gives every canvas on the way."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dllm.errors import DataError
from dllm.sampling.trace import StepEvent, Trace

M = 9


def event(step: int, *commits: tuple[int, int, int]) -> StepEvent:
    rows, positions, tokens = (torch.tensor(part) for part in zip(*commits, strict=True))
    return StepEvent(step, rows, positions, tokens, torch.full((len(commits),), 0.5))


@pytest.fixture
def trace() -> Trace:
    start = [torch.tensor([5, M, M]), torch.tensor([M]), torch.tensor([7, 8])]
    return Trace(start, [event(0, (0, 2, 3), (1, 0, 4)), event(1, (0, 1, 6))])


def test_frames_begin_with_the_masks_and_show_each_step_that_changed_the_row(trace: Trace) -> None:
    assert [frame.tolist() for frame in trace.frames(0)] == [[5, M, M], [5, M, 3], [5, 6, 3]]
    assert [frame.tolist() for frame in trace.frames(1)] == [[M], [4]]
    assert [frame.tolist() for frame in trace.frames(2)] == [[7, 8]]


def test_frames_are_copies(trace: Trace) -> None:
    for frame in trace.frames(0):
        frame.fill_(0)
    assert [frame.tolist() for frame in trace.frames(0)] == [[5, M, M], [5, M, 3], [5, 6, 3]]


def test_commit_steps_tell_when_and_leave_given_tokens_out(trace: Trace) -> None:
    assert trace.commit_steps(0).tolist() == [-1, 1, 0]
    assert trace.commit_steps(1).tolist() == [0]
    assert trace.commit_steps(2).tolist() == [-1, -1]


def test_a_trace_has_events_of_its_own() -> None:
    one, two = Trace([]), Trace([])
    one.events.append(event(0, (0, 0, 0)))
    assert two.events == []


def same(a: Trace, b: Trace) -> bool:
    assert [row.tolist() for row in a.start] == [row.tolist() for row in b.start]
    assert len(a.events) == len(b.events)
    for one, two in zip(a.events, b.events, strict=True):
        for name in StepEvent._fields:
            left, right = getattr(one, name), getattr(two, name)
            assert type(left) is type(right)
            if isinstance(left, torch.Tensor):
                assert left.dtype == right.dtype
                assert torch.equal(left, right)
            else:
                assert left == right
    return True


def test_json_gives_the_same_trace_back(trace: Trace) -> None:
    trace.events[0] = trace.events[0]._replace(confidence=torch.tensor([0.1, 1 / 3]))  # no short decimals
    trace.events.append(event(2, (0, 1, 6))._replace(confidence=torch.tensor([1.0])))
    trace.events.append(
        StepEvent(3, *(torch.tensor([], dtype=torch.int64) for _ in range(3)), torch.tensor([], dtype=torch.float32))
    )
    assert same(Trace.from_json(json.loads(json.dumps(trace.to_json()))), trace)
    assert same(Trace.from_json(trace.to_json() | {"titles": ["a"]}), trace)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], 'a trace is a JSON object with "format": "dllm.trace/1"'),
        ({"start": []}, "This is no trace"),
        ({"format": "dllm.trace/1"}, "This trace is damaged: KeyError: 'start'"),
        ({"format": "dllm.trace/1", "start": [["a"]], "events": []}, "This trace is damaged: "),
        ({"format": "dllm.trace/1", "start": [], "events": [{"stepz": 1}]}, "This trace is damaged: TypeError"),
        ({"format": "dllm.trace/1", "start": [], "events": [3]}, "This trace is damaged: AttributeError"),
    ],
)
def test_what_is_no_trace_is_an_error(found: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Trace.from_json(found)


def test_joined_traces_have_the_rows_one_after_the_other(trace: Trace) -> None:
    other = Trace([torch.tensor([M, 1])], [event(0, (0, 0, 2))])
    whole = Trace.joined([other, trace, other])
    assert len(whole.start) == 5
    assert [frame.tolist() for frame in whole.frames(0)] == [[M, 1], [2, 1]]
    assert [frame.tolist() for frame in whole.frames(1)] == [frame.tolist() for frame in trace.frames(0)]
    assert [frame.tolist() for frame in whole.frames(2)] == [frame.tolist() for frame in trace.frames(1)]
    assert [frame.tolist() for frame in whole.frames(4)] == [[M, 1], [2, 1]]
    steps = [one.step for one in whole.events]
    assert steps == sorted(set(steps)), "steps of one number are one event"
    assert len(trace.start) == 3, "what is joined stays as it was"
    assert trace.events[0].row.tolist() == [0, 1]


def test_a_mask_that_becomes_several_moves_what_follows() -> None:
    grown = event(0, (0, 1, 6), (1, 0, 4))._replace(
        grown_row=torch.tensor([0]), grown_position=torch.tensor([2]), grown_count=torch.tensor([2])
    )
    trace = Trace([torch.tensor([5, M, M, M]), torch.tensor([M])], [grown, event(1, (0, 5, 7)), event(2, (0, 3, 8))])
    assert [frame.tolist() for frame in trace.frames(0)] == [
        [5, M, M, M],
        [5, 6, M, M, M, M],
        [5, 6, M, M, M, 7],
        [5, 6, M, 8, M, 7],
    ]
    assert [frame.tolist() for frame in trace.frames(1)] == [[M], [4]]
    assert trace.commit_steps(0).tolist() == [-1, 0, -1, 2, -1, 1]
    assert [frame.tolist() for frame in trace.stretched().frames(0)] == [
        [5, M, M, M, M, M],
        [5, 6, M, M, M, M],
        [5, 6, M, M, M, 7],
        [5, 6, M, 8, M, 7],
    ]
    assert same(Trace.from_json(json.loads(json.dumps(trace.to_json()))), trace)
    both = Trace.joined([Trace([torch.tensor([M])]), trace])
    assert [frame.tolist() for frame in both.frames(1)] == [frame.tolist() for frame in trace.frames(0)]


def test_growth_before_a_step_moves_no_token_of_it_that_stands_before() -> None:
    first = event(0, (0, 2, 3))._replace(
        grown_row=torch.tensor([0]), grown_position=torch.tensor([1]), grown_count=torch.tensor([1])
    )
    last = event(1, (0, 0, 6))._replace(
        grown_row=torch.tensor([0]), grown_position=torch.tensor([1]), grown_count=torch.tensor([1])
    )
    trace = Trace([torch.tensor([M, M, M])], [first, last])
    assert list(trace.frames(0))[-1].tolist() == list(trace.stretched().frames(0))[-1].tolist() == [6, M, M, M, 3]
