"""Attention on a CPU in bf16: the explicit product against torch's fused kernel, forward and backward, by length.

Use:

    python benchmarks/attention_cpu.py --output benchmarks/results/attention_cpu_DATE.md

It is where `EXPLICIT_CPU_POSITIONS` of `dllm/layers/attention.py` comes from. Both run in turns within one process; the figure
to read is the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from machine import processor
from torch import Tensor

from dllm.layers.attention import explicit_attention


def explicit(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return explicit_attention(module, q, k, v, None)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 82, 128, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=8192, help="rows times length, kept the same")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    module = SimpleNamespace(scaling=arguments.head_dim**-0.5)
    lines = ["| length | pass | explicit, ms | fused, ms | fused / explicit |", "|---|---|---|---|---|"]
    for length in arguments.lengths:
        shape = (max(1, arguments.tokens // length), arguments.heads, length, arguments.head_dim)
        generator = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3))
        kernels: dict[str, Callable[[], Tensor]] = {
            "explicit": partial(explicit, module, q, k, v),
            "fused": partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, scale=module.scaling),
        }
        for backward in (False, True):
            times: dict[str, list[float]] = {name: [] for name in kernels}
            for turn in range(arguments.rounds + 2):
                for name, kernel in kernels.items():
                    began = time.perf_counter()
                    with torch.set_grad_enabled(backward):
                        out = kernel()
                        if backward:
                            out.float().sum().backward()
                    if turn > 1:  # the first two warm up
                        times[name].append(1000 * (time.perf_counter() - began))
            a, b = (statistics.median(times[name]) for name in kernels)
            what = "forward + backward" if backward else "forward"
            lines.append(f"| {length} | {what} | {a:.2f} | {b:.2f} | {b / a:.2f} |")
            print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text(
            f"# Explicit and fused attention on a CPU, bf16\n\n`python benchmarks/attention_cpu.py {' '.join(sys.argv[1:])}`: "
            f"{arguments.tokens} positions in all, {arguments.heads} heads of {arguments.head_dim}, median of {arguments.rounds} "
            f"rounds in turns, {torch.get_num_threads()} threads of a {processor()}, torch {torch.__version__}.\n\n"
            + "\n".join(lines)
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
