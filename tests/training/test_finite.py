"""A number that is not finite ends the run before the weights see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.commands import PRETRAIN, SFT, Done, equal, weights
from transformers import TrainerCallback

from dllm.errors import NonFiniteError
from dllm.pipelines import llada
from dllm.pipelines.llada.trainer import LLADA, LLaDATrainer
from dllm.training.checkpoints import fault
from dllm.training.finite import FiniteGuard
from dllm.training.metrics import COLUMNS
from dllm.training.run import run

MakeTrainer = Callable[..., LLaDATrainer]


def poisoned(sample: int, value: float) -> type[LLaDATrainer]:
    """A trainer that gives the nats of one sample's masks a value."""

    class Poisoned(LLaDATrainer):
        def score(self, model: Any, inputs: Any, plan: Any, denominator: Any) -> Any:
            scored = super().score(model, inputs, plan, denominator)
            hit_D = inputs["sample"] == sample
            masked_BL = scored.noisy.masked_BL
            of_N = inputs["document"][masked_BL] if "document" in inputs else masked_BL.nonzero()[:, 0]
            hit_N = hit_D[of_N]
            nll_N = scored.nll_N.masked_fill(hit_N, value)
            return scored._replace(nll_N=nll_N, loss=scored.loss + value if bool(hit_N.any()) else scored.loss)

    return Poisoned


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_names_its_sample(pretrained: Done, tmp_path: Path, value: float) -> None:
    argv = [*PRETRAIN, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(NonFiniteError) as stopped:
        run("pretrain", replace(LLADA, trainer=poisoned(10, value)), argv)  # of the third step
    text = str(stopped.value)
    assert text.startswith("Step 3: the loss is not finite on rank 0, sample 10 (row ")
    assert "checkpoint-2 is whole: go on from it with --resume_from_checkpoint auto and a lower --learning_rate" in text
    assert fault(tmp_path / "run" / "checkpoint-2") is None
    assert equal(weights(tmp_path / "run" / "checkpoint-2"), weights(pretrained.output / "checkpoint-2"))
    final = llada.pretrain([*argv, "--resume_from_checkpoint", "auto"])
    assert equal(weights(final), weights(pretrained.final))


class PoisonGradient(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if state.global_step == 1:
            next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_is_not_applied(make_trainer: MakeTrainer, max_grad_norm: float) -> None:
    trainer = make_trainer(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                           max_grad_norm=max_grad_norm)  # fmt: skip
    callback = PoisonGradient()
    trainer.add_callback(callback)
    message = r"Step 2: the gradient is not finite \(its norm is (nan|inf)\), though every sample's loss is: rank 0 had samples 4"
    with pytest.raises(NonFiniteError, match=message) as stopped:
        trainer.train()
    assert "no checkpoint was saved yet: start anew with a lower --learning_rate" in str(stopped.value)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, callback.before[name]), name


def guard() -> FiniteGuard:
    return FiniteGuard(0, lambda sample: f"row {sample}", lambda: "Go on.")


def test_a_finite_loss_keeps_its_bits_and_another_has_a_gradient_of_nan() -> None:
    weight = torch.tensor([1.1, 2.2], requires_grad=True)
    rows = torch.zeros(2, COLUMNS)
    loss = (weight * 3.3).sum()
    same = guard().add(loss, torch.arange(2), rows)
    assert torch.equal(same, loss)
    assert torch.autograd.grad(same, weight)[0].tolist() == torch.tensor([3.3, 3.3]).tolist()
    bad = guard().add((weight * 3.3).sum() + math.inf, torch.arange(2), rows)
    assert torch.autograd.grad(bad, weight)[0].isnan().all()


def test_what_an_engine_skipped_stops_too_and_a_finite_step_forgets_its_samples() -> None:
    watching = guard()
    watching.add(torch.tensor(1.0), torch.arange(2), torch.zeros(2, COLUMNS))
    watching.check(torch.tensor(2.0), 0)
    watching.add(torch.tensor(1.0), torch.arange(20, 40), torch.zeros(20, COLUMNS))
    with pytest.raises(NonFiniteError, match=r"Step 2: .*samples 20 \(row 20\), .* and 12 more\. Go on\.") as stopped:
        watching.check(None, 1, overflow=True)
    assert "sample 0" not in str(stopped.value)


def test_under_fp16_the_scaler_decides(make_trainer: MakeTrainer) -> None:
    assert make_trainer().guard is not None
    assert make_trainer(bf16=True).guard is not None
    trainer = make_trainer(fp16=True) if torch.cuda.is_available() else None
    assert trainer is None or trainer.guard is None


def test_a_sample_is_found_again_in_the_rows(make_trainer: MakeTrainer) -> None:
    data = make_trainer(per_device_train_batch_size=4).train_dataset
    for epoch in (0, 2):
        data.set_epoch(epoch)
        for place in range(len(data)):
            row = data[place]
            assert data.rows[data.row_number(row["sample"])]["input_ids"] == row["input_ids"]


def test_a_packed_sample_is_named_by_its_row(tmp_path: Path) -> None:
    argv = [*SFT, "--packing", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(NonFiniteError, match=r"Step \d: the loss is not finite on rank 0, .*\b1 \(row 1, '.*'"):
        run("sft", replace(LLADA, trainer=poisoned(1, math.nan)), argv)
