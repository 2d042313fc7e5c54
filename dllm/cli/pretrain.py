"""`dllm pretrain`: the same as examples/llada/pt.py."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Pretrains from command-line arguments."""
    from dllm.pipelines.llada.trainer import pretrain

    pretrain(argv)
