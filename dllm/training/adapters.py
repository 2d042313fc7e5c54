"""Training an adapter in place of the model: the options, how the frozen base is loaded, and the new adapter on it.

Source: Hu et al., LoRA, arXiv:2106.09685; Dettmers et al., QLoRA, arXiv:2305.14314; Liu et al., DoRA, arXiv:2402.09353;
Kalajdzievski, rsLoRA, arXiv:2312.03732. peft has them all; this module says what fits a mask predictor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BitsAndBytesConfig, HfArgumentParser, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_model_param_count

from dllm.errors import MissingExtraError, OptionError, did_you_mean
from dllm.layers.adapters import QUANTISATION, import_peft, is_adapter, quiet, read_settings
from dllm.training.described import described as _help

if TYPE_CHECKING:
    from dllm.training.arguments import TrainingArguments

ALL_LINEAR = "all-linear"
ADAPTER_DEFAULTS: dict[str, dict[str, Any]] = {"pretrain": {}, "sft": {"learning_rate": 2.5e-4}}
"""What --lora changes in a task's defaults: an adapter starts from nothing and takes ten times the model's rate."""

WHOLE = ("config.json", "model.safetensors")
"""Files of the checkpoint of a model that is trained whole."""


@dataclass
class AdapterArguments:
    """Whether an adapter is trained, and which."""

    lora: bool = _help(
        "Train low-rank adapters (LoRA) and leave the model as it is: checkpoints hold the adapter alone. On an adapter's own "
        "folder, that adapter is trained on.",
        default=False,
    )
    r: int = _help("Rank of the adapters.", default=16)
    lora_alpha: float = _help("The adapters' product is scaled by lora_alpha / r.", default=32)
    lora_dropout: float = _help(
        "Dropout on what the adapters read. Above 0 the loss depends on how a step is split over processes.",
        default=0.0,
    )
    target_modules: list[str] = field(
        metadata={
            "help": "Linear layers that get an adapter, by name (dense: q_proj k_proj v_proj attn_out ff_proj up_proj "
            "ff_out; mixtures: q_proj k_proj v_proj o_proj), or all-linear; never the head."
        },
        default_factory=lambda: [ALL_LINEAR],
    )
    target_parameters: list[str] | None = field(
        metadata={
            "help": "Stacked tensors of a mixture's experts that get an adapter of rank r for each expert: experts.gate_up_proj "
            "experts.down_proj. None by default; takes no dropout, no DoRA and no quantised base."
        },
        default=None,
    )
    modules_to_save: list[str] | None = field(
        metadata={
            "help": "Modules trained whole beside the adapters and saved with them, such as wte (the embedding) or "
            "transformer.ff_out (the head); in a mixture embed_tokens, lm_head."
        },
        default=None,
    )
    use_dora: bool = _help("DoRA: each target's magnitude is trained apart from its direction.", default=False)
    use_rslora: bool = _help("rsLoRA: scale by lora_alpha / sqrt(r), which keeps high ranks learning.", default=False)
    base_dtype: str = _help(
        "The frozen weights in memory: float32, bfloat16, float16, or auto, the dtype that is computed in (see --bf16). "
        "Adapters are float32.",
        default="auto",
    )
    load_in_4bit: bool = _help(
        "QLoRA: the blocks' linear layers as NF4 with doubly quantised scales; what is not linear stays in --base_dtype.",
        default=False,
    )
    load_in_8bit: bool = _help("The blocks' linear layers in 8 bits (LLM.int8).", default=False)

    def __post_init__(self) -> None:
        if not self.lora:
            given = [f.name for f in fields(self) if getattr(self, f.name) != _default(f)]
            if given:
                raise OptionError(f"--{given[0]} is of adapters: add --lora, or leave it out.")
            return
        self.target_modules = _names(self.target_modules)
        for name in ("target_parameters", "modules_to_save"):
            setattr(self, name, _names(getattr(self, name) or []) or None)
        if self.r < 1 or self.lora_alpha <= 0:
            raise OptionError(f"--r {self.r} --lora_alpha {self.lora_alpha}: a rank of 1 or more and a scale above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise OptionError(f"--lora_dropout {self.lora_dropout}: it is at least 0 and less than 1.")
        if self.base_dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise OptionError(
                f"--base_dtype {self.base_dtype!r} does not exist: it is auto, float32, bfloat16 or float16."
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise OptionError("--load_in_4bit --load_in_8bit: choose one.")
        if self.use_dora and self.load_in_8bit:
            raise OptionError("--use_dora does not go with --load_in_8bit: take --load_in_4bit, or leave one out.")
        if self.target_parameters and (self.lora_dropout or self.use_dora or self.load_in_4bit or self.load_in_8bit):
            raise OptionError(
                "--target_parameters takes no --lora_dropout, --use_dora, --load_in_4bit or --load_in_8bit: leave one out."
            )


def _default(setting: Any) -> Any:
    return setting.default if setting.default is not MISSING else setting.default_factory()


def _names(given: list[str]) -> list[str]:
    """Names that were separated by blanks, commas or both."""
    return [name for part in given for name in part.replace(",", " ").split()]


def wants_adapter(argv: Sequence[str] | None) -> bool:
    """Whether a command line (`sys.argv` by default) asks for one: --lora, and neither --lora False nor --no_lora."""
    parser = HfArgumentParser(AdapterArguments, allow_abbrev=False, add_help=False)
    try:
        return bool(parser.parse_known_args(None if argv is None else list(argv))[0].lora)
    except SystemExit:  # a value that does not fit: the parser of all options says so
        return False


def check_adapter(adapter: AdapterArguments, args: TrainingArguments, resume: str | None) -> None:
    """Whether the options of adapters fit the other options and the checkpoint that the run goes on from.

    Raises:
        OptionError: they do not.
        MissingExtraError: peft or bitsandbytes is not installed.
    """
    whole = resume is not None and any((Path(resume) / name).exists() for name in WHOLE)  # FSDP's has neither
    if resume is not None and (whole if adapter.lora else is_adapter(Path(resume))):
        raise OptionError(
            f"--resume_from_checkpoint {resume}: that is a checkpoint of a model trained whole: leave --lora out."
            if adapter.lora
            else f"--resume_from_checkpoint {resume}: that is an adapter's checkpoint: give --lora and its options again."
        )
    if not adapter.lora:
        return
    import_peft("--lora")
    if args.optimizer != "adamw":
        raise OptionError(
            f"--optimizer {args.optimizer} --lora: Muon's steps are made for whole matrices, not for the two factors of a "
            f"low-rank one. Leave --optimizer out."
        )
    if not (adapter.load_in_4bit or adapter.load_in_8bit):
        return
    bits = "--load_in_4bit" if adapter.load_in_4bit else "--load_in_8bit"
    try:
        import bitsandbytes  # type: ignore[import-untyped]  # noqa: F401  to know that it can be
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "quantisation", bits) from error
    for engine, used in (
        ("DeepSpeed ZeRO-3", is_deepspeed_zero3_enabled()),
        ("FSDP", bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"),
        ("--torch_compile", args.torch_compile),
    ):
        if used:
            raise OptionError(
                f"{bits} does not go with {engine}. Take DDP or DeepSpeed ZeRO-1 or 2, which share out the optimiser's state; or "
                f"leave {bits} out."
            )


def load_to_train(load_model: Callable[..., Any], name: str, adapter: AdapterArguments, args: TrainingArguments) -> Any:
    """A model to be trained whole, in fp32; or the frozen base of an adapter, with the adapter on it.

    Args:
        load_model: see `dllm.pipelines.llada.loading.load_model`.
        name: a folder, a hub id or `builtin:NAME`; of a model or of an adapter, which is merged or, with --lora, trained on.
        adapter: the options of adapters.
        args: say which dtype is computed in, and where.
    """
    if not adapter.lora:
        return load_model(name, dtype="float32", quantization_config=None)
    model = load_model(name, keep_adapter=True, **base_options(adapter, args))
    return adapt(model, adapter, checkpointing=args.gradient_checkpointing, name=name)


def base_options(adapter: AdapterArguments, args: TrainingArguments) -> dict[str, Any]:
    """How `load_model` is asked for the frozen base."""
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    options: dict[str, Any] = {"dtype": compute if adapter.base_dtype == "auto" else adapter.base_dtype}
    options["quantization_config"] = None
    if adapter.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    elif adapter.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if options["quantization_config"] is not None and args.device.type != "cpu":
        options["device_map"] = {"": args.device}  # weights are quantised where they will be used
    return options


def adapt(model: Any, adapter: AdapterArguments, *, checkpointing: bool, name: str) -> Any:
    """Puts a new adapter onto a model, or takes up the one that it has; all else is frozen.

    Args:
        model: a mask predictor, or peft's PeftModel of one.
        adapter: its settings.
        checkpointing: whether activations are recomputed in the backward.
        name: of the base model, for those who load the adapter: a folder, a hub id, `builtin:NAME`.

    Returns:
        PeftModel whose trainable parameters are fp32, and whose `save_pretrained` writes the adapter alone.

    Raises:
        OptionError: a target that does not exist, or a module that cannot be trained apart.
    """
    peft = import_peft("--lora")
    if not isinstance(model, peft.PeftModel):
        model.name_or_path = str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name
        settings = _settings(model, adapter, peft)
        try:
            with quiet():
                model = peft.get_peft_model(model, settings)
        except (ValueError, NotImplementedError, TypeError) as error:
            raise OptionError(f"--lora: {str(error).splitlines()[0]}") from error
    else:
        given = {f.name: value for f in fields(adapter) if (value := getattr(adapter, f.name)) != _default(f)}
        stored = model.peft_config[model.active_adapter].to_dict()
        _refuse_difference(given, stored, f"the adapter {name!r}, which is trained on,")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # an evaluation on a CPU would repack bitsandbytes' weights for good, in a form that passes no gradient back
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft leaves whole modules in the base's dtype
    if checkpointing:  # reentrant checkpoints need an input that asks for a gradient, and the embedding is frozen
        model.enable_input_require_grads()
    model.save_pretrained = _saver(model)
    return model


def _settings(model: PreTrainedModel, adapter: AdapterArguments, peft: Any) -> Any:
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != head]
    known = sorted({name.rpartition(".")[2] for name in linear})
    wanted = adapter.target_modules
    if wanted == [ALL_LINEAR]:
        wanted = known
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise OptionError(
                f"--target_modules {target!r} names no linear layer of this model.{did_you_mean(target, known)} A mixture's "
                f"experts are stacked tensors: see --target_parameters. The head takes no adapter: see --modules_to_save."
            )
    tensors = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    for target in adapter.target_parameters or ():
        if not any(name.endswith(f".{target}") for name in tensors):
            stacked = sorted({".".join(name.split(".")[-2:]) for name in tensors})
            there = did_you_mean(target, stacked) or " It has none: leave the option out."
            raise OptionError(f"--target_parameters {target!r} names no stacked tensor of this model.{there}")
    for saved in adapter.modules_to_save or ():
        _check_whole(model, saved)
    return peft.LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=sorted(wanted),
        # the head of a dense model has the name of a layer in every block
        exclude_modules=None if head is None else [head],
        target_parameters=adapter.target_parameters,
        modules_to_save=adapter.modules_to_save,
        use_dora=adapter.use_dora,
        use_rslora=adapter.use_rslora,
    )


def _check_whole(model: PreTrainedModel, target: str) -> None:
    modules = {name: module for name, module in model.named_modules() if name.endswith(target)}
    if not modules:
        known = {name.rpartition(".")[2] for name, _ in model.named_modules()} - {""}
        raise OptionError(
            f"--modules_to_save {target!r} names no module of this model."
            f"{did_you_mean(target, {name for name in known if not name.isdigit()})}"
        )
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if ends[0].weight is ends[1].weight and any(module in ends for module in modules.values()):
        raise OptionError(
            f"--modules_to_save {target}: embedding and head of this model are one matrix, and cannot be trained apart from it. "
            f"Leave {target} out."
        )


COMPARED = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules", "target_parameters",
            "modules_to_save")  # fmt: skip


def _refuse_difference(asked: dict[str, Any], stored: dict[str, Any], where: str) -> None:
    for name in COMPARED:
        old, new = (sorted(v) if isinstance(v, list | set) else v or None for v in (stored.get(name), asked.get(name)))
        if name in asked and old != new:
            raise OptionError(f"--{name} {_shown(new)}: {where} has {_shown(old)}. Give that, or begin a new adapter.")


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def check_resumed(model: Any, resume: str | None) -> None:
    """Whether the adapter of the checkpoint that the run goes on from is of the same make as the model's, if it has one.

    Raises:
        OptionError: a setting differs.
    """
    if resume is not None and hasattr(model, "peft_config") and is_adapter(Path(resume)):
        settings = model.peft_config[model.active_adapter].to_dict()
        _refuse_difference(settings, read_settings(Path(resume)), f"the adapter of --resume_from_checkpoint {resume}")


def _saver(model: Any) -> Callable[..., None]:
    """peft's save_pretrained, with a note of the base's quantisation beside the adapter."""
    save = model.save_pretrained
    quantisation = getattr(model.config, "quantization_config", None)

    def save_pretrained(folder: str | Path, **options: Any) -> None:
        # tables are never resized here, and peft would ask the hub whether they were
        save(str(folder), **{"save_embedding_layers": False, **options})
        if quantisation is not None and options.get("is_main_process", True):
            text = json.dumps(quantisation.to_dict(), indent=2, default=str)
            (Path(folder) / QUANTISATION).write_text(text + "\n", encoding="utf-8")

    return save_pretrained


def count_parameters(model: Any) -> tuple[int, int]:
    """(those that are trained, all), packed and divided ones counted as what they stand for."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trained, whole = model.get_nb_trainable_parameters()
        return int(trained), int(whole)
    count = get_model_param_count(model)
    return count, count
