"""Batches: rows that come and go, early stops, and steps in which the host must not wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tiny
from reference.predictor import HashPredictor, as_network, one_row
from reference.sampler import sample_row
from reference.tiny import LEVELS
from torch import Tensor, nn

from dllm.errors import NonFiniteError
from dllm.layers.attention import RaggedRows
from dllm.pipelines.llada.generate import network_of
from dllm.sampling.batch import LAG, Batch, alike
from dllm.sampling.config import POLICY_OPTIONS, SamplingConfig
from dllm.sampling.loop import denoise
from dllm.sampling.network import Pass
from dllm.sampling.proposals import Proposals
from dllm.sampling.rows import Request, SpecialTokens

V, MASK, EOS = 10, 9, 8
TOKENS = SpecialTokens(MASK, (EOS,), (EOS,))
ROWS = [[1, 2] + [MASK] * 7, [MASK] * 3, [3, MASK, 4, MASK, MASK, 5, 6]]


def network(work: Pass, readout: Any) -> Proposals:
    """The hash of each row's tokens, computed where they lie, padded or not."""
    lengths = torch.tensor(work.tokens_P)
    row_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths, output_size=sum(work.tokens_P))
    bits_T = (work.ids_T + 1) * (work.position_T + 3) * 1_000_003
    assert isinstance(work.plan, RaggedRows)
    if work.plan.even and work.plan.visible is not None:  # padding is hidden
        bits_T = bits_T * work.plan.visible[:, 0, 0].flatten()
    context_P = torch.zeros(len(lengths), dtype=torch.int64).index_add(0, row_T, bits_T)
    seen_N = context_P[row_T[work.wanted_M]]
    logits_NV = (seen_N[:, None] * 31 + work.position_T[work.wanted_M][:, None] * 17 + torch.arange(V) * 7919) % 97
    return readout(nn.Identity(), logits_NV.float() / 12)


def run(
    config: SamplingConfig, *, waits: bool, watch: Any = None, rows: Sequence[list[int]] = ROWS
) -> dict[Any, list[int]]:
    batch = Batch(network, config, TOKENS, "cpu", waits=waits)
    canvases = [torch.tensor(row) for row in rows]
    batch.add([Request(row, row == MASK, config, number) for number, row in enumerate(canvases)], range(len(canvases)))
    done: dict[Any, Tensor] = {}
    for _ in range(100):
        if not len(batch):
            return {name: canvas.tolist() for name, canvas in sorted(done.items())}
        if watch is None:
            batch.step()
        else:
            with watch():
                batch.step()
        done |= {row.name: row.canvas for row in batch.take_finished()}
    raise AssertionError("the batch does not end")


SETTINGS = [
    {},
    {"block_length": 2, "steps": 5},
    {"policy": "threshold", "threshold": 0.3, "block_length": 4},
    {"policy": "entropy_bound", "gamma": 0.5},
    {"policy": "klass", "threshold": 0.2},
    {"policy": "remdm", "eta": 0.5, "block_length": 4},
    {"policy": "hierarchical", "low_threshold": 0.2, "threshold": 0.4},
    {"temperature": 0.8, "remasking": "random", "suppress_eos": True},
    {"cfg_scale": 1.5, "eos_last": True, "remasking": "margin"},
    {"block_policy": "adablock", "delimiters": (3, 4), "delimiter_threshold": 0.2, "block_length": 2},
    {"early_answer": "prophet", "early_gap": 2.0, "middle_gap": 1.0, "late_gap": 0.5, "block_length": 2},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_step_that_must_not_wait_gives_the_same_tokens_and_does_not_wait(
    options: dict[str, Any], refuses_reads: Any
) -> None:
    config = SamplingConfig(**options)
    assert run(config, waits=False, watch=refuses_reads) == run(config, waits=True)


@pytest.mark.parametrize("options", [{}, {"policy": "klass", "threshold": 0.2, "kl_threshold": 3.0}], ids=str)
def test_answers_grow_without_waiting_too(options: dict[str, Any]) -> None:
    """But for the number of masks that are added, which the host has to know."""
    config = SamplingConfig(
        length_policy="daedal", gen_length=12, initial_length=3, eos_threshold=0.2, expand_threshold=0.4, **options
    )
    rows = [[1, 2] + [MASK] * 3, [MASK] * 3, [3] * 5 + [MASK] * 3]
    slow, fast = (run(config, waits=waits, rows=rows) for waits in (True, False))
    assert slow == fast
    assert len(set(map(len, slow.values()))) > 1


def test_a_step_that_may_wait_does(refuses_reads: Any) -> None:
    with pytest.raises(AssertionError, match="waits for the device"):
        run(SamplingConfig(), waits=True, watch=refuses_reads)


def test_rows_that_are_done_stay_unchanged_until_they_are_seen_to_be() -> None:
    config = SamplingConfig(early_stop=False)
    batch = Batch(network, config, TOKENS, "cpu", waits=False)
    row = torch.tensor([1, MASK])
    batch.add([Request(row, row == MASK, config, 0)], ["row"])
    canvases = []
    for step in range(LAG + 1):
        batch.step()
        assert batch.rows is not None
        canvases.append(batch.rows.ids_RL.tolist())
        gone = batch.take_finished()
        assert len(gone) == (step == LAG)
    assert canvases[0] == canvases[1] == canvases[2]
    assert gone[0].steps == 1
    assert gone[0].canvas.tolist() == canvases[0][0]


@pytest.mark.parametrize(
    "options", [{"policy": "klass", "threshold": 0.0, "kl_threshold": 1e6, "kl_steps": 1}, {}], ids=str
)
def test_blocks_of_several_widths_may_stand_beside_each_other(options: dict[str, Any]) -> None:
    """Without waiting, places beyond a narrow block are computed too, and must leave no trace."""
    found = []
    for waits in (True, False):
        batch = Batch(network, alike(SamplingConfig(**options)), TOKENS, "cpu", waits=waits)
        for number, width in enumerate((2, 5)):
            row = torch.tensor([number] + [MASK] * 8)
            config = SamplingConfig(block_length=width, early_stop=False, **options)
            batch.add([Request(row, row == MASK, config, number)], [number])
        done: dict[Any, Any] = {}
        while len(batch):
            batch.step()
            done |= {row.name: (row.canvas.tolist(), row.steps) for row in batch.take_finished()}
        found.append(done)
    assert found[0] == found[1]


def test_rows_that_leave_do_not_hold_up_those_that_are_done() -> None:
    """What was seen of the others before is not forgotten."""
    batch = Batch(network, alike(SamplingConfig()), TOKENS, "cpu", waits=False)
    config = SamplingConfig(early_stop=False)
    for name, masks in (("short", 1), ("a", 9), ("b", 9)):
        row = torch.tensor([1] + [MASK] * masks)
        batch.add([Request(row, row == MASK, config, 0)], [name])
    gone: list[Any] = []
    for step in range(LAG + 1):
        batch.step()
        gone += [row.name for row in batch.take_finished()]
        if step < LAG:  # one row is given up after each step
            batch.remove([len(batch) - 1])
    assert gone == ["short"]
    assert not len(batch)


# --- rows that come and go


@settings(max_examples=15)
@given(st.data(), st.sampled_from([name for name in POLICY_OPTIONS if name != "wino"]), st.booleans())
def test_rows_join_and_leave_at_any_time_and_have_their_tokens_alone(
    data: st.DataObject, policy: Any, early_stop: bool
) -> None:
    options = {name: LEVELS[name][0] for name in POLICY_OPTIONS[policy]}
    config = SamplingConfig(policy=policy, early_stop=early_stop, **options)
    predict, branches = HashPredictor(V, data.draw(st.integers(0, 99))), data.draw(st.sampled_from([1, 2]))
    batch = Batch(as_network(predict, branches), alike(replace(config, cfg_scale=float(branches == 2))), TOKENS, "cpu")
    asked: dict[int, tuple[list[int], SamplingConfig]] = {}
    numbers = count()
    done: dict[Any, Any] = {}
    for _ in range(6):
        for _ in range(data.draw(st.integers(0, 2))):
            row = data.draw(st.lists(st.integers(0, V - 3), max_size=4)) + [MASK] * data.draw(st.integers(1, 7))
            own = replace(
                config,
                block_length=data.draw(st.none() | st.integers(1, 4)),
                cfg_scale=0.0 if branches == 1 else data.draw(st.sampled_from([0.5, 2.0])),
                seed=data.draw(st.integers(0, 9)),
            )
            number = next(numbers)
            asked[number] = (row, own)
            ids = torch.tensor(row)
            batch.add([Request(ids, ids == MASK, own, number)], [number])
        if len(batch) and data.draw(st.booleans()):  # before it has taken a step, perhaps
            for row in batch.remove([data.draw(st.integers(0, len(batch) - 1))]):
                del asked[row.name]
        if len(batch):
            batch.step()
            done |= {row.name: (row.canvas.tolist(), row.steps) for row in batch.take_finished()}
    while len(batch):
        batch.step()
        done |= {row.name: (row.canvas.tolist(), row.steps) for row in batch.take_finished()}
    special: dict[str, Any] = {"mask_token_id": MASK, "eos_token_ids": [EOS], "end_token_ids": [EOS]}
    for number, (row, own) in asked.items():
        alone = sample_row(one_row(predict), row, own, **special, request=number)
        assert done[number] == (alone.ids, alone.steps)


def test_a_row_may_go_before_one_that_came_after_it_has_begun() -> None:
    """What klass remembers of a row that has taken no step yet is nothing."""
    config = SamplingConfig(policy="klass", threshold=0.1, kl_threshold=2.0, early_stop=False)
    batch = Batch(as_network(HashPredictor(V)), config, TOKENS, "cpu")
    row = torch.tensor([1] + [MASK] * 6)
    requests = [Request(row[: 5 + number], row[: 5 + number] == MASK, config, number) for number in range(3)]
    batch.add(requests[:2], [0, 1])
    batch.step()
    batch.add(requests[2:], [2])
    batch.remove([0])
    done: dict[Any, Any] = {}
    while len(batch):
        batch.step()
        done |= {gone.name: gone.canvas.tolist() for gone in batch.take_finished()}
    for number in (1, 2):
        alone = denoise(as_network(HashPredictor(V)), [requests[number]], config, TOKENS)
        assert done[number] == alone.canvases[0].tolist()


def test_removing_nothing_or_from_nothing_does_nothing() -> None:
    batch = Batch(network, SamplingConfig(), TOKENS, "cpu")
    assert batch.remove([]) == batch.take_finished() == batch.look() == []
    row = torch.tensor([MASK, MASK])
    batch.add([], [])
    batch.add([Request(row, row == MASK, SamplingConfig(), 0)], ["row"])
    assert batch.remove([]) == []
    assert [gone.canvas.tolist() for gone in batch.remove([0])] == [[MASK, MASK]]


# --- early stop


@settings(max_examples=10)
@given(st.lists(tiny.canvases(), min_size=1, max_size=3), tiny.configs(caches=["none"]))
def test_early_stop_is_the_slow_samplers_and_never_changes_the_text(
    rows: list[list[int]], config: SamplingConfig
) -> None:
    config = replace(config, early_stop=True)
    asked = [tiny.request_of(row, config, number) for number, row in enumerate(rows)]
    done = denoise(network_of(tiny.tiny_model()), asked, config, tiny.TOKENS)
    whole_config = replace(config, early_stop=False)
    whole = denoise(network_of(tiny.tiny_model()), asked, whole_config, tiny.TOKENS)
    for row, request in enumerate(asked):
        slow = tiny.slowly(rows[row], config, row)
        assert (done.canvases[row].tolist(), done.steps[row]) == (slow.ids, slow.steps)
        assert whole.canvases[row].tolist() == tiny.slowly(rows[row], whole_config, row).ids
        written, in_full = (x.canvases[row][request.masked].tolist() for x in (done, whole))
        end = next((i for i, token in enumerate(in_full) if token in (tiny.EOS, tiny.EOT)), len(in_full))
        assert written[: end + 1] == in_full[: end + 1]
        assert done.steps[row] <= whole.steps[row]
        assert tiny.MASK not in written
    assert done.nfe == max(slow.forwards for slow in (tiny.slowly(row, config, i) for i, row in enumerate(rows)))


@pytest.mark.parametrize("options", [{"policy": "wino", "threshold": 0.1}, {"policy": "remdm", "eta": 0.6}], ids=str)
def test_what_may_be_taken_back_ends_nothing(options: dict[str, Any]) -> None:
    """An end token in a block that is still being written may go again."""
    config = SamplingConfig(block_length=8, temperature=1.0, **options)
    asked = [tiny.request_of([first] + [tiny.MASK] * 12, config, first) for first in range(6)]
    done = denoise(network_of(tiny.tiny_model()), asked, config, tiny.TOKENS)
    for first in range(6):
        slow = tiny.slowly([first] + [tiny.MASK] * 12, config, first)
        assert (done.canvases[first].tolist(), done.steps[first]) == (slow.ids, slow.steps)


def test_early_stop_saves_steps() -> None:
    """Of the answers that the settings above draw, not only those that never end."""
    config = SamplingConfig(block_length=4)
    asked = [tiny.request_of([first] + [tiny.MASK] * 24, config, first) for first in range(8)]
    done = denoise(network_of(tiny.tiny_model()), asked, config, tiny.TOKENS)
    assert sum(steps < 24 for steps in done.steps) >= 4


def test_what_an_early_stop_leaves_is_filled_with_an_end_even_if_that_is_no_end_of_text() -> None:
    row = torch.tensor([1] + [MASK] * 5)

    def ends_at_once(work: Pass, readout: Any) -> Proposals:
        logits_NV = torch.zeros(len(work.wanted_M), V)
        logits_NV[:, 7] = 9.0
        return readout(nn.Identity(), logits_NV)

    asked = [Request(row, row == MASK, SamplingConfig(), 0)]
    done = denoise(ends_at_once, asked, SamplingConfig(), SpecialTokens(MASK, (), (7,)))
    assert (done.canvases[0].tolist(), done.steps) == ([1, 7, 7, 7, 7, 7], [1])


@pytest.mark.parametrize("branches", [1, 2])
def test_only_tokens_that_are_to_be_verified_have_a_shadow(branches: int) -> None:
    """Policy wino takes as many positions more as its blocks hold tokens that it committed."""
    config = SamplingConfig(policy="wino", threshold=0.9, block_length=3, cfg_scale=float(branches - 1))
    rows, passes, committed = [[1] + [tiny.MASK] * 6, [2] * 3 + [tiny.MASK] * 4], [], []
    run = network_of(tiny.tiny_model())

    def spied(work: Pass, readout: Any) -> Proposals:
        state = batch.rows
        assert state is not None
        block_RM = torch.arange(state.place_RM.shape[1])
        block_RM = (block_RM >= state.start_R[:, None]) & (block_RM < state.end_R[:, None])
        tokens_RM = block_RM & ~state.open_RL.gather(1, state.place_RM)
        committed.append((state.length_R + tokens_RM.sum(1)).repeat_interleave(branches).tolist())
        passes.append(work.tokens_P)
        return run(work, readout)

    batch = Batch(spied, config, tiny.TOKENS, "cpu")
    batch.add([tiny.request_of(row, config, number) for number, row in enumerate(rows)], range(2))
    while len(batch):
        batch.step()
        batch.take_finished()
    assert passes == committed
    assert passes[0] == [7] * 2 * branches
    assert max(map(max, passes)) == 9


def test_klass_keeps_what_was_predicted_of_the_masks_of_the_blocks_and_no_more() -> None:
    config = SamplingConfig(policy="klass", threshold=0.1, kl_threshold=2.0, block_length=4)
    batch = Batch(network_of(tiny.tiny_model()), config, tiny.TOKENS, "cpu")
    batch.add([tiny.request_of([1] * n + [tiny.MASK] * 12, config, n) for n in range(2)], range(2))
    for _ in range(3):
        state = batch.rows
        assert state is not None
        places_RM = torch.arange(state.place_RM.shape[1])
        block_RM = (places_RM >= state.start_R[:, None]) & (places_RM < state.end_R[:, None])
        masks = int((block_RM & state.open_RL.gather(1, state.place_RM)).sum())
        batch.step()
        kept = batch._before.log_p_NV
        assert kept is not None
        assert kept.shape == (masks, tiny.V)


# --- what is no number


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("policy", POLICY_OPTIONS)
def test_one_row_that_is_no_number_fails_alone(policy: Any, order: int) -> None:
    """Also where rows are padded with what stands beside them: 0 times what is no number is none."""
    config = SamplingConfig(policy=policy, block_length=3)
    rows = [[1, 2] + [tiny.MASK] * 3, [3, tiny.BAD] + [tiny.MASK] * 4, [4] * 9 + [tiny.MASK] * 5][::order]
    batch = Batch(network_of(tiny.damaged_model()), config, tiny.TOKENS, "cpu")
    batch.add([tiny.request_of(row, config, number) for number, row in enumerate(rows)], range(3))
    done: dict[Any, Any] = {}
    while len(batch):
        batch.step()
        done |= {row.name: row for row in batch.take_finished()}
    assert [done[name].failed for name in range(3)] == [False, True, False]
    assert done[1].canvas.tolist() == rows[1]
    assert done[1].steps == 0
    for name in (0, 2):
        assert done[name].canvas.tolist() == tiny.slowly(rows[name], config, name).ids


def test_denoise_goes_on_with_the_others_where_a_row_is_no_number() -> None:
    config = SamplingConfig(early_stop=False)
    rows = [[1, tiny.MASK, tiny.MASK], [tiny.BAD, tiny.MASK], [2, tiny.MASK]]
    asked = [tiny.request_of(row, config, number) for number, row in enumerate(rows)]
    done = denoise(network_of(tiny.damaged_model()), asked, config, tiny.TOKENS)
    assert set(done.failed) == {1}
    assert isinstance(done.failed[1], NonFiniteError)
    assert "The model's logits are not numbers (NaN or infinite) at step 0" in str(done.failed[1])
    assert done.canvases[1].tolist() == rows[1]
    for number in (0, 2):
        assert done.canvases[number].tolist() == tiny.slowly(rows[number], config, number).ids


def test_a_default_that_is_given_makes_no_other_kind() -> None:
    assert alike(SamplingConfig(policy="threshold")) == alike(SamplingConfig(policy="threshold", threshold=0.9, seed=4))
    assert alike(SamplingConfig(policy="threshold")) != alike(SamplingConfig(policy="threshold", threshold=0.8))
    assert alike(SamplingConfig(cache="vicinity")) == alike(SamplingConfig(cache="vicinity", vicinity=16))
