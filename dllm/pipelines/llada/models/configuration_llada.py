"""The configuration of dense LLaDA models, in the keys of the public checkpoints."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from dllm.errors import CheckpointError
from dllm.pipelines.llada.models.architecture import check_multiples, refuse_unknown_architecture
from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig

IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "clip_qkv": (None,),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None, True),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True, None),
    "rope": (True,),
    "rope_scaling": (None,),
    "scale_logits": (False, None),
    "sliding_window": (None,),
    "attention_dropout": (0, None),
    "residual_dropout": (0, None),
    "embedding_dropout": (0, None),
}
"""Keys that select an architecture, and the values of them that this code has."""


def is_mixture(config_dict: dict[str, Any]) -> bool:
    """Whether a config.json of model type `llada` is a LLaDA-MoE one, by its architecture or by its keys."""
    if any("MoE" in name for name in config_dict.get("architectures") or ()):
        return True
    return "d_model" not in config_dict and ("num_experts" in config_dict or "expert_intermediate_size" in config_dict)


class LLaDAConfig(PreTrainedConfig):
    """Shape and special ids of a dense LLaDA model; every key is one of the public config.json.

    Keys that this code does not use (`init_device`, `precision`, ...) are kept and written back. transformers' standard
    names (`hidden_size`, `num_hidden_layers`, ...) read and write the same fields.

    Raises:
        CheckpointError: a key asks for an architecture that is not implemented, or sizes contradict each other; at
            construction, so before any weight is read.
    """

    model_type: ClassVar[str] = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "transformer.blocks.*.q_proj": "colwise",
        "transformer.blocks.*.k_proj": "colwise",
        "transformer.blocks.*.v_proj": "colwise",
        "transformer.blocks.*.attn_out": "rowwise",
        "transformer.blocks.*.ff_proj": "colwise",
        "transformer.blocks.*.up_proj": "colwise",
        "transformer.blocks.*.ff_out": "rowwise",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = None
    mlp_ratio: int | float = 4
    max_sequence_length: int = 4096
    rope: bool = True
    rope_theta: float | int = 500000.0
    rope_full_precision: bool = True
    rms_norm_eps: float = 1e-5
    layer_norm_type: str = "rms"
    activation_type: str = "silu"
    block_type: str = "llama"
    block_group_size: int = 1
    weight_tying: bool = False
    init_fn: str = "mitchell"
    init_std: float = 0.02
    include_qkv_bias: bool = False
    use_cache: bool = False
    mask_token_id: int | None = 126336
    bos_token_id: int | None = None
    eos_token_id: int | None = 126081
    pad_token_id: int | None = 126081

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # first: it moves the standard names into these fields
        if self.n_kv_heads is None:
            # the oldest files say multi-query with a flag of their own
            self.n_kv_heads = 1 if kwargs.get("multi_query_attention") else self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = int(self.mlp_ratio * self.d_model)
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        refuse_unknown_architecture(self, IMPLEMENTED)
        check_multiples(self, ("d_model", "n_heads"), ("n_heads", "n_kv_heads"))
        if self.head_dim % 2:
            raise CheckpointError(
                f"config.json gives heads of width {self.head_dim} (d_model / n_heads): rotary embedding needs an even one."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but a mixture of experts under this model type gives a `LLaDAMoEConfig`.

        The public LLaDA-MoE files say `model_type: llada` too; what they have in place of `d_model` tells them apart.
        """
        if cls is LLaDAConfig and is_mixture(config_dict):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.d_model // self.n_heads


AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
