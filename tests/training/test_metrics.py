"""What a run says about itself: the same however a step is split, and what a sum over tokens says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch

from dllm.diffusion.schedule import mask_probability, time_of
from dllm.pipelines import llada
from dllm.pipelines.llada.trainer import LLaDATrainer
from dllm.training.metrics import COLUMNS, PEAKS, QUARTERS, Meter, Work, nll_metrics, row_sums, seen, work

MakeTrainer = Callable[..., LLaDATrainer]
RowsOf = Callable[..., datasets.Dataset]
NAMES = ["nll", "ppl", "masked_nll", *(f"nll_{name}" for name in QUARTERS), "masked_fraction", "tokens_seen"]


def series(trainer: LLaDATrainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def test_time_is_found_again_from_the_mask_probability() -> None:
    t = torch.rand(1000, dtype=torch.float64)
    torch.testing.assert_close(time_of(mask_probability(t)), t)


def test_rows_add_up_token_by_token() -> None:
    torch.manual_seed(0)
    t_B1 = torch.tensor([[0.1], [0.3], [0.6], [0.9], [0.97]])
    weight_BL = (1 / mask_probability(t_B1)).expand(5, 40)
    masked_BL = torch.rand(5, 40) < t_B1
    maskable_BL = masked_BL | (torch.rand(5, 40) < 0.5)
    nll_N = torch.rand(int(masked_BL.sum())) * 5
    weight_BL = weight_BL.masked_fill(~masked_BL, 0.0)
    rows = row_sums(nll_N, weight_BL, masked_BL, maskable_BL)
    assert rows.shape == (5, COLUMNS)
    nats, counts, bound = {}, {}, 0.0
    for nll, (row, place) in zip(nll_N.tolist(), masked_BL.nonzero().tolist(), strict=True):
        quarter = QUARTERS[min(3, int(4 * float(t_B1[row])))]
        nats[quarter] = nats.get(quarter, 0.0) + nll
        counts[quarter] = counts.get(quarter, 0) + 1
        bound += nll * float(weight_BL[row, place])
    found = nll_metrics(rows.sum(0).tolist())
    assert found["nll"] == pytest.approx(bound / int(maskable_BL.sum()))
    assert found["ppl"] == pytest.approx(math.exp(found["nll"]))
    assert found["masked_nll"] == pytest.approx(sum(nats.values()) / sum(counts.values()))
    for name in QUARTERS:
        assert found[f"nll_{name}"] == pytest.approx(nats[name] / counts[name])


def test_what_was_not_seen_is_left_out() -> None:
    assert nll_metrics([0.0] * COLUMNS) == {}
    sums = [6.0, 0, 0, 0, 3, 0, 0, 0, 12.0, 10]
    assert nll_metrics(sums, prefix="eval_") == {
        "eval_nll": 1.2, "eval_ppl": math.exp(1.2), "eval_masked_nll": 2.0, "eval_nll_t0_25": 2.0
    }  # fmt: skip
    assert nll_metrics(sums, whole=False) == {"masked_nll": 2.0, "nll_t0_25": 2.0}


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_the_metrics_do_not_depend_on_how_a_step_is_split(make_trainer: MakeTrainer, task: str) -> None:
    done = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(task, max_steps=5, per_device_train_batch_size=batch, logging_steps=2,
                               gradient_accumulation_steps=accumulated, learning_rate=0.0)  # fmt: skip
        trainer.train()
        done.append({name: series(trainer, name) for name in NAMES})
    assert all(done[0].values())
    for other in done[1:]:
        for name in NAMES:
            assert other[name] == pytest.approx(done[0][name], rel=1e-5), name


def test_nats_per_token_are_the_loss_that_is_normalised_by_token(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=3, per_device_train_batch_size=4, loss_normalisation="token")
    trainer.train()
    assert series(trainer, "nll") == pytest.approx(series(trainer, "loss"), rel=1e-6)
    assert series(trainer, "tokens_seen") == [48, 96, 144]


@pytest.mark.parametrize("normalisation", ["token", "sequence", "batch"])
def test_evaluation_says_the_same_metrics(make_trainer: MakeTrainer, rows_of: RowsOf, normalisation: str) -> None:
    found = []
    for batch in (1, 3, 7):
        trainer = make_trainer(
            "sft", test=rows_of("sft", 7, "test"), per_device_eval_batch_size=batch, loss_normalisation=normalisation
        )
        metrics = trainer.evaluate()
        found.append({name: value for name, value in metrics.items() if "nll" in name or name == "eval_loss"})
    assert len(found[0]) >= 5
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
    if normalisation == "token":
        assert found[0]["eval_loss"] == pytest.approx(found[0]["eval_nll"], rel=1e-12)


def test_the_bound_is_left_out_where_times_do_not_span_everything(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=1, per_device_train_batch_size=4, max_time=0.5)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert "nll" not in row
    assert "nll_t75_100" not in row
    assert row["masked_nll"] > 0


def test_work_counts_every_matrix_once_and_the_head_apart(model: Any) -> None:
    found = work(model)
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 24)
    assert found == Work(6 * matrices, 12 * 2 * 16, 6 * model.config.vocab_size * 16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert work(model).a_token == 4 * matrices


def test_a_mixture_works_with_the_experts_that_a_token_is_sent_to(tokenizer: Any) -> None:
    model = llada.fresh_model("moe-tiny", tokenizer, None, 64)
    stacked = {name: p.numel() for name, p in model.named_parameters() if ".experts." in name}
    linears = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "proj" in name)
    share = model.config.num_experts_per_tok / model.config.num_experts
    assert stacked
    assert work(model).a_token == pytest.approx(6 * (linears + share * sum(stacked.values())))


def test_the_table_of_devices_finds_the_longer_name_first() -> None:
    names = list(PEAKS)
    for place, name in enumerate(names):
        assert not [other for other in names[:place] if other in name], name


@pytest.mark.parametrize(
    ("more", "positions", "pairs"),
    [
        ({}, 10, 25 + 25),
        ({"attention_mask": [[True, True, True, False, False], [True] * 5]}, 8, 9 + 25),
        ({"document": [[0, 0, 1, 1, 1], [2, 2, -1, -1, -1]]}, 7, 4 + 9 + 4),
        ({"document_ids": [[0, 0, 0, 1, 1], [0, 1, 2, 3, 4]]}, 10, 9 + 4 + 5),
    ],
)
def test_positions_without_text_and_pairs_that_do_not_see_each_other_are_not_counted(
    more: dict[str, Any], positions: int, pairs: int
) -> None:
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.int64), **{k: torch.tensor(v) for k, v in more.items()}}
    assert [int(number) for number in seen(inputs)] == [positions, pairs]


def test_speed_share_of_the_peak_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(torch.device("cpu"), Work(10.0, 1.0, 100.0), whole=True)
    meter.peak = 1000.0
    rows = torch.zeros(2, COLUMNS, dtype=torch.float64)
    rows[:, 4] = 3  # masked tokens
    rows[:, -1] = 8
    for step in range(4):
        meter.add(rows, {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, step)
    now[0] = 106.0
    meter.leave_out(104.0)  # an evaluation
    twice = meter.vector().expand(2, -1)
    twice = torch.stack([twice[0], twice[1] + torch.eye(len(twice[1]), dtype=torch.float64)[-1]])
    found = meter.read(twice, 4, 10)
    positions, pairs, masked = 2 * 4 * 16, 2 * 4 * 2 * 64, 2 * 4 * 6
    assert found["tokens_per_second"] == positions / 4
    assert found["mfu"] == pytest.approx((10 * positions + pairs + 100 * masked) / 4 / 2000)
    assert found["masked_fraction"] == 3 / 8
    assert found["eta_seconds"] == 6 / 4 * 6  # what was left out takes time too
    assert found["peak_memory_gib"] == float(twice[1, -1]) > 1
    assert meter.vector()[:-1].tolist() == [0.0] * (COLUMNS + 2)


def test_no_share_is_told_where_the_peak_is_not_known(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    assert series(trainer, "mfu") == []
    assert 0.01 < series(trainer, "peak_memory_gib")[0] < 100
