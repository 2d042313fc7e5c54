"""What can be set about a training run; the text beside a field is its help on the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
import transformers
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dllm.diffusion.objective import check_normalisation
from dllm.errors import MissingExtraError, OptionError, did_you_mean
from dllm.layers.processors import bf16_is_fast
from dllm.training.adapters import AdapterArguments
from dllm.training.described import described as _help


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = _help(
        "Folder, hub id, or builtin:NAME of a checkpoint. Pretraining takes its configuration and tokenizer and starts from "
        "fresh weights (see --continue_from_weights), and also takes a preset: tiny, small, 50m, 1b, 8b, moe-tiny, moe-7b.",
        default="tiny",
    )
    tokenizer_name_or_path: str | None = _help(
        "Tokenizer, when it is not the model's: folder or hub id, builtin:char (one token a character), or bpe:N (a "
        "byte-level BPE of N entries, trained on the training text). A preset without one uses builtin:char.",
        default=None,
    )
    config_overrides: str | None = _help(
        "Changes to the configuration of a model that starts fresh, such as n_layers=8,d_model=192.", default=None
    )
    continue_from_weights: bool = _help(
        "Pretraining starts from the checkpoint's weights, not from fresh ones.", default=False
    )
    adapter: AdapterArguments = field(
        init=False,  # options of their own
        default_factory=AdapterArguments,
        metadata={"help": "Whether an adapter is trained in place of the model, and which."},
    )


@dataclass
class DataArguments:
    """Which data, and how they become rows."""

    dataset_args: str = _help(
        "Data, such as 'builtin:text', 'data/own.jsonl[train:10000,test:1000]' or a hub id with limits; several are joined "
        "by '|' or ' + ', mixed where they have weights. Keys: train, test, name, split, test_split, revision, weight, "
        "streaming.",
        default="builtin:text",
    )
    max_length: int | None = _help(
        "Tokens in a row; longer text is cut. By default 1024, or the checkpoint's context where that is less.",
        default=None,
    )
    text_column: str | None = _help("The column to pretrain on; by default text, or conversations.", default=None)
    messages_column: str | None = _help(
        "The column of conversations, role and content or from and value; by default it is found.", default=None
    )
    prompt_column: str | None = _help("The column of questions, where they stand apart from the answers.", default=None)
    completion_column: str | None = _help("The column of their answers.", default=None)
    system_column: str | None = _help("The column of system prompts; by default system, if there is one.", default=None)
    truncation: str | None = _help(
        "What fine-tuning does to conversations over max_length: right cuts their end (the default), left the oldest tokens "
        "after the first, filter leaves them out.",
        default=None,
    )
    turns: str | None = _help(
        "drawn: one answer of a conversation, another each time, is learnt (the default); all: each answer with what comes "
        "before it is a row of its own.",
        default=None,
    )
    num_proc: int | None = _help("Processes that turn text into tokens.", default=None)
    packing: bool = _help(
        "Fine-tuning puts several conversations into each row of max_length tokens, in place of padding. Each keeps its own "
        "time, masks, positions and share of the loss, and sees itself alone; a sample of the batch size is then such a row.",
        default=False,
    )
    pack_eos: str = _help(
        "End-of-text tokens that are learnt after each packed answer: a number, or mirror for as many as padding would have "
        "added.",
        default="8",
    )
    document_masks: bool = _help(
        "Pretraining: the documents that lie end to end in a row do not see each other.", default=False
    )
    load_preprocessed_data: str | None = _help(
        "A folder that dllm prepare wrote, in place of --dataset_args.", default=None
    )
    streaming: bool = _help(
        "Reads and tokenises the data while training, and never holds it whole; needs --max_steps.", default=False
    )
    shuffle_buffer: int = _help("Documents of a stream that are shuffled together.", default=10_000)
    random_length: float = _help(
        "The share of pretraining steps whose rows are cut to a random length, so that short contexts are seen.",
        default=0.01,
    )


@dataclass
class PrepareArguments:
    """Where prepared rows go."""

    output_dir: str = _help("The folder to write; it must not exist yet.", default="")


_UNUSED = {
    "label_smoothing_factor": "the loss of masked diffusion is a bound on the likelihood, without smoothing.",
    "auto_find_batch_size": "masks and times are keyed by the samples of a step, so that their number is fixed.",
    "use_liger_kernel": "it has no kernels for LLaDA; head and loss are fused here anyway.",
}
"""Options of transformers that would do nothing, or harm: why."""


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' TrainingArguments with the defaults of masked diffusion, and what that adds."""

    loss_normalisation: str = _help(
        "What the loss is divided by, over the global batch: token (all maskable tokens), sequence (each answer's length, "
        "then the answers) or batch (the sequences).",
        default="token",
    )
    times: str = _help(
        "stratified: the times t of a step's samples are spread evenly, which lowers the variance; independent: each is "
        "drawn by itself.",
        default="stratified",
    )
    min_time: float = _help(
        "Times t of training are drawn from [min_time, max_time]; evaluation spans [0, 1].", default=0.0
    )
    max_time: float = _help(
        "Its other end. Text that is mostly masked is mostly noise: 0.75 learns a task of given clues faster.",
        default=1.0,
    )
    masking: str = _help(
        "bernoulli: each token is masked by itself with probability p(t); exact: an exact count of tokens is masked.",
        default="bernoulli",
    )
    pad_to: str = _help(
        "Fine-tuning pads the rows of a step with end-of-text to the longest of the step: of the whole step (global, so "
        "that the loss does not depend on how it is split), or of each device's part of it (local, less work). Evaluation's "
        "rows are taken at their own lengths.",
        default="global",
    )
    optimizer: str = _help(
        "adamw: what --optim names, for everything; muon: Muon for the matrices inside the blocks, AdamW for "
        "the rest (embeddings, head, norms, stacked experts).",
        default="adamw",
    )
    muon_learning_rate: float = _help("Learning rate of Muon's matrices; --learning_rate is AdamW's.", default=0.02)

    sample_every: int = _help(
        "Steps between two samples of text, printed and written to samples.jsonl; 0 for none.", default=0
    )
    sample_prompt: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What the samples go on from, one or several texts (fine-tuning: what the user says). By default the "
            "beginning of a row that is not trained on, where there is one."
        },
    )
    sample_length: int = _help("Tokens of a sample.", default=64)
    report_to: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Where the log goes besides log.jsonl, one or several: tensorboard, wandb, trackio, none ... By default "
            "tensorboard where it is installed; its files are in OUTPUT_DIR/runs."
        },
    )
    logging_nan_inf_filter: bool = _help(
        "Leaves what is not finite out of the logged loss. Off: such a loss ends the run.", default=False
    )

    output_dir: str | None = _help("Where checkpoints, the log and the final model go.", default=None)
    learning_rate: float = _help("Peak learning rate.", default=4e-4)
    weight_decay: float = _help("Weight decay of matrices and embeddings, not of the norms inside blocks.", default=0.1)
    bf16: bool | None = _help(  # type: ignore[assignment]
        "Mixed precision in bf16; by default wherever the processor has it.", default=None
    )
    remove_unused_columns: bool = _help("The collators decide what a batch holds.", default=False)
    logging_steps: float = _help("Steps between two lines of the log.", default=10)
    ddp_timeout: int = _help(
        "Seconds that processes wait for one another, such as for the one that makes the rows of all.", default=10_800
    )
    save_total_limit: int | None = _help("Checkpoints to keep; older ones are deleted.", default=2)

    def __post_init__(self) -> None:
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            # without it two processes on a CPU would train two models side by side, silently
            self.use_cpu = True
        if self.use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, would warn of no GPU
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_fast(self.use_cpu)
        if self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            self.ddp_find_unused_parameters = False  # every parameter takes part; looking for others costs a traversal
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)}: it is 1 or more.")
        if self.num_train_epochs <= 0:
            raise OptionError(f"--num_train_epochs {self.num_train_epochs}: it is above 0.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise OptionError(
                f"--max_steps {self.max_steps}: it is 1 or more; left out, --num_train_epochs says how long."
            )
        for name in ("label_smoothing_factor", "auto_find_batch_size", "use_liger_kernel"):
            if getattr(self, name):
                raise OptionError(f"--{name}: {_UNUSED[name]} Leave it out.")
        for name in ("sample_every", "sample_length"):
            if getattr(self, name) < (name == "sample_length"):
                raise OptionError(f"--{name} {getattr(self, name)}: it is {int(name == 'sample_length')} or more.")
        if self.sample_prompt and not self.sample_every:
            raise OptionError("--sample_prompt needs --sample_every K, the steps between two samples.")
        self.report_to = trackers(self.report_to)
        if self.dataloader_persistent_workers:
            raise OptionError(
                "--dataloader_persistent_workers: workers that live on would keep the first epoch's order of the data; leave "
                "this option out."
            )
        super().__post_init__()
        check_normalisation(self.loss_normalisation)
        for name, allowed in (
            ("times", ("stratified", "independent")),
            ("masking", ("bernoulli", "exact")),
            ("pad_to", ("global", "local")),
            ("optimizer", ("adamw", "muon")),
        ):
            if getattr(self, name) not in allowed:
                raise OptionError(f"--{name} {getattr(self, name)!r} does not exist: it is {' or '.join(allowed)}.")
        if not 0 <= self.min_time < self.max_time <= 1:
            raise OptionError(
                f"--min_time {self.min_time} --max_time {self.max_time}: 0 <= min_time < max_time <= 1 is needed."
            )
        if self._strategy not in ("random", "group_by_length"):
            raise OptionError(
                f"--train_sampling_strategy {self.train_sampling_strategy}: the order of the data is a keyed shuffle, random or "
                f"group_by_length."
            )

    @property
    def _strategy(self) -> str:
        return str(getattr(self.train_sampling_strategy, "value", self.train_sampling_strategy))

    @property
    def groups_by_length(self) -> bool:
        """Whether a step holds rows of about one length."""
        return self._strategy == "group_by_length"

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = super().device
        # several processes on a CPU get cpu:0, a place to which torch.load, and so transformers 5.17, can restore nothing
        return torch.device("cpu") if device.type == "cpu" else device


def trackers(named: str | Sequence[str]) -> list[str]:
    """Where the log goes, checked before anything is trained; no name means tensorboard where it is installed.

    Raises:
        OptionError: a name that transformers does not know.
        MissingExtraError: its package is not installed.
    """
    if not named:
        return ["tensorboard"] if find_spec("tensorboard") else ["none"]
    names = [named] if isinstance(named, str) else list(named)
    for name in names:
        if name not in (known := {*INTEGRATION_TO_CALLBACK, "all", "none"}):
            raise OptionError(f"--report_to {name!r} does not exist.{did_you_mean(name, known)}")
        if name in ("tensorboard", "trackio", "wandb") and find_spec(name) is None:
            raise MissingExtraError(name, "tracking" if name == "tensorboard" else name, f"--report_to {name}")
    return names
