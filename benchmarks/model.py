"""A forward, and a forward with its backward, of a 100 M dense and a 100 M-active mixture shape: ours against the plain model.

Use:

    python benchmarks/model.py --output benchmarks/results/model_cpu_DATE.md

The baseline is `tests/reference/models.py`, the published blocks written out. Both run in turns within one process, so that a
machine that others use slows both; the figure to read is the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from machine import processor
from reference.models import dense_logits, moe_logits

from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModelLM

SHAPES = {
    "dense": LLaDAConfig(vocab_size=8192, d_model=768, n_layers=12, n_heads=12, mlp_hidden_size=2304),
    "mixture": LLaDAMoEConfig(
        vocab_size=8192,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_experts=32,
        num_experts_per_tok=4,
        expert_intermediate_size=576,
    ),
}


def our_logits(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return model(ids, attention_mask=mask).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--experts_implementation", nargs="+", default=["eager", "grouped_mm"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lines = [
        "| shape | dtype | padding | pass | ours, ms | plain, ms | plain / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, config in SHAPES.items():
        for dtype in arguments.dtypes:
            kind, plain = (LLaDAModelLM, dense_logits) if name == "dense" else (LLaDAMoEModelLM, moe_logits)
            model = kind(config).to(getattr(torch, dtype))
            tensors = public_tensors(model)
            ids = torch.randint(8192, (arguments.rows, arguments.length))
            half = torch.ones_like(ids)
            half[1::2, arguments.length // 2 :] = 0
            for implementation in arguments.experts_implementation if name == "mixture" else [""]:
                if implementation:
                    model.set_experts_implementation(implementation)
                for padded, mask in (("no", None), ("half of every second row", half)):
                    for backward in (False, True):
                        ours, theirs = [], []
                        for turn in range(arguments.rounds + 1):
                            a = step(partial(our_logits, model, ids, mask), backward)
                            b = step(partial(plain, tensors, config, ids, mask), backward)
                            if turn:  # the first warms up
                                ours.append(a)
                                theirs.append(b)
                        a, b = statistics.median(ours), statistics.median(theirs)
                        lines.append(
                            f"| {name} {implementation} | {dtype} | {padded} | {'forward + backward' if backward else 'forward'} "
                            f"| {1000 * a:.0f} | {1000 * b:.0f} | {b / a:.2f} |"
                        )
                        print(lines[-1], flush=True)
    head = (
        f"# A forward and a backward on a CPU\n\n`python benchmarks/model.py {' '.join(sys.argv[1:])}`: {arguments.rows} x "
        f"{arguments.length} positions, median of {arguments.rounds} rounds in turns, {torch.get_num_threads()} threads of a "
        f"{processor()}, torch {torch.__version__}, transformers {transformers.__version__}.\n\n"
    )
    if arguments.output:
        arguments.output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def public_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters under their public names, leaves of their own for the backward."""
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(parameter):
                for part, value in zip(("gate", "up"), both.chunk(2), strict=True):
                    tensors[name.replace("gate_up_proj", f"{expert}.{part}_proj.weight")] = value
        elif name.endswith("experts.down_proj"):
            for expert, value in enumerate(parameter):
                tensors[name.replace("down_proj", f"{expert}.down_proj.weight")] = value
        else:
            tensors[name] = parameter
    return {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}


def step(forward: Callable[[], torch.Tensor], backward: bool) -> float:
    """Seconds of a forward, or of a forward and its backward."""
    began = time.perf_counter()
    with torch.set_grad_enabled(backward):
        logits = forward()
        if backward:
            logits.float().logsumexp(-1).mean().backward()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
