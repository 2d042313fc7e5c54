"""Loads a model, or makes a fresh one, with errors that say what to do."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from dllm.errors import CheckpointError, OptionError, did_you_mean, first_line
from dllm.layers.adapters import SETTINGS, attach, base_of, is_adapter, merged, read_quantisation
from dllm.layers.processors import bf16_is_fast
from dllm.pipelines.llada.adaptable import FAMILIES
from dllm.pipelines.llada.checkpoint_files import HUB_OPTIONS, hub_folder, is_hub_id, read_header, tensor_headers
from dllm.pipelines.llada.embedded import resolve
from dllm.pipelines.llada.models.configuration_llada import IMPLEMENTED, LLaDAConfig, is_mixture
from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig
from dllm.pipelines.llada.models.modeling_llada import LLaDAModelLM
from dllm.pipelines.llada.models.modeling_lladamoe import LLaDAMoEModelLM
from dllm.pipelines.llada.presets import PRESETS

WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")


def best_device() -> torch.device:
    """cuda, mps or cpu: the first that is there."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def to_device(model: PreTrainedModel, device: torch.device | None = None) -> PreTrainedModel:
    """Moves a model to a device, to be sampled from there in a dtype that the device is fast in.

    On a CPU that has no bf16 products, where imitated ones take 4 times as long as those of fp32, weights in bf16 or fp16 become
    fp32; not those of a quantised model, nor where memory is short, for they take twice as much.

    Args:
        model: of `load_model`.
        device: by default that of `best_device`.

    Returns:
        The model itself.
    """
    device = device or best_device()
    half = model.dtype in (torch.bfloat16, torch.float16) and not getattr(model, "is_quantized", False)
    if device.type == "cpu" and half and not bf16_is_fast(cpu=True):
        more = 2 * sum(parameter.numel() for parameter in model.parameters())
        if more < psutil.virtual_memory().available:
            model = model.float()
    return model.to(device)


def load_model(name_or_path: str | Path, *, keep_adapter: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A checkpoint's model in evaluation mode, from safetensors alone.

    The name may be an adapter's: its base is loaded as the adapter's files say, and the adapter merged into the weights. On a
    base that was quantised in training, and is so again, it stays apart, for merging would round it; `quantization_config=None`
    loads that base as it is.

    Args:
        name_or_path: a folder, a hub id, or `builtin:NAME`.
        keep_adapter: give peft's PeftModel, with the adapter ready to be trained on, where the name is an adapter's.
        **kwargs: passed to `from_pretrained` (dtype, device_map, attn_implementation, ...); `revision`, `token` and `cache_dir`
            are the hub's.

    Raises:
        CheckpointError: there is no such checkpoint, it is not LLaDA's, a file of it is missing or damaged, or a tensor is
            missing or has another shape; no partial model is handed out.
        OptionError: a dtype that does not exist, or an option that would run code.
    """
    for never in ("trust_remote_code", "use_safetensors"):
        if never in kwargs:
            raise OptionError(
                f"load_model takes no {never}: it reads safetensors alone and never runs a checkpoint's code."
            )
    adapter = adapter_folder(name_or_path, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
    if adapter is not None:
        return _load_adapted(adapter, keep_adapter, kwargs)
    hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
    name_or_path = str(name_or_path)
    path = resolve(name_or_path)
    config = load_config(name_or_path, **hub)
    if isinstance(kwargs.get("dtype"), str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = dtype_named(kwargs["dtype"])
    folder = Path(path) if Path(path).is_dir() else hub_folder(path, **hub)
    headers = tensor_headers(folder)
    # packed tensors have shapes of their own, and a base model's names lack the prefix: transformers compares those
    if not hasattr(config, "quantization_config") and any(name.startswith("model.") for name in headers):
        shapes = {name: shape for name, (_, shape) in headers.items()}
        asked = public_shapes(config)
        wrong = {n: (shapes[n], shape) for n, shape in asked.items() if shapes.get(n, shape) != shape}
        refuse_misfits(name_or_path, wrong, asked.keys() - shapes.keys(), folder)
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(
            str(folder),
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            # transformers' own error names no tensor; its report does, and what is wrong is refused below
            **{**kwargs, "ignore_mismatched_sizes": True},
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"The weights of {name_or_path!r} could not be loaded: {first_line(error)}") from error
    mismatched = {name: (tuple(stored), tuple(asked)) for name, stored, asked in report["mismatched_keys"]}
    refuse_misfits(name_or_path, mismatched, report["missing_keys"])
    return model.eval()


def compile_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """torch.compile for each block by itself, in place: sampling and training then run the compiled blocks.

    Blocks are alike, so one of them is compiled and all use it; shapes are dynamic, so rows that come and go compile
    nothing anew. The first forwards take a minute or so, once for each kind of attention (rows of one length, of several,
    a cache).

    Args:
        model: of `load_model`, on its device and in its dtype.

    Returns:
        The model itself.
    """
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            module.compile(dynamic=True)
    return model


def adapter_folder(name_or_path: str | Path, **hub: Any) -> Path | None:
    """The files of an adapter, in its folder or in the hub's cache on this machine; None where the name is no adapter's.

    Args:
        name_or_path: a folder, a hub id, or `builtin:NAME`.
        **hub: `revision`, `token`, `cache_dir`.
    """
    path = resolve(name_or_path)
    if Path(path).is_dir():
        return Path(path) if is_adapter(Path(path)) else None
    if not is_hub_id(path):
        return None
    quietly = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    try:
        has = [cached_file(path, name, **hub, **quietly) for name in ("config.json", SETTINGS)]
    except (OSError, ValueError):  # no such id: whoever reads its configuration says so
        return None
    return hub_folder(path, **hub) if has[0] is None and has[1] is not None else None


def _load_adapted(folder: Path, keep_adapter: bool, options: dict[str, Any]) -> PreTrainedModel:
    """Base and adapter; see `load_model`."""
    quantisation = read_quantisation(folder)
    if "quantization_config" not in options and quantisation is not None:
        options["quantization_config"] = BitsAndBytesConfig.from_dict(quantisation)
    options.pop("revision", None)  # the adapter's
    base = load_model(base_of(folder), **options)
    adapted = attach(base, folder, trainable=keep_adapter)
    if keep_adapter:
        return adapted
    if getattr(base, "is_quantized", False):
        return adapted.eval().get_base_model()
    return merged(adapted).eval()


def public_shapes(config: LLaDAConfig | LLaDAMoEConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this configuration holds, in the public names; without memory."""
    kind = LLaDAModelLM if isinstance(config, LLaDAConfig) else LLaDAMoEModelLM
    with torch.device("meta"):
        model = kind(
            copy.deepcopy(config)
        )  # not from_config, which under ZeRO-3 would divide the tensors over processes
    tensors = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(t.shape) for name, t in tensors.items() if name not in model.all_tied_weights_keys}


def refuse_misfits(
    checkpoint: str,
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    missing: Collection[str],
    folder: Path | None = None,
) -> None:
    """Raises a CheckpointError if there are any.

    Args:
        checkpoint: its name.
        mismatched: name -> (stored shape, shape that the configuration asks for).
        missing: names.
        folder: where the files are, to say which one holds a tensor of another shape.
    """
    if mismatched:
        name = min(mismatched)
        stored, asked = map(list, mismatched[name])
        files = sorted(folder.glob("model*.safetensors")) if folder is not None else ()
        place = next((f" in {path.name}" for path in files if name in read_header(path)), "")
        what = (
            f"{len(mismatched)} tensors are of another shape than config.json says, such as {name}{place}: {stored}, "
            f"not {asked}"
        )
    elif missing:
        what = f"{len(missing)} tensors are missing, such as {min(missing)}"
    else:
        return
    raise CheckpointError(
        f"The weights of {checkpoint!r} do not fit its config.json: {what}. Are both files of the same checkpoint?"
    )


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of weights by its name.

    Raises:
        OptionError: no such dtype, or not one for weights.
    """
    if name not in WEIGHT_DTYPES:
        raise OptionError(f"dtype {name!r} does not exist.{did_you_mean(name, WEIGHT_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_config(name_or_path: str | Path, **hub: Any) -> LLaDAConfig | LLaDAMoEConfig:
    """A checkpoint's configuration.

    Args:
        name_or_path: a folder, a hub id, or `builtin:NAME`; of an adapter it is its base's.
        **hub: `revision`, `token`, `cache_dir`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not LLaDA's.
    """
    adapter = adapter_folder(name_or_path, **hub)
    if adapter is not None:
        return load_config(base_of(adapter), **{key: value for key, value in hub.items() if key != "revision"})
    name_or_path = str(name_or_path)
    path = resolve(name_or_path)
    local = Path(path)
    if not is_hub_id(path) and not local.is_dir():
        presets = f" or a preset to pretrain from ({', '.join(PRESETS)})" if path.count("/") == 0 else ""
        raise CheckpointError(
            f"There is no model folder {name_or_path!r} (taken from {Path.cwd()}). Give the folder of a checkpoint, a hub id "
            f"such as GSAI-ML/LLaDA-8B-Instruct, builtin:sudoku9{presets}."
        )
    if local.is_dir() and not (local / "config.json").exists():
        raise CheckpointError(f"The folder {name_or_path!r} has no config.json: it is not a checkpoint.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError) as error:  # TypeError: a string where a number should stand
        raise CheckpointError(
            f"{name_or_path!r} is no folder here, and the hub gave no configuration for it: {first_line(error)}"
            if not local.is_dir()
            else f"The configuration of {name_or_path!r} cannot be read: {first_line(error)}"
        ) from error
    if not isinstance(config, LLaDAConfig | LLaDAMoEConfig):
        way = f" Make one of it: dllm adapt {name_or_path} --output_dir DIR." if config.model_type in FAMILIES else ""
        raise CheckpointError(
            f"{name_or_path!r} is a {config.model_type!r} model; dllm loads LLaDA checkpoints (model_type 'llada').{way}"
        )
    return config


def fresh_model(
    name_or_path: str, tokenizer: PreTrainedTokenizerBase, overrides: str | None = None, max_length: int | None = None
) -> PreTrainedModel:
    """A model with random weights, in fp32.

    Args:
        name_or_path: a preset, or a checkpoint whose configuration it takes.
        tokenizer: gives a preset its vocabulary and special ids; a checkpoint's configuration takes them too where it does
            not fit (more entries than it has, or another mask).
        overrides: changes such as "n_layers=8,d_model=192".
        max_length: the context must hold at least this many tokens; a preset's grows to it.

    Raises:
        CheckpointError: no such preset or checkpoint.
        OptionError: an override that does not exist or does not fit.
    """
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "bos", "eos", "pad")}
    if name_or_path in PRESETS:
        settings = {**PRESETS[name_or_path], "vocab_size": len(tokenizer), **ids}
        longest = "max_position_embeddings" if is_mixture(settings) else "max_sequence_length"
        settings[longest] = max(settings[longest], max_length or 0)
    else:
        config = load_config(name_or_path)
        settings = config.to_dict()
        if not fits(config, tokenizer):
            settings |= {"vocab_size": len(tokenizer), "embedding_size": None, **ids}
    kind = LLaDAMoEConfig if is_mixture(settings) else LLaDAConfig
    if kind is LLaDAConfig:
        # said in full: what other code takes an absent key to mean may differ
        settings = {**{key: values[0] for key, values in IMPLEMENTED.items() if values[0] is not None}, **settings}
    settings = {**settings, **_read_overrides(overrides, kind.__annotations__)}
    settings.pop("dtype", None)
    model = AutoModelForMaskedLM.from_config(kind(**settings), dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    return model


def fits(config: LLaDAConfig | LLaDAMoEConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model of this configuration reads this tokenizer's ids: it has a row for each, and the same mask."""
    rows = getattr(config, "embedding_size", None) or config.vocab_size
    return len(tokenizer) <= rows and config.mask_token_id in (None, tokenizer.mask_token_id)


def _read_overrides(text: str | None, annotations: Mapping[str, str]) -> dict[str, Any]:
    """The changes of "KEY=NUMBER,KEY=NUMBER"; `annotations` says which keys there are and what each takes ("int | None")."""
    known = {key: kinds.split(" | ") for key, kinds in annotations.items() if not kinds.startswith("ClassVar")}
    out: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        key, _, written = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise OptionError(f"config_overrides {part!r}: there is no key {key!r}.{did_you_mean(key, known)}")
        value = _number(written)
        if value is None:
            raise OptionError(f"config_overrides {part!r}: write it as {key}=NUMBER.")
        if type(value).__name__ not in known[key] and not (type(value) is int and "float" in known[key]):
            raise OptionError(f"config_overrides {part!r}: {key} takes {' or '.join(known[key])}.")
        out[key] = value
    return out


def _number(text: str) -> bool | int | float | None:
    """What `text` stands for: true, false, a whole number or another one; None if it is none of them."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
