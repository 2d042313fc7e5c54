"""Training steps of a 50 M body with a large vocabulary: our Trainer against a plain one, on the built-in conversations.

Use:

    python benchmarks/training.py --output benchmarks/results/training_cpu_DATE.md

The baseline is `tests/reference/trainer.py`: padded rows, all logits in fp32, independent times. Its model, optimiser (fused
AdamW), clipping and precision are ours. Variants take turns step by step in one process, so that a machine that others use slows
all of them; the figures to read are the ratios. Useful tokens are those of prompts and answers, without padding. Memory is the
peak of a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from machine import processor
from reference.loss import plain_head_loss
from reference.trainer import padded_batch, plain_step

from dllm.data.builtin import builtin_rows
from dllm.data.collators import SFTCollator
from dllm.data.order import OrderedDataset
from dllm.data.packing import PackedDataset
from dllm.diffusion.objective import head_loss
from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM
from dllm.pipelines.llada.tokenizer import char_tokenizer
from dllm.pipelines.llada.trainer import LLaDATrainer
from dllm.training.arguments import TrainingArguments

BODY: dict[str, Any] = dict(d_model=512, n_layers=12, n_heads=8, mlp_hidden_size=2048, max_sequence_length=1024)
HEAD_ROWS, MASKED = 4096, 2048
"""Positions whose head is measured alone, and how many of them have a mask."""


def build(vocabulary: int) -> LLaDAModelLM:
    tokenizer = char_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "bos", "eos", "pad")}
    torch.manual_seed(0)
    return LLaDAModelLM(LLaDAConfig(vocab_size=vocabulary, **BODY, **ids))


def paragraphs(longest: int) -> datasets.Dataset:
    """The built-in text by paragraphs, a third of each as prompt and the rest as answer: lengths as real text has them."""
    texts = [
        part for row in builtin_rows("text", "train", 400, column="text") for part in row["text"].split("\n\n") if len(part) > 20
    ]  # fmt: skip
    encoded = char_tokenizer()([text[:longest] for text in texts], add_special_tokens=False)["input_ids"]
    return datasets.Dataset.from_dict({"input_ids": encoded, "turns": [[len(ids) // 3, len(ids)] for ids in encoded]})


def our_steps(model: LLaDAModelLM, rows: Any, batch: int, *, packed: int | None, bf16: bool) -> Iterator[int]:
    """Endless steps of the Trainer; each gives its useful tokens."""
    tokenizer = char_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = LLaDATrainer(
            model,
            TrainingArguments(
                output_dir=folder, per_device_train_batch_size=batch, bf16=bf16, report_to="none", disable_tqdm=True,
                loss_normalisation="sequence", optim="adamw_torch_fused", dataloader_num_workers=0,
            ),
            processing_class=tokenizer,
            train_dataset=rows,
            eval_dataset=None,
            make_collator=lambda seed, group, evaluation: SFTCollator(seed=seed, eos_token_id=int(tokenizer.eos_token_id)),
            make_packed=None
            if packed is None
            else lambda rows, seed, group: PackedDataset(rows, capacity=packed, ends="2", seed=seed, group=group),
        )  # fmt: skip
        trainer.create_optimizer()
        optimizer: Any = trainer.optimizer
        prepared = trainer.accelerator.prepare_model(model).train()  # which is what brings autocast
        while True:
            for inputs in trainer.get_train_dataloader():
                counted = trainer._get_num_items_in_batch([inputs], model.device)
                trainer.current_gradient_accumulation_steps = 1
                trainer.training_step(prepared, inputs, counted)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                yield useful(rows, inputs)


def useful(rows: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Tokens of prompts and answers; ends of text after them are padding, packed or not."""
    ends = inputs["input_ids"] == char_tokenizer().eos_token_id
    inside = ~ends if "document" not in inputs else ~ends & (inputs["document"] >= 0)
    return int(inside.sum())


def plain_steps(model: LLaDAModelLM, rows: Any, batch: int, *, bf16: bool) -> Iterator[int]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)
    tokenizer = char_tokenizer()
    model.train()
    order = OrderedDataset(rows, seed=42, group=batch)  # the rows that our padded steps take, in their order
    for epoch in itertools.count():
        order.set_epoch(epoch)
        for start in range(0, len(order), batch):
            ids, maskable = padded_batch([order[i] for i in range(start, start + batch)], int(tokenizer.eos_token_id))
            plain_step(model, optimizer, ids, maskable, int(tokenizer.mask_token_id), bf16=bf16)
            yield int((ids != tokenizer.eos_token_id).sum())


def held() -> float:
    """The most memory that this process has held, in GB; getrusage's number would begin with the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e6


def head_peak(kind: str, vocabulary: int, bf16: bool) -> float:
    """GB that a head's forward and backward take on top of its weight and its states; in this process."""
    head = nn.Linear(BODY["d_model"], vocabulary, bias=False)
    hidden = torch.randn(HEAD_ROWS, BODY["d_model"], requires_grad=True)
    masked = torch.arange(HEAD_ROWS) % (HEAD_ROWS // MASKED) == 0
    targets, weights = torch.randint(vocabulary, (HEAD_ROWS,)), torch.rand(HEAD_ROWS)
    (torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()  # what torch sets up once
    before = held()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if kind == "ours":
            loss = head_loss(head, hidden[masked], targets[masked], weights[masked]).loss
        elif bf16:
            logits = head(hidden).float()
            nll = nn.functional.cross_entropy(logits, targets, reduction="none")
            loss = (nll * weights * masked).sum()
        else:
            loss = plain_head_loss(head.weight, hidden, targets, weights * masked)[0]
    loss.backward()
    return held() - before


def in_a_process(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_steps(make: Callable[[], Iterator[int]], steps: int) -> float:
    """GB that the process holds at most."""
    run = make()
    for _ in range(steps):
        next(run)
    return held()


def variants(vocabulary: int, rows: Any, batch: int, bf16: bool, capacity: int, packs: int) -> dict[str, Any]:
    return {
        "plain": lambda: plain_steps(build(vocabulary), rows, batch, bf16=bf16),
        "ours, padded": lambda: our_steps(build(vocabulary), rows, batch, packed=None, bf16=bf16),
        "ours, packed": lambda: our_steps(build(vocabulary), rows, packs, packed=capacity, bf16=bf16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[126_464, 32_768])
    parser.add_argument("--batch", type=int, default=16, help="rows of a padded step")
    parser.add_argument("--capacity", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fp32", action="store_true", help="in fp32; bf16 with fp32 weights otherwise")
    parser.add_argument("--longest", type=int, default=512, help="characters of a paragraph at most")
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "VOCABULARY"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bf16 = not arguments.fp32
    if arguments.only and arguments.only[0].startswith("head "):
        print(json.dumps(head_peak(arguments.only[0].removeprefix("head "), int(arguments.only[1]), bf16)))
        return
    rows = paragraphs(arguments.longest)
    lengths = sorted(turns[-1] for turns in rows["turns"])
    packs = max(
        1, round(arguments.batch * lengths[-1] / arguments.capacity)
    )  # about as many positions as a padded step
    if arguments.only:
        made = variants(int(arguments.only[1]), rows, arguments.batch, bf16, arguments.capacity, packs)
        print(json.dumps(peak_of_steps(made[arguments.only[0]], 3)))
        return
    precision = ["--fp32"] if arguments.fp32 else []
    shared = [
        *precision,
        "--batch",
        str(arguments.batch),
        "--capacity",
        str(arguments.capacity),
        "--longest",
        str(arguments.longest),
    ]
    lines = [
        "| vocabulary | trainer | ms a step | useful tokens/s | against plain | peak of the process, GB |",
        "|---|---|---|---|---|---|",
    ]
    heads = ["| vocabulary | head, plain, GB | head, ours, GB | ours / plain |", "|---|---|---|---|"]
    for vocabulary in arguments.vocabularies:
        runs = {
            name: make()
            for name, make in variants(vocabulary, rows, arguments.batch, bf16, arguments.capacity, packs).items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        speed: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(arguments.rounds + 2):
            for name, run in runs.items():
                began = time.perf_counter()
                tokens = next(run)
                taken = time.perf_counter() - began
                if turn > 1:  # the first ones warm up
                    seconds[name].append(taken)
                    speed[name].append(tokens / taken)
        runs.clear()
        base = statistics.median(speed["plain"])
        for name in speed:
            rate, peak = statistics.median(speed[name]), in_a_process("--only", name, str(vocabulary), *shared)
            lines.append(
                f"| {vocabulary:,} | {name} | {1000 * statistics.median(seconds[name]):.0f} | {rate:.0f} "
                f"| {rate / base:.2f} | {peak:.2f} |"
            )
            print(lines[-1], flush=True)
        plain, ours = (in_a_process("--only", f"head {kind}", str(vocabulary), *shared) for kind in ("plain", "ours"))
        heads.append(f"| {vocabulary:,} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |")
        print(heads[-1], flush=True)
    head = (
        f"# Training steps on a CPU\n\n`python benchmarks/training.py {' '.join(sys.argv[1:])}`: a body of 50 M parameters, "
        f"{arguments.batch} paragraphs of builtin:text ({lengths[0]} to {lengths[-1]} tokens, median "
        f"{lengths[len(lengths) // 2]}) a padded step, {packs} packed rows of {arguments.capacity} a packed one, "
        f"{'fp32' if arguments.fp32 else 'bf16 with fp32 weights'}, median of {arguments.rounds} rounds in turns, "
        f"{torch.get_num_threads()} threads of a {processor()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}.\n\n"
    )
    tail = f"\nThe head alone, {HEAD_ROWS} positions, {MASKED} of them masked, forward and backward, on top of its weight:\n\n"
    if arguments.output:
        arguments.output.write_text(head + "\n".join(lines) + "\n" + tail + "\n".join(heads) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
