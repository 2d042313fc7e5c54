"""The `steps` section of sampling.py, for a GPU: milliseconds a step against its floor, tokens/s, and waits of the host."""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

import torch
from sampling_random import ragged
from turns import CACHES, WHOLE, Run, cached, exists, heading, in_turns

from dllm.pipelines.llada import generate
from dllm.pipelines.llada.inspection import inspect
from dllm.pipelines.llada.loading import fresh_model
from dllm.pipelines.llada.tokenizer import char_tokenizer


def steps_section(arguments: argparse.Namespace) -> str:
    """Milliseconds a block step against reading the weights once; a step's are the difference of two numbers of steps."""
    device = torch.device(arguments.device)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = fresh_model(arguments.preset, char_tokenizer()).to(device, torch.bfloat16).eval()
    torch.set_default_dtype(torch.float32)
    vocabulary = max(arguments.vocabularies)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[int(model.config.mask_token_id)] = 0.0
    info = inspect(arguments.preset)
    read = info.parameters - info.embedding_parameters + vocabulary * model.config.hidden_size
    least = 1000 * 2 * read / arguments.bandwidth
    gen, block = arguments.gen_length, arguments.block_length
    few, many = gen // block * (block // 2), gen
    lines = [
        "| batch | cache | ms a step | of the floor | tokens/s | waits of the host a step |",
        "|---|---|---|---|---|---|",
    ]
    for batch in arguments.batches:
        rows = ragged(batch, 32, 160)
        for cache in CACHES:
            if not exists(cached(cache)):
                continue
            options = dict(gen_length=gen, block_length=block, **WHOLE, **cached(cache))
            runs: dict[str, Run] = {
                str(steps): partial(synchronised, device, partial(generate, model, None, rows, steps=steps, **options))
                for steps in (few, many)
            }
            in_turns(runs, 1)
            timed = in_turns(runs, arguments.rounds)
            step = 1000 * (timed[str(many)].seconds - timed[str(few)].seconds) / (many - few)
            waits = "not on a GPU"
            if device.type == "cuda":
                counts = [
                    host_waits(partial(generate, model, None, rows, steps=steps, **options)) for steps in (few, many)
                ]
                waits = f"{(counts[1] - counts[0]) / (many - few):.2f}"
            speed = batch * gen / timed[str(many)].seconds
            lines.append(f"| {batch} | {cache} | {step:.2f} | {step / least:.2f} | {speed:.0f} | {waits} |")
            print(lines[-1], flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    what = (
        f"{arguments.preset}, random weights, bf16, V = {vocabulary:,}, prompts of 32 to 160 tokens, gen_length {gen}, "
        f"block_length {block}, on {name}. A step is the difference between {many} and {few} steps; the floor, {least:.2f} ms, "
        f"reads every weight once, of a mixture those of all experts, at {arguments.bandwidth / 1e12:.2f} TB/s."
    )
    return heading("Steps", what) + "\n".join(lines) + "\n"


def synchronised(device: torch.device, run: Run) -> Any:
    done = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done


def host_waits(run: Run) -> int:
    """How often the host waited for the device, as torch's debug mode counts it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)
