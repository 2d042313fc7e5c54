"""The configuration of mixture-of-experts LLaDA models, in the keys of the public checkpoints."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from dllm.errors import CheckpointError
from dllm.pipelines.llada.models.architecture import check_multiples, refuse_unknown_architecture

IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "clip_qkv": (None,),
    "hidden_act": ("silu",),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_score_function": ("softmax", None),
    "n_shared_experts": (None, 0),
    "num_shared_experts": (None, 0),
    "partial_rotary_factor": (1, None),
    "rope_scaling": (None,),
    "routed_scaling_factor": (1, None),
    "router_num_group": (None, 1),
    "router_topk_group": (None, 1),
    "shared_expert_intermediate_size": (None, 0),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
"""Keys that select an architecture, and the values of them that this code has."""


class LLaDAMoEConfig(PreTrainedConfig):
    """Shape and special ids of a LLaDA-MoE model; every key is one of the public config.json.

    The public files say `model_type: llada` as the dense ones do: `LLaDAConfig.from_dict` tells them apart. Keys that this
    code does not use are kept and written back.

    Raises:
        CheckpointError: a key asks for an architecture that is not implemented, or sizes contradict each other.
    """

    model_type: ClassVar[str] = "llada"
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }

    vocab_size: int = 157184
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 8
    expert_intermediate_size: int = 1024
    dense_intermediate_size: int = 8192
    moe_layer_freq: list[int] | int = 1
    norm_topk_prob: bool | None = None
    qk_layernorm: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rope_theta: float | int = 50000
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = False
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = 156892
    pad_token_id: int | None = 156892

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        refuse_unknown_architecture(self, IMPLEMENTED)
        check_multiples(self, ("num_attention_heads", "num_key_value_heads"))
        layers, freq = self.num_hidden_layers, self.moe_layer_freq
        wrong = None
        if isinstance(freq, list) and len(freq) != layers:
            wrong = f"moe_layer_freq={freq}: it must have one entry for each of the {layers} layers."
        elif not isinstance(freq, list) and freq < 1:
            wrong = f"moe_layer_freq={freq}: it must be 1 or more, or a list with one entry a layer."
        elif not 1 <= self.num_experts_per_tok <= self.num_experts:
            wrong = (
                f"num_experts_per_tok={self.num_experts_per_tok} and num_experts={self.num_experts}: a token has at least 1 "
                f"of the experts and at most all."
            )
        elif self.head_dim % 2:
            wrong = f"head_dim={self.head_dim}: rotary embedding needs an even one."
        if wrong:
            raise CheckpointError(f"config.json says {wrong}")

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture; if not it is one network of `dense_intermediate_size`."""
        freq = self.moe_layer_freq
        return bool(freq[layer]) if isinstance(freq, list) else layer % freq == 0
