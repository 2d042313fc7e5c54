"""`dllm sft`: the same as examples/llada/sft.py."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Fine-tunes from command-line arguments, in this process or in several of this machine."""
    from dllm.training.launch import run_command

    def here(argv: Sequence[str]) -> None:
        from dllm.pipelines.llada.trainer import sft

        sft(argv)

    run_command("sft", argv, here)
