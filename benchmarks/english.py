"""English: what adapting an autoregressive model gives, and what writing several tokens at once costs.

Use, after `make english`, which shows its command of pretraining; the same again with `--save_total_limit 4` and another
folder keeps the checkpoints along the way. From nothing, for as long:

    dllm pretrain --model_name_or_path small --tokenizer_name_or_path bpe:8192 --learning_rate 1.5e-3 --max_length 256
        --dataset_args "builtin:text[weight:0.6,test:8] | builtin:wordnet[weight:0.4,test:60]" --random_length 0
        --per_device_train_batch_size 8 --max_steps 600 --warmup_steps 20
        --lr_scheduler_type linear --save_steps 0.25 --save_total_limit 4 --output_dir runs/scratch

    python benchmarks/english.py --source SmolLM2-135M-Instruct.Q4_1.gguf --adapted runs/english/adapted --scratch runs/scratch
        --pretrained runs/english/pretrained --tuned runs/english/tuned --output benchmarks/results/english_cpu_DATE.md

`bits`: bits per character on held-out text, of each checkpoint along the runs. `definitions`: the share of held-out words whose
own definition is chosen. `fluency`: nats per token, under the autoregressive source, of what is written by each policy, number
of steps and cache. `trade`: quality against tokens per forward on sudoku and sums as well, and the picture of all three.

Each part stops beginning new measurements after its share of 25 minutes (--time 2 doubles them). Every measurement is kept in
a .json beside --output: the same command goes on with what is left, and `--parts` chooses.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from english_bits import bits_report, measure_bits
from english_definitions import definitions_report, measure_definitions
from english_fluency import fluency_report, measure_fluency
from english_models import Judge
from english_trade import draw_trade, measure_trade, trade_report
from measured import Store

from dllm.training.callbacks import hide_bars

MINUTES = {"bits": 7.0, "definitions": 4.0, "fluency": 9.0, "trade": 5.0}
"""After which a part begins no new row."""
RUNS = ("adapted", "scratch", "pretrained", "tuned")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(MINUTES), default=list(MINUTES))
    parser.add_argument("--source", help="the autoregressive model: a .gguf file, a folder or a hub id")
    parser.add_argument("--adapted", type=Path, help="the adapted checkpoint before training")
    parser.add_argument("--pretrained", type=Path, help="the run of continued pretraining")
    parser.add_argument("--tuned", type=Path, help="the run of fine-tuning")
    parser.add_argument("--scratch", type=Path, help="a run from fresh weights")
    parser.add_argument("--fluent", choices=RUNS, default="pretrained", help="fluency: which model writes")
    parser.add_argument("--output", type=Path, required=True, help="of the .md; its .json stands beside it")
    parser.add_argument("--figure", type=Path, help="trade: of the picture")
    parser.add_argument("--time", type=float, default=1.0, help="what the parts' minutes are multiplied with")
    parser.add_argument("--checkpoints", type=int, default=5, help="bits: of each run, at most")
    parser.add_argument("--spans", type=int, default=20, help="bits: stretches of text")
    parser.add_argument("--characters", type=int, default=960, help="bits: of a span")
    parser.add_argument("--samples", type=int, default=4, help="bits: sets of masks of a span")
    parser.add_argument("--row_tokens", type=int, default=256, help="bits: longer spans are cut in parts")
    parser.add_argument("--words", type=int, default=96, help="definitions")
    parser.add_argument("--definition_samples", type=int, default=3, help="definitions: sets of masks of a definition")
    parser.add_argument("--windows", type=int, default=16, help="fluency: stretches of text")
    parser.add_argument("--given", type=int, default=16, help="fluency: tokens on either side of the blank")
    parser.add_argument("--blank", type=int, default=16, help="fluency: tokens to write")
    parser.add_argument("--puzzles", type=int, default=100, help="trade")
    parser.add_argument("--sums", type=int, default=500, help="trade")
    parser.add_argument(
        "--addition", type=Path, default=Path("runs/addition"), help="trade: where its model is, or will be"
    )
    parser.add_argument("--addition_steps", type=int, default=1400, help="trade: to train it, if it is not there")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    arguments.budget = {part: minutes * arguments.time for part, minutes in MINUTES.items()}
    arguments.runs = {name: folder for name in RUNS if (folder := getattr(arguments, name)) is not None}
    store = Store(arguments.output.with_suffix(".json"))
    judge = functools.cache(lambda: Judge(arguments.source))
    hide_bars(everywhere=True)
    if "bits" in arguments.parts:
        measure_bits(arguments, store, judge)
    if "definitions" in arguments.parts:
        measure_definitions(arguments, store, judge)
    if "fluency" in arguments.parts:
        measure_fluency(arguments, store, judge)
    if "trade" in arguments.parts:
        measure_trade(arguments, store)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(report(store), encoding="utf-8")
    if arguments.figure:
        draw_trade(store, arguments.figure)


def report(store: Store) -> str:
    parts = [bits_report(store), definitions_report(store), fluency_report(store), trade_report(store)]
    ran = [
        f"- {name}: {part['seconds'] / 60:.1f} minutes, {part['machine']}\n\n      {part['command']}\n"
        for name, part in store.data.items()
    ]
    return (
        "# English\n\nMade by, each part by its last command:\n\n"
        + "\n".join(ran)
        + "\n"
        + "\n".join(filter(None, parts))
    )


if __name__ == "__main__":
    main()
