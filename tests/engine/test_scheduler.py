"""Continuous batching: whatever comes and goes, a request has the tokens that it has alone, and nothing is left behind."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tiny
from reference.predictor import HashPredictor, as_network
from reference.tiny import EOS, MASK, TOKENS, request_of

from dllm.engine.buffers import KeyValues
from dllm.engine.caching import Caching, caching
from dllm.engine.scheduler import Scheduler
from dllm.engine.tickets import Cancelled, CommittedBlock, Ticket
from dllm.errors import NonFiniteError, OptionError
from dllm.pipelines.llada.generate import network_of
from dllm.sampling.config import POLICY_OPTIONS, SamplingConfig
from dllm.sampling.loop import denoise
from dllm.sampling.network import Network, Pass
from dllm.sampling.rows import Request
from dllm.sampling.trace import StepEvent

PATIENCE = 60
"""Seconds after which a thread that has not ended never will."""
WHOLE = SamplingConfig(early_stop=False)


def quick(**options: Any) -> Scheduler:
    """Over a network that is fast, for requests without guidance."""
    return Scheduler(as_network(HashPredictor(tiny.V - 4)), TOKENS, "cpu", **options)


def real(model: Any = None, **options: Any) -> Scheduler:
    model = model or tiny.tiny_model()
    return Scheduler(network_of(model), TOKENS, "cpu", reuse=lambda config: caching(config, model), **options)


def alone(request: Request, model: Any = None) -> list[int]:
    model = model or tiny.tiny_model()
    done = denoise(network_of(model), [request], request.config, TOKENS, reuse=caching(request.config, model))
    return done.canvases[0].tolist()


def quickly_alone(request: Request) -> list[int]:
    return denoise(as_network(HashPredictor(tiny.V - 4)), [request], request.config, TOKENS).canvases[0].tolist()


def canvas(ticket: Ticket) -> list[int]:
    return ticket.answer().canvas.tolist()


def idle(scheduler: Scheduler) -> bool:
    """Nothing is left of any request."""
    return not (scheduler.waiting or scheduler.running or scheduler._batches or scheduler._rooms)


def spied(network: Network, before: Callable[[Pass], object]) -> Network:
    def spying(work: Pass, readout: Any) -> Any:
        before(work)
        return network(work, readout)

    return spying


def in_threads(*works: Callable[[], object]) -> list[Any]:
    """What each gives, or the error that it raises."""
    found: list[Any] = [None] * len(works)

    def run(i: int) -> None:
        try:
            found[i] = works[i]()
        except Exception as error:  # noqa: BLE001 - it is what is looked at
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it waits for ever"
    return found


# --- tokens do not depend on company


@settings(max_examples=6)
@given(st.data())
def test_tokens_are_those_alone_whoever_comes_and_goes(data: st.DataObject) -> None:
    scheduler = real(max_rows=data.draw(st.integers(2, 5)))
    tickets: list[Ticket] = []
    given_up: set[Ticket] = set()
    for _ in range(data.draw(st.integers(1, 5))):
        for _ in range(data.draw(st.integers(0, 3))):
            row, config = data.draw(tiny.canvases()), data.draw(tiny.configs())
            tickets.append(scheduler.submit(request_of(row, config, len(tickets)), watch=data.draw(st.booleans())))
        if tickets and data.draw(st.booleans()):
            ticket = data.draw(st.sampled_from(tickets))
            if not ticket.done:
                ticket.cancel()
                given_up.add(ticket)
        for _ in range(data.draw(st.integers(0, 4))):
            scheduler.step()
    for ticket in tickets:
        if ticket in given_up:
            with pytest.raises(Cancelled):
                ticket.answer()
        else:
            assert canvas(ticket) == alone(ticket.request)
    scheduler.step()
    assert idle(scheduler)


@pytest.mark.parametrize("policy", POLICY_OPTIONS)
def test_the_slow_sampler_agrees(policy: Any) -> None:
    scheduler = real(max_rows=3)
    rows = [[first, 2, 3][: first % 4] + [MASK] * (3 + first) for first in range(5)]
    configs = [
        SamplingConfig(policy=policy, block_length=2 + i % 3, seed=i, cache="dual" if i % 2 else "none")
        for i in range(5)
    ]
    tickets = [scheduler.submit(request_of(*pair, i)) for i, pair in enumerate(zip(rows, configs, strict=True))]
    for i, ticket in enumerate(tickets):
        slow = tiny.slowly(rows[i], configs[i], i)
        assert (canvas(ticket), ticket.answer().steps) == (slow.ids, slow.steps)


def test_rows_join_while_others_are_at_work_and_none_waits_for_another() -> None:
    scheduler = quick(max_rows=2)
    long, short, late = (scheduler.submit(request_of([1] + [MASK] * n, WHOLE, n)) for n in (9, 2, 3))
    for _ in range(2):
        scheduler.step()
    assert (short.done, long.done, scheduler.running, scheduler.waiting) == (True, False, 1, 1)
    for _ in range(3):
        scheduler.step()
    assert (late.done, long.done) == (True, False)
    for ticket in (long, short, late):
        assert canvas(ticket) == quickly_alone(ticket.request)
    assert scheduler.nfe == 9
    assert scheduler.most_rows == 2


def test_the_line_is_kept_in_order() -> None:
    scheduler = quick(max_rows=1)
    tickets = [scheduler.submit(request_of([1, MASK], WHOLE)) for _ in range(4)]
    for done in range(4):
        assert [ticket.done for ticket in tickets] == [i < done for i in range(4)]
        scheduler.step()


def test_what_has_no_masks_is_answered_at_once() -> None:
    scheduler = quick()
    ticket = scheduler.submit(request_of([1, 2], WHOLE))
    assert ticket.done
    assert (canvas(ticket), ticket.answer().steps, list(ticket)) == ([1, 2], 0, [])
    assert scheduler.nfe == 0


# --- what a ticket tells


@settings(max_examples=6)
@given(tiny.canvases(), tiny.configs())
def test_blocks_come_in_order_and_steps_replay_to_the_answer(row: list[int], config: SamplingConfig) -> None:
    scheduler = real()
    other = scheduler.submit(request_of([3] * 4 + [MASK] * 7, replace(config, block_length=2), 7), watch=True)
    ticket = scheduler.submit(request_of(row, config, 1), watch=True)
    events = list(ticket)
    answer = ticket.answer()
    final = answer.canvas.tolist()
    masks = [place for place, token in enumerate(row) if token == MASK]
    blocks = [event for event in events if isinstance(event, CommittedBlock)]
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [place for block in blocks for place in block.position.tolist()] == masks
    assert [token for block in blocks for token in block.token.tolist()] == [final[place] for place in masks]
    width = config.block_length or len(masks)
    assert [len(block.position) for block in blocks[:-1]] == [width] * (len(blocks) - 1)
    assert [event.step for event in steps] == list(range(answer.steps))
    shown = list(row)
    for event in steps:
        assert event.row.tolist() == [0] * len(event.position)
        for position, token in zip(event.position.tolist(), event.token.tolist(), strict=True):
            shown[position] = token
    left = [place for place in masks if shown[place] == MASK]
    assert not left or config.early_stop
    assert [EOS if place in left else token for place, token in enumerate(shown)] == final
    assert answer.seconds > 0
    list(other)


def test_a_block_is_told_of_as_soon_as_it_is_complete() -> None:
    scheduler = quick()
    ticket = scheduler.submit(request_of([MASK] * 5, replace(WHOLE, block_length=2)))
    told = []
    for event in ticket:
        told.append((event.position.tolist(), scheduler.nfe))
        assert len(event.position) == len(event.token)
    assert told == [([0, 1], 2), ([2, 3], 4), ([4], 5)]


def test_a_ticket_may_be_read_late_and_by_default_tells_no_steps() -> None:
    scheduler = quick()
    ticket = scheduler.submit(request_of([MASK] * 4, replace(WHOLE, block_length=2)))
    loud = scheduler.submit(request_of([MASK] * 4, WHOLE, 1), watch=True)
    ticket.answer()
    assert [type(event) for event in ticket] == [CommittedBlock] * 2
    assert list(ticket) == []  # each is told once
    assert sum(isinstance(event, StepEvent) for event in loud) == 4


# --- cancelling


def test_a_ticket_knows_how_far_it_is_and_how_long_it_stood_in_line() -> None:
    scheduler = quick(max_rows=1)
    first, second = (scheduler.submit(request_of([1] + [MASK] * 4, WHOLE, number)) for number in range(2))
    filled = []
    while scheduler.step():
        filled.append((first.filled, second.filled))
    assert filled == [(1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert second.filled == 4
    assert first.answer().waited < second.answer().waited < second.answer().seconds


def test_cancelling_frees_the_row_and_the_place_in_line() -> None:
    scheduler = quick(max_rows=1)
    first, second, third = (scheduler.submit(request_of([1] + [MASK] * 5, WHOLE, n)) for n in range(3))
    scheduler.step()
    first.cancel()
    assert (scheduler.running, scheduler.waiting) == (0, 2)
    second.cancel()
    assert scheduler.waiting == 1
    first.cancel()
    assert canvas(third) == quickly_alone(third.request)
    third.cancel()  # it is done: nothing happens to it
    assert canvas(third)
    for ticket in (first, second):
        with pytest.raises(Cancelled, match="The request was cancelled"):
            ticket.answer()
        with pytest.raises(Cancelled):
            list(ticket)
    assert idle(scheduler)


def test_another_thread_cancels_without_waiting_for_the_forward() -> None:
    inside, go_on = threading.Event(), threading.Event()
    rows: list[int] = []

    def hold(work: Pass) -> None:
        rows.append(len(work.tokens_P))
        inside.set()
        assert go_on.wait(PATIENCE)

    scheduler = Scheduler(spied(as_network(HashPredictor(tiny.V - 4)), hold), TOKENS, "cpu")
    config = replace(WHOLE, block_length=1)
    gone, stays = (scheduler.submit(request_of([1] + [MASK] * 3, config, n)) for n in range(2))
    scheduler.start()
    try:
        assert inside.wait(PATIENCE)
        gone.cancel()  # while the forward is under way
        assert gone.done
        late = scheduler.submit(request_of([MASK], WHOLE, 9))
        go_on.set()
        assert canvas(stays) == quickly_alone(stays.request)
        assert canvas(late) == quickly_alone(late.request)
        with pytest.raises(Cancelled):
            gone.answer()
        assert list(gone._events) == []  # nothing is told of it after its end
    finally:
        scheduler.close()
    assert rows == [2, 2, 1]


# --- threads


def test_many_threads_submit_wait_stream_and_cancel() -> None:
    scheduler = quick(max_rows=3)
    scheduler.start()

    def work(number: int) -> list[bool]:
        good = []
        for i in range(8):
            config = replace(WHOLE, block_length=1 + i % 3, seed=number, temperature=float(i % 2))
            ticket = scheduler.submit(request_of([number] + [MASK] * (1 + i), config, i), watch=i % 3 == 0)
            if i % 4 == 3:
                ticket.cancel()
                continue
            streamed = [list(ticket)] if i % 2 else []
            good.append(canvas(ticket) == quickly_alone(ticket.request) and all(streamed))
        return good

    try:
        assert in_threads(*(lambda number=number: work(number) for number in range(6))) == [[True] * 6] * 6
    finally:
        scheduler.close()
    assert idle(scheduler)


def test_without_a_thread_of_its_own_those_who_wait_take_turns() -> None:
    scheduler = quick(max_rows=2)
    tickets = [scheduler.submit(request_of([n] + [MASK] * 6, WHOLE, n)) for n in range(6)]
    found = in_threads(*(lambda ticket=ticket: canvas(ticket) for ticket in tickets))
    assert found == [quickly_alone(ticket.request) for ticket in tickets]


def test_closing_cancels_what_runs_and_what_waits_and_ends_the_thread() -> None:
    scheduler = quick(max_rows=1)
    scheduler.start()
    scheduler.start()  # there is one thread
    thread = scheduler._thread
    assert thread is not None
    tickets = [scheduler.submit(request_of([1] + [MASK] * 40, WHOLE, n)) for n in range(3)]
    closing = in_threads(*(ticket.answer for ticket in tickets), scheduler.close, scheduler.close)
    assert [type(error) for error in closing] == [Cancelled] * 3 + [type(None)] * 2
    assert not thread.is_alive()
    assert idle(scheduler)
    for call in (lambda: scheduler.submit(request_of([MASK], WHOLE)), scheduler.start):
        with pytest.raises(OptionError, match="This engine is closed"):
            call()
    scheduler.close()


# --- what goes wrong


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", [RuntimeError, KeyError, MemoryError])
def test_a_request_whose_forward_raises_fails_alone(kind: type[Exception], background: bool) -> None:
    def refuse(work: Pass) -> None:
        if bool((work.ids_T == tiny.BAD).any()) and bool((work.ids_T == 5).any()):
            raise kind("such a row")

    scheduler = Scheduler(spied(as_network(HashPredictor(tiny.V - 4)), refuse), TOKENS, "cpu", max_rows=3)
    rows = [[1] + [MASK] * 4, [tiny.BAD, 5] + [MASK] * 4, [2] + [MASK] * 2, [3] + [MASK] * 3]
    tickets = [
        scheduler.submit(request_of(row, replace(WHOLE, block_length=2), n), watch=True) for n, row in enumerate(rows)
    ]
    if background:
        scheduler.start()
    for number, ticket in enumerate(tickets):
        if number == 1:
            with pytest.raises(kind, match="such a row") as caught:
                ticket.answer()
            assert "in refuse" in "".join(caught.value.__notes__)  # where it happened
        else:
            assert canvas(ticket) == quickly_alone(ticket.request)
            assert [event.step for event in ticket if isinstance(event, StepEvent)] == list(
                range(rows[number].count(MASK))
            )
    scheduler.close()
    assert idle(scheduler)


def test_what_is_told_is_not_told_again_when_a_batch_begins_anew() -> None:
    passes: list[int] = []

    def no_memory(work: Pass) -> None:
        passes.append(len(work.tokens_P))
        if len(passes) == 4:
            raise torch.OutOfMemoryError("no memory left")

    scheduler = Scheduler(spied(as_network(HashPredictor(tiny.V - 4)), no_memory), TOKENS, "cpu")
    config = replace(WHOLE, block_length=2)
    tickets = [scheduler.submit(request_of([n] + [MASK] * 6, config, n), watch=True) for n in range(2)]
    for ticket in tickets:
        events = list(ticket)
        assert [event.step for event in events if isinstance(event, StepEvent)] == list(range(6))
        assert [e.position.tolist() for e in events if isinstance(e, CommittedBlock)] == [[1, 2], [3, 4], [5, 6]]
        assert canvas(ticket) == quickly_alone(ticket.request)
    assert passes == [2] * 4 + [1] * 12


def test_a_cache_that_finds_no_memory_fails_nobody_else() -> None:
    class Small(Caching):
        def admit(self, rows: int, positions: int, room: tuple[int, int] | None = None) -> None:
            if positions > 10:
                raise torch.OutOfMemoryError("no memory for that")
            super().admit(rows, positions, room)

    def small(config: SamplingConfig) -> Caching | None:
        made = caching(config, tiny.tiny_model())
        if made is not None:
            made.__class__ = Small
        return made

    scheduler = Scheduler(network_of(tiny.tiny_model()), TOKENS, "cpu", reuse=small)
    dual = replace(WHOLE, cache="dual", block_length=3)
    rows = [([1] + [MASK] * 5, dual), ([2] * 8 + [MASK] * 5, dual), ([3] + [MASK] * 4, WHOLE)]
    tickets = [scheduler.submit(request_of(row, config, n)) for n, (row, config) in enumerate(rows)]
    with pytest.raises(torch.OutOfMemoryError, match="no memory for that"):
        tickets[1].answer()
    for ticket in (tickets[0], tickets[2]):
        assert canvas(ticket) == alone(ticket.request)
    assert idle(scheduler)


@pytest.mark.parametrize("kept", ["none", "dual", "delayed"])
def test_logits_that_are_no_numbers_fail_one_request_and_nobody_who_comes_to_its_place(kept: Any) -> None:
    scheduler = real(tiny.damaged_model(), max_rows=2)
    config = replace(WHOLE, cache=kept, block_length=2)
    rows = [[1, 2] + [MASK] * 4, [3, tiny.BAD, 4] + [MASK] * 9, [5] + [MASK] * 3, [6] * 3 + [MASK] * 4, [7, MASK]]
    tickets = [scheduler.submit(request_of(row, config, n)) for n, row in enumerate(rows)]
    with pytest.raises(NonFiniteError, match=r"logits are not numbers \(NaN or infinite\) at step 0"):
        tickets[1].answer()
    for number in (0, 2, 3, 4):
        assert canvas(tickets[number]) == alone(tickets[number].request)


def test_an_interrupted_step_is_taken_again() -> None:
    passes: list[int] = []

    def interrupt(work: Pass) -> None:
        passes.append(len(work.tokens_P))
        if len(passes) == 3:
            raise KeyboardInterrupt

    scheduler = Scheduler(spied(as_network(HashPredictor(tiny.V - 4)), interrupt), TOKENS, "cpu")
    tickets = [scheduler.submit(request_of([n] + [MASK] * 4, WHOLE, n), watch=True) for n in range(2)]
    with pytest.raises(KeyboardInterrupt):
        tickets[0].answer()
    assert (scheduler.waiting, scheduler.running) == (2, 0)
    for ticket in tickets:
        assert canvas(ticket) == quickly_alone(ticket.request)
        assert [event.step for event in ticket if isinstance(event, StepEvent)] == list(range(4))
    assert passes == [2] * 7


def test_a_fault_of_the_scheduler_itself_reaches_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = quick()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(scheduler, "_let_go", iter(()).__next__)
    ticket = scheduler.submit(request_of([MASK], WHOLE))
    scheduler.start()
    assert [type(error) for error in in_threads(ticket.answer)] == [StopIteration]
    with pytest.raises(OptionError, match="closed"):
        scheduler.submit(request_of([MASK], WHOLE))


# --- memory


def test_thousands_wait_and_few_run() -> None:
    scheduler = quick(max_rows=64)
    made = [weakref.ref(scheduler.submit(request_of([n % 16, MASK], WHOLE, n))) for n in range(3000)]
    kept = scheduler.submit(request_of([1, MASK], WHOLE))
    assert scheduler.waiting == 3001
    canvas(kept)
    assert scheduler.most_rows == 64
    assert scheduler.nfe == -(-3001 // 64)
    assert idle(scheduler)
    gc.collect()
    assert not any(ticket() is not None for ticket in made)


def test_an_error_that_is_kept_keeps_nothing_else() -> None:
    seen: list[weakref.ref[Any]] = []

    def broken(work: Pass, readout: Any) -> Any:
        large = torch.zeros(1000)
        seen.extend([weakref.ref(large), weakref.ref(work.ids_T)])
        try:
            raise ValueError("first")
        except ValueError:
            raise RuntimeError("broken") from None

    scheduler = Scheduler(broken, TOKENS, "cpu")
    ticket = scheduler.submit(request_of([1, MASK], WHOLE))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            ticket.answer()
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)
    assert ticket.done


@settings(max_examples=4)
@given(st.data())
def test_the_buffers_stay_within_the_budget(data: st.DataObject) -> None:
    """Which is one of rectangles: many short rows and then a long one do not add up to many long ones."""
    caches: list[Caching] = []

    def noted(config: SamplingConfig) -> Caching | None:
        made = caching(config, tiny.tiny_model())
        if made is not None:
            caches.append(made)
        return made

    budget, most = 60, [0]

    def measure(work: Pass) -> None:
        alive = {id(c): c for batch in scheduler._batches.values() if isinstance(c := batch.reuse, Caching)}
        most[0] = max(most[0], sum(c.buffers.rows * c.buffers.length for c in alive.values()))
        assert most[0] <= budget

    scheduler = Scheduler(
        spied(network_of(tiny.tiny_model()), measure),
        TOKENS,
        "cpu",
        reuse=noted,
        max_bytes=budget,
        bytes_per_position=lambda config: int(config.cache != "none"),
    )
    dual = replace(WHOLE, cache="dual")  # four short rows leave room for four, and then there is one long row
    tickets = [scheduler.submit(request_of([1] + [MASK] * n, dual, n)) for n in (1, 1, 1, 9)]
    for _ in range(3):
        scheduler.step()
    tickets.append(scheduler.submit(request_of([1] * 15 + [MASK] * 9, dual, 5)))
    canvas(tickets[-1])
    for number in range(10, 10 + data.draw(st.integers(0, 7))):
        row = [1] * data.draw(st.sampled_from([0, 1, 6, 12])) + [MASK] * data.draw(st.integers(1, 5))
        options = data.draw(
            st.sampled_from([{"cache": "dual"}, {"cache": "prefix"}, {"cache": "dual", "policy": "wino"}])
        )
        config = replace(WHOLE, **options, block_length=3, cfg_scale=data.draw(st.sampled_from([0.0, 1.0])))
        tickets.append(scheduler.submit(request_of(row, config, number)))
        for _ in range(data.draw(st.integers(0, 2))):
            scheduler.step()
    for ticket in tickets:
        assert canvas(ticket) == alone(ticket.request)
    assert most[0] > 0
    assert idle(scheduler)


@pytest.mark.parametrize(("max_bytes", "rows_held"), [(float("inf"), [1, 2, 4, 8, 8]), (60, [1, 2, 4, 6])])
def test_rows_that_join_one_by_one_make_new_buffers_few_times(
    max_bytes: float, rows_held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never ones beyond the budget; the last row but one of those that have room is longer than all before."""
    held: list[tuple[int, int]] = []
    reserve = KeyValues.reserve

    def noted(buffers: KeyValues, *args: Any, **kwargs: Any) -> bool:
        anew = reserve(buffers, *args, **kwargs)
        if anew:
            held.append((buffers.rows, buffers.length))
        return anew

    monkeypatch.setattr(KeyValues, "reserve", noted)
    scheduler = real(max_rows=8, max_bytes=max_bytes, bytes_per_position=lambda _: 1)
    dual = replace(WHOLE, cache="dual")
    tickets = []
    for number in range(8):
        length = 12 if number == 6 and max_bytes > 100 else 9
        tickets.append(scheduler.submit(request_of([1] * 2 + [MASK] * (length - 2), dual, number)))
        scheduler.step()
        assert all(rows * positions <= max_bytes for rows, positions in held)
    assert [rows for rows, _ in held] == rows_held
    for ticket in tickets[::3]:
        assert canvas(ticket) == alone(ticket.request)


def test_rows_wait_for_memory() -> None:
    scheduler = quick(max_bytes=100, bytes_per_position=lambda _: 10)
    tickets = [scheduler.submit(request_of([1] + [MASK] * 3, WHOLE, n)) for n in range(5)]
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 3)  # 4 positions each
    assert [canvas(ticket) for ticket in tickets] == [quickly_alone(ticket.request) for ticket in tickets]
    assert scheduler.most_rows == 2


# --- what is refused


def test_what_never_fits_is_refused_at_once() -> None:
    scheduler = quick(max_bytes=3 * 2**20, bytes_per_position=lambda _: 2**20)
    message = (
        "A row of 4 positions needs 4.00 MiB, and there are 3.00 MiB for all rows: shorten the prompt or gen_length"
    )
    with pytest.raises(OptionError, match=message):
        scheduler.submit(request_of([1, 1, 1, MASK], WHOLE))
    with pytest.raises(
        OptionError, match=re.escape("cfg_scale=0.5 takes two rows, and max_rows=1: leave out cfg_scale")
    ):
        quick(max_rows=1).submit(request_of([MASK], replace(WHOLE, cfg_scale=0.5)))
    with pytest.raises(OptionError, match="steps=1 is fewer than the 2 blocks"):
        scheduler.submit(request_of([MASK, MASK], replace(WHOLE, steps=1, block_length=1)))
    assert idle(scheduler)


def test_a_full_line_is_an_error_until_there_is_room() -> None:
    scheduler = quick(max_rows=1, max_waiting=2)
    for n in range(2):
        scheduler.submit(request_of([MASK] * 2, WHOLE, n))
    with pytest.raises(OptionError, match="2 requests are waiting, the most that max_waiting allows: try again later"):
        scheduler.submit(request_of([MASK], WHOLE))
    scheduler.step()
    scheduler.submit(request_of([MASK], WHOLE))


@pytest.mark.parametrize("name", ["max_rows", "max_waiting"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_limits_are_whole_numbers_from_1(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(f"{name}={value!r}: it is a whole number, at least 1.")):
        quick(**{name: value})
