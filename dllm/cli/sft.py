"""`dllm sft`: the same as examples/llada/sft.py."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Fine-tunes from command-line arguments."""
    from dllm.pipelines.llada.trainer import sft

    sft(argv)
