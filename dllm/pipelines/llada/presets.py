"""Shapes for models that start from nothing, by name. Vocabulary and special ids come from the tokenizer."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # puzzles on a laptop
    "tiny": dict(d_model=128, n_layers=6, n_heads=4, mlp_hidden_size=384, max_sequence_length=512),
    "small": dict(d_model=256, n_layers=8, n_heads=8, mlp_hidden_size=768, max_sequence_length=1024),
    # text on one GPU
    "50m": dict(d_model=512, n_layers=16, n_heads=8, mlp_hidden_size=1536, max_sequence_length=2048),
    # LLaDA, arXiv:2502.09992, table 5
    "1b": dict(d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, mlp_hidden_size=5634, max_sequence_length=4096),
    "8b": dict(d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=12288, max_sequence_length=4096),
    # mixtures of experts: one for a laptop, and LLaDA-MoE-7B-A1B, arXiv:2509.24389
    "moe-tiny": dict(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        expert_intermediate_size=128,
        dense_intermediate_size=384,
        max_position_embeddings=512,
    ),
    "moe-7b": dict(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        expert_intermediate_size=1024,
        dense_intermediate_size=8192,
        max_position_embeddings=8192,
    ),
}
