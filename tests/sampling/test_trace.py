"""The trace: replaying it gives every canvas on the way."""

from __future__ import annotations

import pytest
import torch

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
