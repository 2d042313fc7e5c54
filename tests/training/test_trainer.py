"""The Trainer: one loss however a step is split, the loss that the formula gives, and a resumed run that is the same run."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from reference.loss import normalised_loss
from torch import Tensor

from dllm.diffusion.corruption import CorruptionPlan
from dllm.pipelines.llada.trainer import LLaDATrainer
from dllm.training.checkpoints import fault, last_whole, seal

MakeTrainer = Callable[..., LLaDATrainer]
RowsOf = Callable[..., datasets.Dataset]
NORMALISATIONS = ("token", "sequence", "batch")


def logged(trainer: LLaDATrainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def weights(trainer: LLaDATrainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def obvious_losses(
    trainer: LLaDATrainer, rows: list[dict[str, Any]], plan: CorruptionPlan, evaluation: bool = False
) -> Tensor:
    """The loss of one global batch in fp64: every position's logits, then a sum token by token.

    Evaluation takes each row by itself, so that there is nothing to pad.
    """
    model = copy.deepcopy(trainer.model).double()
    nlls, weights, masked, maskable = [], [], [], []
    collate = trainer.eval_collator if evaluation else trainer.data_collator
    for batch in [collate([row]) for row in rows] if evaluation else [collate(rows)]:
        noisy = plan.corrupt(batch["input_ids"], batch["maskable"], batch["sample"], trainer.mask_token_id)
        logits = model(input_ids=noisy.xt_BL).logits
        nlls += (-logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None])[..., 0]).detach().tolist()
        p = [(1 - 1e-3) * float(time) + 1e-3 for time in plan.sample_times(batch["sample"])]
        weights += [[1 / each] * batch["input_ids"].shape[1] for each in p]
        masked += noisy.masked_BL.tolist()
        maskable += batch["maskable"].tolist()
    return normalised_loss(nlls, weights, masked, maskable, trainer.args.loss_normalisation)


# --- the loss ---


@pytest.mark.parametrize("task", ["pretrain", "sft"])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_step_does_not_depend_on_how_it_is_split(make_trainer: MakeTrainer, task: str, normalisation: str) -> None:
    done = []
    for batch, accumulated in ((4, 1), (2, 2)):
        trainer = make_trainer(
            task, random_length=0.5, max_steps=5, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated, loss_normalisation=normalisation, adam_epsilon=1e-4,
        )  # fmt: skip
        trainer.train()
        done.append((logged(trainer, "loss"), logged(trainer, "grad_norm"), weights(trainer)))
    (loss, norm, final), *others = done
    assert len(loss) == 5  # the 10 rows are 3 steps, the third filled up with 2 more, so a new epoch is among them
    for other_loss, other_norm, other_final in others:
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(other_norm, norm, rtol=1e-4, atol=0)
        torch.testing.assert_close(other_final, final, rtol=0, atol=1e-4)


@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize("task", ["pretrain", "sft"])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_the_logged_loss_is_the_formula(make_trainer: MakeTrainer, task: str, normalisation: str, newest: bool) -> None:
    class Older(LLaDATrainer):
        loss_is_scaled_for_ga = property(
            lambda self: None, lambda self, value: None
        )  # transformers 5.17 has no such thing

    trainer = make_trainer(
        kind=LLaDATrainer if newest else Older, task=task, max_steps=4, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=0.0, loss_normalisation=normalisation,
    )  # fmt: skip
    trainer.train()
    data, expected = trainer.train_dataset, []
    for epoch, places in ((0, range(4)), (0, range(4, 8)), (0, range(8, 12)), (1, range(4))):
        data.set_epoch(epoch)
        expected.append(obvious_losses(trainer, [data[place] for place in places], trainer.train_plan))
    torch.testing.assert_close(logged(trainer, "loss"), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("task", ["pretrain", "sft"])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_evaluation_is_the_exact_quotient_whatever_its_batch_size(
    make_trainer: MakeTrainer, rows_of: RowsOf, task: str, normalisation: str
) -> None:
    test = rows_of(task, 7, "test")
    losses = []
    for batch in (1, 3, 7, 8):
        trainer = make_trainer(task, test=test, per_device_eval_batch_size=batch, loss_normalisation=normalisation)
        losses.append(trainer.evaluate()["eval_loss"])
    rows = [trainer.eval_dataset[i] for i in range(7)]
    assert {row["sample"] for row in rows} == set(range(7))
    exact = obvious_losses(trainer, rows, CorruptionPlan(group=7, seed=trainer.args.seed), evaluation=True)
    torch.testing.assert_close(losses, [exact] * 4, rtol=1e-6, atol=0)


def test_evaluation_cuts_no_row(make_trainer: MakeTrainer, rows_of: RowsOf) -> None:
    test = rows_of("pretrain", 7, "test")
    losses = []
    for share, batch in ((0.0, 7), (1.0, 7), (1.0, 2), (0.5, 1)):
        trainer = make_trainer(test=test, random_length=share, per_device_eval_batch_size=batch,
                               per_device_train_batch_size=2)  # fmt: skip
        losses.append(trainer.evaluate()["eval_loss"])
        widths = {batch["input_ids"].shape[1] for batch in trainer.get_eval_dataloader()}
        assert widths == {12}
    torch.testing.assert_close(losses, losses[:1] * 4, rtol=1e-6, atol=0)
    assert trainer.data_collator.random_length == 0.5  # training goes on cutting


@pytest.mark.parametrize("pad_to", ["global", "local"])
def test_an_evaluated_answer_does_not_depend_on_other_rows(
    make_trainer: MakeTrainer, rows_of: RowsOf, pad_to: str
) -> None:
    rows = rows_of("sft", 7, "test").to_list()
    last = rows[6]
    outlier = {"input_ids": [*last["input_ids"], *last["input_ids"] * 2], "turns": [5, 3 * len(last["input_ids"])]}
    shares = []
    for test in (rows, [*rows[:6], outlier]):
        trainer = make_trainer("sft", test=test, pad_to=pad_to, per_device_eval_batch_size=7)
        (batch,) = trainer.get_eval_dataloader()
        shares.append(trainer.prediction_step(trainer.model, batch, False)[1])
    assert batch["input_ids"].shape[1] == len(outlier["input_ids"])
    torch.testing.assert_close(shares[0][:6], shares[1][:6], rtol=1e-5, atol=0)
    assert not torch.equal(shares[0][6], shares[1][6])


def test_two_evaluations_of_one_model_are_equal(make_trainer: MakeTrainer, rows_of: RowsOf) -> None:
    trainer = make_trainer(test=rows_of("pretrain", 5, "test"), max_steps=3, eval_strategy="steps", eval_steps=1,
                           learning_rate=0.0)  # fmt: skip
    trainer.train()
    losses = [*logged(trainer, "eval_loss"), trainer.evaluate()["eval_loss"]]
    assert len(losses) == 4
    assert len(set(losses)) == 1


def test_times_reach_the_plan_and_evaluation_spans_all_of_them(make_trainer: MakeTrainer, rows_of: RowsOf) -> None:
    trainer = make_trainer(
        test=rows_of("pretrain", 8, "test"), min_time=0.25, max_time=0.5, times="independent", masking="exact",
        seed=5, data_seed=6, per_device_train_batch_size=2, gradient_accumulation_steps=3,
    )  # fmt: skip
    assert trainer.train_plan == CorruptionPlan(
        group=6, min_time=0.25, max_time=0.5, times="independent", masking="exact", seed=6
    )
    assert trainer.eval_plan == CorruptionPlan(group=8, times="stratified", masking="exact", seed=6)
    times = trainer.train_plan.sample_times(torch.arange(600))
    assert times.min() > 0.25
    assert times.max() < 0.5
    # one time in each eighth of [0, 1]
    assert sorted((trainer.eval_plan.sample_times(torch.arange(8)) * 8).long().tolist()) == list(range(8))


def test_fine_tuning_changes_answers(make_trainer: MakeTrainer, rows_of: RowsOf) -> None:
    test = rows_of("sft", 6, "test")
    trainer = make_trainer("sft", test=test, max_steps=30, per_device_train_batch_size=10)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


def test_a_mask_id_that_the_config_lacks_is_the_tokenizers(make_trainer: MakeTrainer, tokenizer: Any) -> None:
    class WithoutMaskId(LLaDATrainer):
        def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
            model.config.mask_token_id = None
            super().__init__(model, *args, **kwargs)

    trainer = make_trainer(kind=WithoutMaskId)
    assert trainer.mask_token_id == trainer.model.config.mask_token_id == tokenizer.mask_token_id


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_tokens_are_counted_with_their_padding(make_trainer: MakeTrainer, task: str) -> None:
    trainer = make_trainer(task, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    data = trainer.train_dataset
    data.set_epoch(0)
    rows = [data[i] for i in range(8)]
    assert trainer.state.num_input_tokens_seen == (8 * 12 if task == "pretrain" else sum(row["pad_to"] for row in rows))


def test_local_padding_pads_less(make_trainer: MakeTrainer) -> None:
    seen = {}
    for pad_to in ("global", "local"):
        trainer = make_trainer("sft", pad_to=pad_to, max_steps=2, per_device_train_batch_size=1,
                               gradient_accumulation_steps=4)  # fmt: skip
        trainer.train()
        seen[pad_to] = trainer.state.num_input_tokens_seen
    assert seen["local"] < seen["global"]


# --- checkpoints ---


@pytest.mark.parametrize("task", ["pretrain", "sft"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [2, 3])  # in the midst of an epoch of 3 steps, and at its end
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    make_trainer: MakeTrainer, tmp_path: Path, task: str, optimizer: str, stop: int
) -> None:
    options = dict(
        random_length=0.5, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        optimizer=optimizer, save_strategy="steps", save_steps=stop, save_total_limit=None,
    )  # fmt: skip
    whole = make_trainer(task, **options)
    whole.train()
    shutil.move(tmp_path / "run" / f"checkpoint-{stop}", tmp_path / "kept")
    again = make_trainer(task, **options)
    for parameter in again.model.parameters():
        parameter.data.zero_()  # all that it knows must come from the checkpoint
    again.train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert logged(again, "loss") == logged(whole, "loss")
    assert logged(again, "grad_norm") == logged(whole, "grad_norm")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(again).items())


def test_checkpoints_are_sealed_and_the_oldest_are_deleted(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]
    assert [fault(tmp_path / "run" / name) for name in kept] == [None, None]
    assert trainer.args.save_total_limit == 2


def test_the_best_checkpoint_is_kept_and_found_again(make_trainer: MakeTrainer, rows_of: RowsOf) -> None:
    trainer = make_trainer(
        test=rows_of("pretrain", 5, "test"), max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{losses.index(min(losses)) + 1}")
    assert trainer.evaluate()["eval_loss"] == min(losses)


def test_a_save_that_fails_leaves_the_older_checkpoints_and_nothing_else(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Failing(LLaDATrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if self.state.global_step == 2:
                raise OSError("the disk is on fire")
            super()._save_optimizer_and_scheduler(output_dir)

    trainer = make_trainer(kind=Failing, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    with pytest.raises(OSError, match="the disk is on fire"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
    assert fault(tmp_path / "run" / "checkpoint-1") is None


def test_an_older_checkpoint_is_deleted_only_when_the_new_one_is_whole(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path) -> None:
        if folder.name == "checkpoint-2":
            raise KeyboardInterrupt
        seal(folder)

    monkeypatch.setattr("dllm.training.trainer.seal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert last_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"


def test_what_lies_in_the_place_of_a_checkpoint_is_not_mixed_with_it(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    old = tmp_path / "run" / "checkpoint-1"
    old.mkdir(parents=True)
    (old / "rng_state_7.pth").write_bytes(b"of a run on eight devices")
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    assert not (old / "rng_state_7.pth").exists()
    assert fault(old) is None


def test_the_best_checkpoint_is_known_by_its_place(make_trainer: MakeTrainer, rows_of: Any, tmp_path: Path) -> None:
    options = dict(eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", greater_is_better=True)
    trainer = make_trainer(
        test=rows_of("pretrain", 4), max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2, **options
    )
    trainer.train()  # the loss falls: the first is the greatest
    best = str(tmp_path / "run" / "checkpoint-1")
    for step in (1, 3):
        state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == best
    assert trainer.state.best_model_checkpoint == best
    assert not (tmp_path / "run" / "checkpoint-2").exists()


# --- packing, memory, speed ---


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_packed_step_does_not_depend_on_how_it_is_split(make_trainer: MakeTrainer, normalisation: str) -> None:
    done = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            "sft", packed=128, max_steps=3, per_device_train_batch_size=batch, loss_normalisation=normalisation,
            gradient_accumulation_steps=accumulated, adam_epsilon=1e-4,
        )  # fmt: skip
        trainer.train()
        done.append((logged(trainer, "loss"), logged(trainer, "grad_norm"), weights(trainer)))
    (loss, norm, final), *others = done
    assert len(loss) == 3
    for other_loss, other_norm, other_final in others:
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(other_norm, norm, rtol=1e-4, atol=0)
        torch.testing.assert_close(other_final, final, rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_checkpointed_activations_change_nothing(make_trainer: MakeTrainer, task: str) -> None:
    done = []
    for checkpointed in (False, True):
        trainer = make_trainer(task, max_steps=3, gradient_checkpointing=checkpointed)
        trainer.train()
        done.append((logged(trainer, "loss"), weights(trainer)))
    assert done[0][0] == done[1][0]
    torch.testing.assert_close(done[0][1], done[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("how", [{"packed": 128}, {"train_sampling_strategy": "group_by_length"}])
def test_a_resumed_run_has_the_same_packed_or_grouped_steps(
    make_trainer: MakeTrainer, tmp_path: Path, how: dict[str, Any]
) -> None:
    options = dict(max_steps=7, per_device_train_batch_size=2, save_strategy="steps", save_steps=5, **how)
    whole = make_trainer("sft", **options)  # epochs are shorter than that
    whole.train()
    assert whole.state.epoch > 1
    shutil.move(tmp_path / "run" / "checkpoint-5", tmp_path / "kept")
    again = make_trainer("sft", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert logged(again, "loss") == logged(whole, "loss")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(again).items())


def test_an_optimiser_in_8_bits_learns(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=20, optim="adamw_bnb_8bit", loss_normalisation="token")
    before = weights(trainer)
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-5:]) < sum(losses[:5])
    assert any(not torch.equal(before[name], after) for name, after in weights(trainer).items())


def test_masters_stay_in_fp32_under_bf16(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=1, bf16=True)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_a_compiled_model_learns_the_same(make_trainer: MakeTrainer, task: str) -> None:
    done = []
    for compiled in (False, True):
        torch._dynamo.reset()
        trainer = make_trainer(task, max_steps=3, torch_compile=compiled)
        trainer.train()
        done.append((logged(trainer, "loss"), logged(trainer, "grad_norm")))
    torch.testing.assert_close(done[0], done[1], rtol=1e-4, atol=0)
