"""The configuration of dense LLaDA models, in the keys of the public checkpoints."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from dllm.errors import CheckpointError

IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "scale_logits": (False, None),
    "attention_dropout": (0, None),
    "residual_dropout": (0, None),
    "embedding_dropout": (0, None),
}
"""Keys that select an architecture, and the values of them that this code has."""


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
    use_cache: bool = False
    mask_token_id: int | None = 126336
    bos_token_id: int | None = None
    eos_token_id: int | None = 126081
    pad_token_id: int | None = 126081

    def __post_init__(self, **kwargs: Any) -> None:
        if self.n_kv_heads is None:
            # the oldest files say multi-query with a flag of their own
            self.n_kv_heads = 1 if kwargs.get("multi_query_attention") else self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = int(self.mlp_ratio * self.d_model)
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        super().__post_init__(**kwargs)
        self._refuse_what_is_not_there()

    def _refuse_what_is_not_there(self) -> None:
        for key, values in IMPLEMENTED.items():
            value = getattr(self, key, values[0])
            if value not in values:
                known = " or ".join(repr(v) for v in values if v is not None)
                raise CheckpointError(
                    f"config.json says {key}={value!r}, an architecture that dllm does not implement (it has {known}). "
                    f"This is not one of the public LLaDA shapes: check that the folder holds a LLaDA checkpoint."
                )
        for whole, part in (("d_model", "n_heads"), ("n_heads", "n_kv_heads")):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise CheckpointError(
                    f"config.json says {whole}={getattr(self, whole)} and {part}={getattr(self, part)}: "
                    f"the first must be a multiple of the second."
                )
        if self.head_dim % 2:
            raise CheckpointError(
                f"config.json gives heads of width {self.head_dim} (d_model / n_heads): rotary embedding needs an even one."
            )

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.d_model // self.n_heads


AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
