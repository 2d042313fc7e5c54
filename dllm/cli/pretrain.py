"""`dllm pretrain`: the same as examples/llada/pt.py."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Pretrains from command-line arguments, in this process or in several of this machine."""
    from dllm.training.launch import run_command

    def here(argv: Sequence[str]) -> None:
        from dllm.pipelines.llada.trainer import pretrain

        pretrain(argv)

    run_command("pretrain", argv, here)
