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
}
