"""A batch whose host must not wait for the device: the same tokens, and nothing in a step that waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dllm.layers.attention import RaggedRows
from dllm.sampling.batch import LAG, Batch
from dllm.sampling.config import SamplingConfig
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


def run(config: SamplingConfig, *, waits: bool, watch: Any = None) -> dict[Any, list[int]]:
    batch = Batch(network, config, TOKENS, "cpu", waits=waits)
    rows = [torch.tensor(row) for row in ROWS]
    batch.add([Request(row, row == MASK, config, number) for number, row in enumerate(rows)], range(len(rows)))
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
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_step_that_must_not_wait_gives_the_same_tokens_and_does_not_wait(
    options: dict[str, Any], refuses_reads: Any
) -> None:
    config = SamplingConfig(**options)
    assert run(config, waits=False, watch=refuses_reads) == run(config, waits=True)


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
