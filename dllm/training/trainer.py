"""The Trainer: transformers' own, with the loss of masked diffusion and an order of data that any topology shares.

Shapes: B samples, L positions, N masked positions, V vocabulary.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from dllm.data.order import OrderedDataset
from dllm.data.packing import PackedDataset
from dllm.data.streams import CursorCollator, StreamedRows
from dllm.diffusion.corruption import Corrupted, CorruptionPlan, Documents
from dllm.diffusion.objective import batch_count, token_weights
from dllm.training.arguments import TrainingArguments
from dllm.training.checkpoints import UNFINISHED, last_whole, put_in_place, rotate, seal
from dllm.training.engines import one_table, write_topology
from dllm.training.finite import FiniteGuard
from dllm.training.metrics import Meter, nll_metrics, row_sums, work
from dllm.training.optimizers import build_muon, group_settings


class Scored(NamedTuple):
    """What one forward gives the loss."""

    loss: Tensor
    """The sum of the cross-entropies by their weights, over `denominator`; with a gradient."""
    nll_N: Tensor
    """fp32, in nats, at the masks in row order; without a gradient."""
    noisy: Corrupted
    """The masked batch."""
    aux: Tensor | None
    """A mixture of experts' load-balancing loss, before its coefficient."""


class MaskedDiffusionTrainer(transformers.Trainer):
    """Trains a mask predictor.

    Args:
        model: takes `input_ids`, `attention_mask` ([B, L] or None), `logits_to_keep` (bool [B, L]), `targets` [N] and
            `target_weights` [N]; gives `loss` and `nll` [N].
        args: the settings.
        processing_class: the tokenizer, saved with every checkpoint.
        train_dataset: rows that the collator understands.
        eval_dataset: likewise.
        make_collator: gives the collator for (seed, samples of one step, whether it is for evaluation).
        make_packed: (rows, seed, packed rows of one step) -> `dllm.data.packing.PackedDataset`; None without packing.
        **kwargs: of `transformers.Trainer`.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Any,
        eval_dataset: Any | None,
        make_collator: Callable[[int, int, bool], Callable[[list[dict[str, Any]]], dict[str, Tensor]]],
        make_packed: Callable[[Any, int, int], Dataset[dict[str, Any]]] | None = None,
        **kwargs: Any,
    ) -> None:
        group = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        seed = args.data_seed if args.data_seed is not None else args.seed
        collator = make_collator(seed, group, False)
        self.stream = train_dataset if isinstance(train_dataset, StreamedRows) else None
        self._writing_to: Path | None = None
        self._settings: list[dict[str, Any]] = []
        length_of = getattr(collator, "length_of", None) if args.pad_to == "global" else None
        if make_packed is not None:
            ordered: Any = make_packed(train_dataset, seed, group)
        else:
            lengths = None
            if args.groups_by_length:
                lengths = [len(ids) for ids in train_dataset["input_ids"]]
            ordered = OrderedDataset(
                train_dataset, seed=seed, group=group, shuffle=self.stream is None, length_of=length_of, lengths=lengths
            )
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            train_dataset=ordered,
            eval_dataset=None
            if eval_dataset is None
            else OrderedDataset(eval_dataset, seed=seed, group=len(eval_dataset), shuffle=False),
            data_collator=collator if self.stream is None else CursorCollator(collator=collator),
            compute_metrics=_mean_loss,
            **kwargs,
        )
        self.eval_collator = make_collator(seed, group, True)
        # ours is normalised over the whole accumulated batch already; transformers must not divide it again
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # how releases say it that do not look at the line above, such as 5.17
        if model.config.mask_token_id is None:  # some public files leave it to the tokenizer
            model.config.mask_token_id = processing_class.mask_token_id
        self.mask_token_id = int(model.config.mask_token_id)
        masks = {"times": args.times, "masking": args.masking, "seed": seed}
        times = {"min_time": args.min_time, "max_time": args.max_time}
        self.train_plan = CorruptionPlan(group=group, **times, **masks)  # type: ignore[arg-type]
        # evaluation: a fixed grid of t and fixed masks, so that two evaluations differ by the model alone
        self.eval_plan = CorruptionPlan(
            group=1 if eval_dataset is None else len(eval_dataset), **{**masks, "times": "stratified"}  # type: ignore[arg-type]
        )  # fmt: skip

        self.meter = Meter(args.device, work(model), whole=(args.min_time, args.max_time) == (0.0, 1.0))
        self.guard = None if args.fp16 else FiniteGuard(args.process_index, self._describe, self._go_on)
        self.sampler: Callable[[nn.Module, int], None] | None = None
        """Called on every rank after each step, with the model and the steps done; see `dllm.training.samples`."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # OrderedDataset shuffles

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """transformers' own, with the collator of evaluation."""
        training, self.data_collator = self.data_collator, self.eval_collator  # type: ignore[has-type]
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """The loss's denominator: over all accumulation steps, and over all ranks."""
        if not batch_samples:
            return None
        self.meter.start(self.state.global_step)
        if self.stream is not None:
            for batch in batch_samples:
                self.stream.note(batch.pop("cursor"))
        counts = [self._count(batch) for batch in batch_samples]
        total = torch.stack(counts).sum().float().to(device)
        return self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total

    def _count(self, batch: dict[str, Tensor]) -> Tensor:
        return batch_count(batch["maskable"], self.args.loss_normalisation, batch.get("document"))  # type: ignore[arg-type]

    def score(
        self, model: nn.Module, inputs: dict[str, Tensor], plan: CorruptionPlan, denominator: Tensor | float
    ) -> Scored:
        """One forward: masks a batch and scores the clean tokens at the masks."""
        ids, maskable, packed = inputs["input_ids"], inputs["maskable"], inputs.get("document")
        documents = None
        if packed is not None:
            documents = Documents(packed, *(inputs[name] for name in ("position", "step", "place", "of")))
        noisy = plan.corrupt(ids, maskable, inputs["sample"], self.mask_token_id, documents)
        masked = noisy.masked_BL
        weight_N = token_weights(noisy.weight_BL, masked, maskable, self.args.loss_normalisation, packed)  # type: ignore[arg-type]
        output = model(
            input_ids=noisy.xt_BL,
            attention_mask=inputs.get("attention_mask"),
            document_ids=inputs.get("document_ids") if packed is None else packed,
            logits_to_keep=masked,
            targets=ids[masked],
            target_weights=weight_N / denominator,
        )
        return Scored(output.loss, output.nll, noisy, getattr(output, "aux_loss", None))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of this rank's micro-batch: its part of the sum, over the global batch's denominator."""
        if num_items_in_batch is None:
            num_items_in_batch = self._count(inputs)
        # data-parallel engines average gradients over ranks, and the denominator already spans them
        scored = self.score(model, inputs, self.train_plan, num_items_in_batch / self.args.world_size)
        loss = scored.loss
        if scored.aux is not None:  # how even a micro-batch's load is; the mean over the step's micro-batches
            coefficient = self.model.config.router_aux_loss_coef
            loss = loss + coefficient * scored.aux / self.current_gradient_accumulation_steps
        rows = row_sums(scored.nll_N, scored.noisy.weight_BL, scored.noisy.masked_BL, inputs["maskable"])
        self.meter.add(rows, inputs, self.state.global_step)
        if self.guard is not None:
            loss = self.guard.add(loss, inputs["sample"], rows[inputs["row"]] if "row" in inputs else rows)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's share of the evaluation loss, fp64 [B, 2 + 2Q + 2]: numerator and denominator, so that ranks add up
        exactly, and what `row_sums` gives of the row.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scored = self.score(model, inputs, self.eval_plan, 1.0)
        rows = row_sums(scored.nll_N, scored.noisy.weight_BL, scored.noisy.masked_BL, inputs["maskable"])
        numerator_B, denominator_B = rows[:, -2:].unbind(1)
        if self.args.loss_normalisation != "token":
            if self.args.loss_normalisation == "sequence":
                numerator_B = numerator_B / denominator_B.clamp(min=1)
            denominator_B = inputs["maskable"].any(1).to(rows.dtype)
        shares = torch.cat([numerator_B[:, None], denominator_B[:, None], rows], 1)
        return numerator_B.sum() / denominator_B.sum(), shares, denominator_B

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop, its loss replaced by the exact quotient: a mean over batches would depend on their sizes."""
        kwargs["prediction_loss_only"] = False
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = output.metrics.pop(f"{prefix}_exact_loss")
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' own, with the metrics of the interval beside the training loss."""
        if "loss" in logs:
            vector = self.meter.vector()[None]
            ranks = self.accelerator.gather(vector) if self.args.world_size > 1 else vector
            logs |= self.meter.read(ranks, self.state.global_step, self.state.max_steps)
            if str(self.args.include_num_input_tokens_seen) == "no":  # else transformers counts
                self.state.num_input_tokens_seen += self.meter.tokens
            logs["tokens_seen"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        entered = time.monotonic()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.sampler is not None:
            self.sampler(self.model, self.state.global_step)
        self.meter.leave_out(entered)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """transformers' own; it is the last thing before the optimiser's step, and one number for all ranks."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.guard is not None:
            # DeepSpeed has made its step by now, unless the gradient was not finite: that one it skips
            engine = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
            overflow = engine is not None and bool(getattr(engine.engine.optimizer, "overflow", False))
            self.guard.check(norm, self.state.global_step, overflow=overflow)
        return norm

    def _describe(self, sample: int) -> str:
        """Which row a sample is, and how it begins."""
        if not isinstance(self.train_dataset, OrderedDataset | PackedDataset):
            return "of a stream"
        number = self.train_dataset.row_number(sample)
        ids = self.train_dataset.rows[number]["input_ids"][:12]
        return f"row {number}, {self.processing_class.decode(ids)!r} ..."

    def _go_on(self) -> str:
        """What to do once a run has stopped at a number that is not finite."""
        last = last_whole(Path(str(self.args.output_dir)))
        what = "a lower --learning_rate, or look at these rows"
        if last is None:
            return f"The step was not applied, and no checkpoint was saved yet: start anew with {what}."
        return f"The step was not applied, and {last} is whole: go on from it with --resume_from_checkpoint auto and {what}."

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with one_table(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:
        # transformers looks whether the steps are done after a step, so a finished run that goes on would take one more
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """The output folder; while a checkpoint is written, the one inside it for what is not whole."""
        return str(self._writing_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """transformers' checkpoint, sealed and put in its place once every rank has written its files; a failed one goes."""
        name = f"checkpoint-{self.state.global_step}"
        run_folder = Path(self._get_output_dir(trial))
        unfinished, folder = run_folder / UNFINISHED / name, run_folder / name
        if self.args.should_save:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing_to = unfinished.parent
        # older checkpoints are deleted once this one is whole, and transformers would do it earlier
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit, self._writing_to = keep, None
        if self.state.best_global_step:  # transformers looked for it beside the unfinished one
            best = run_folder / f"checkpoint-{self.state.best_global_step}"
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if self.stream is not None:
            self.stream.save(unfinished, self.args.process_index)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            write_topology(unfinished, self.args)
            seal(unfinished)
            put_in_place(unfinished, folder)
            rotate(run_folder, keep, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' own; under FSDP it would write no model where each rank saves its part of the checkpoint."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = self.accelerator.get_state_dict(self.model)
        self._save(output_dir or self.args.output_dir, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """transformers' own, and what ZeRO-3 mixes up when it loads a checkpoint of another number of processes."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            for group, settings in zip(self.optimizer.param_groups, self._settings, strict=True):
                group.update(settings)  # it gave all groups those of the first
            for state in self.optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].clone()  # and all tensors one counter, which each would then advance

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW by transformers, or Muon with AdamW."""
        if self.args.optimizer == "adamw" or self.optimizer is not None:  # type: ignore[has-type]
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
            self._settings = group_settings(optimizer)
            return optimizer
        whole = self.model if model is None else model
        optimizer = build_muon(
            whole,
            muon_learning_rate=self.args.muon_learning_rate,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            decayed=set(self.get_decay_parameter_names(whole)),
        )
        self.optimizer = optimizer
        return optimizer


def _mean_loss(prediction: EvalPrediction) -> dict[str, float]:
    # exact sums: the order in which ranks and batches bring the rows does not enter
    columns = np.asarray(prediction.predictions, dtype=np.float64).T.tolist()
    numerator, denominator, *sums = (math.fsum(column) for column in columns)
    return {"exact_loss": numerator / denominator, **nll_metrics(sums)}
