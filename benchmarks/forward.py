"""Milliseconds a forward of LLaDA-8B or LLaDA-MoE-7B-A1B with random weights, against the floor of the device.

Use:

    python benchmarks/forward.py --preset 8b --device cuda --output benchmarks/results/forward_8b_DEVICE_DATE.md

The floor is the larger of two times: reading every weight that the forward needs once, at the device's memory bandwidth; and
its products, 2 a weight and position, at the device's bf16 rate. The defaults of both are an H100's. Logits are computed at
`--logits` positions of each row, as sampling does. Without a GPU, `--preset tiny --device cpu` shows that the script runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

from dllm.pipelines.llada.inspection import inspect
from dllm.pipelines.llada.loading import fresh_model
from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig
from dllm.pipelines.llada.tokenizer import char_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["1x32", "1x512", "8x1024"], help="rows x positions")
    parser.add_argument("--logits", type=int, default=32, help="positions of a row at which the head is computed")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes a second")
    parser.add_argument("--flops", type=float, default=989e12, help="bf16 operations a second")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = fresh_model(arguments.preset, char_tokenizer()).to(device, torch.bfloat16).eval()
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation(arguments.attn_implementation)
    info, config = inspect(arguments.preset), model.config
    # of a preset's vocabulary only the tokenizer's rows are there; the rest of the model has its full size
    body = info.active_parameters - info.embedding_parameters
    forward = torch.compile(model, fullgraph=True) if arguments.compile else model
    lines = ["| rows x positions | ms a forward | floor, ms | times the floor |", "|---|---|---|---|"]
    for shape in arguments.shapes:
        rows, length = map(int, shape.split("x"))
        ids = torch.randint(config.vocab_size, (rows, length), device=device)
        keep = torch.arange(min(arguments.logits, length), device=device)
        times = []
        for turn in range(arguments.rounds + 3):
            began = time.perf_counter()
            with torch.inference_mode():
                forward(input_ids=ids, logits_to_keep=keep)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 2:  # the first three warm up
                times.append(1000 * (time.perf_counter() - began))
        read = info.parameters - info.embedding_parameters
        if isinstance(config, LLaDAMoEConfig):  # with few positions not every expert is asked
            stacked = (read - body) / (1 - config.num_experts_per_tok / config.num_experts)
            asked = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** (rows * length)
            read = int(read - stacked * (1 - asked))
        floor = 1000 * max(2 * read / arguments.bandwidth, 2 * body * rows * length / arguments.flops)
        median = statistics.median(times)
        lines.append(f"| {shape} | {median:.2f} | {floor:.2f} | {median / floor:.2f} |")
        print(lines[-1], flush=True)
    if arguments.output:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        head = (
            f"# A forward of {arguments.preset}, random weights, bf16\n\n"
            f"`python benchmarks/forward.py {' '.join(sys.argv[1:])}` on {name}: median of {arguments.rounds} rounds, "
            f"torch {torch.__version__}, transformers {transformers.__version__}.\n\n"
        )
        arguments.output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
