"""Which autoregressive models LLaDA's dense block can hold: what is beyond it is refused by the configuration, before a weight is
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from dllm.errors import CheckpointError

FAMILIES = ("llama", "mistral", "qwen2")
"""Model types whose blocks are LLaDA's."""
BIASED = ("qwen2",)
"""Those with biases on queries, keys and values (`include_qkv_bias`)."""

ALSO_NEEDED = {
    "qwen3": "norms of each head's queries and keys (QK norm)",
    "olmo2": "norms of queries and keys, and norms after the blocks",
    "gemma": "embeddings that are scaled, and norms that add one",
    "gemma2": "softcapping, sliding windows and norms after the blocks",
    "gemma3_text": "QK norm, sliding windows and norms after the blocks",
    "phi3": "queries, keys and values in one matrix",
}
"""Other model type -> what its blocks have that LLaDA's dense block has not."""


def refuse_features(config: PreTrainedConfig, name: str) -> None:
    """Compares a configuration with what LLaDA's dense block has.

    Raises:
        CheckpointError: names the feature, its key and its value.
    """
    if config.model_type in ("llada", "lladamoe"):
        raise CheckpointError(
            f"{name!r} is a LLaDA checkpoint already: there is nothing to adapt. Train it with dllm pretrain or dllm sft."
        )
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(config, key, None):
            raise refusal(name, f"a mixture of experts ({config.model_type})", key, getattr(config, key))
    if config.model_type not in FAMILIES:
        raise refusal(name, ALSO_NEEDED.get(config.model_type, "another architecture"), "model_type", config.model_type)
    rope: Mapping[str, Any] = config.rope_parameters or {}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    windows = [kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"]
    window = getattr(config, "sliding_window", None)
    quantised = getattr(config, "quantization_config", None)
    heads, hidden = config.num_attention_heads, config.hidden_size
    narrow = f"heads of another width than hidden_size / num_attention_heads ({hidden} / {heads})"
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor")
    attention, mlp = (getattr(config, key, False) for key in ("attention_bias", "mlp_bias"))
    for feature, key, value, plain in (
        ("another activation", "hidden_act", config.hidden_act, config.hidden_act in ("silu", "swish")),
        (narrow, "head_dim", width, width * heads == hidden),
        ("a bias on the attention's output", "attention_bias", attention, not attention),
        ("biases in the feed-forward network", "mlp_bias", mlp, not mlp),
        ("rotary positions of another scale", "rope_type", kind, kind == "default"),
        ("rotary positions on a part of each head", "partial_rotary_factor", part, part in (None, 1)),
        ("a sliding window", "sliding_window", window, not window and not windows),
        ("packed weights", "quantization_config", _method(quantised), quantised is None),
    ):
        if not plain:
            raise refusal(name, feature, key, value)


def _method(quantised: Any) -> Any:
    return (
        quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", quantised)
    )


def refusal(name: str, feature: str, key: str, value: Any) -> CheckpointError:
    """The error that says what a source has and LLaDA's dense block has not."""
    return CheckpointError(
        f"{name!r} has {feature} ({key}={value!r}), which LLaDA's dense block has not. dllm adapts {', '.join(FAMILIES)} "
        f"checkpoints with plain rotary positions and full attention, such as Llama 3, Mistral 7B v0.3, SmolLM2 or Qwen2.5."
    )
