"""The `trade` part of english.py: what writing more tokens a forward costs, on sudoku and sums; and the picture."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from english_fluency import per_token
from english_models import fingerprint
from measured import Part, Row, Store, of_task, table
from turns import CACHES

from dllm.data.addition import problems
from dllm.data.sudoku import is_solution, puzzles
from dllm.evaluation.sudoku import fill_puzzles
from dllm.figures import pyplot, quiet, save_figure
from dllm.pipelines.llada import generate, load_model, load_tokenizer

ADDITION_RECIPE = {
    "--model_name_or_path": "tiny",
    "--config_overrides": "n_layers=4",
    "--max_length": "13",  # 123+456=0579 is 12 characters, and the end of the text
    "--optimizer": "muon",
    "--learning_rate": "3e-3",
    "--weight_decay": "0.01",
    "--warmup_steps": "30",
    "--random_length": "0",
    "--max_time": "0.6",
    "--logging_steps": "50",
    "--per_device_train_batch_size": "256",
    "--save_steps": "350",
}
"""Options of `dllm pretrain`, less the data, the steps and the folder."""

CLUES = (36, 50)
POLICIES: dict[str, dict[str, Any]] = {
    **{f"threshold {t}": dict(threshold=t) for t in (0.5, 0.9, 0.999)},
    **{f"entropy_bound {g}": dict(policy="entropy_bound", gamma=g) for g in (0.01, 0.1, 1.0)},
    "factor 1": dict(policy="factor"),
    "klass": dict(policy="klass"),
    "hierarchical": dict(policy="hierarchical"),
    "wino": dict(policy="wino"),
}
PER_FORWARD = {"sudoku": (1, 2, 4, 8, 16, 100), "addition": (1, 2, 3, 5)}


def settings_of(task: str) -> dict[str, tuple[int, dict[str, Any]]]:
    """Name -> (tokens a forward, 0 where the policy decides; options)."""
    made: dict[str, tuple[int, dict[str, Any]]] = {}
    for cache in CACHES:
        chosen = {} if cache == "none" else {"cache": cache}
        for n in PER_FORWARD[task]:
            made[f"fixed, {n} | {cache}"] = (n, chosen)
        for policy, options in POLICIES.items():
            made[f"{policy} | {cache}"] = (0, {**options, **chosen})
    for n in PER_FORWARD[task]:
        made[f"fixed, {n}, random | none"] = (n, {"remasking": "random"})
        if 1 < n < 8:
            made[f"remdm, {n} | none"] = (n, {"policy": "remdm"})
    return made


def steps_for(a_forward: int, most: int) -> dict[str, int]:
    return {"steps": max(1, -(-most // a_forward))} if a_forward else {}


def sudoku_row(model: Any, tokenizer: Any, unseen: list[str], a_forward: int, options: dict[str, Any]) -> Row:
    most = max(puzzle.count(".") for puzzle in unseen)
    grids, result = fill_puzzles(model, tokenizer, unseen, **steps_for(a_forward, most), **options)
    return row_of([is_solution(p, g) for p, g in zip(unseen, grids, strict=True)], result)


def addition_row(
    model: Any, tokenizer: Any, sums: list[tuple[str, str]], a_forward: int, options: dict[str, Any]
) -> Row:
    """A sum is text as the model saw it in pretraining: four digits, and the end of the text."""
    shape = dict(gen_length=5, early_stop=False)
    result = generate(
        model, tokenizer, [question for question, _ in sums], **shape, **steps_for(a_forward, 5), **options
    )
    return row_of([text == answer.zfill(4) for text, (_, answer) in zip(result.texts, sums, strict=True)], result)


def row_of(right: list[bool], result: Any) -> Row:
    return {
        "right": sum(right) / len(right),
        "of": len(right),
        "tokens_per_forward": result.tokens_per_forward,
        "forwards": sum(result.steps) / len(result.steps),
        "exact": result.exact,
    }


def addition_model(folder: Path, steps: int) -> Path:
    """Trains the model of sums with `dllm pretrain`, unless it is there."""
    final = folder / "checkpoint-final"
    if not final.exists():
        from dllm.pipelines.llada.trainer import pretrain

        data = folder.with_suffix(".jsonl")
        data.parent.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps({"text": question + answer.zfill(4)}) for question, answer in problems("train", 200_000))
        data.write_text("\n".join(rows) + "\n", encoding="utf-8")
        command = [word for pair in ADDITION_RECIPE.items() for word in pair]
        command += ["--dataset_args", str(data), "--max_steps", str(steps), "--output_dir", str(folder)]
        pretrain([*command, "--resume_from_checkpoint", "auto"])
    return final


def measure_trade(arguments: argparse.Namespace, store: Store) -> None:
    folder = str(addition_model(arguments.addition, arguments.addition_steps))  # not in the part's time
    part = Part(
        store,
        "trade",
        arguments.budget["trade"],
        {"puzzles": arguments.puzzles, "sums": arguments.sums, "addition_steps": arguments.addition_steps},
    )
    items: dict[str, Callable[[], Row]] = {}
    model, tokenizer = load_model("builtin:sudoku9"), load_tokenizer("builtin:sudoku9")
    unseen = [puzzle for puzzle, _ in puzzles(9, "test", arguments.puzzles, clues=CLUES)]
    for name, (a_forward, options) in settings_of("sudoku").items():
        items[f"sudoku | {name}"] = partial(sudoku_row, model, tokenizer, unseen, a_forward, options)
    adder, characters = load_model(folder), load_tokenizer(folder)
    sums = problems("test", arguments.sums)
    for name, (a_forward, options) in settings_of("addition").items():
        items[f"addition | {name}"] = partial(addition_row, adder, characters, sums, a_forward, options)
    part.measure(
        items, dict.fromkeys((name for name in items if name.startswith("addition")), fingerprint(Path(folder)))
    )


def trade_report(store: Store) -> str:
    rows = store.rows("trade")
    if not rows:
        return ""
    settings = store.data["trade"]["settings"]
    text = (
        f"## Quality against tokens per forward\n\n9x9 sudoku: the model that ships inside, {settings['puzzles']} unseen puzzles "
        f"of {CLUES[0]} to {CLUES[1]} clues, all masks in one block. Addition: {settings['sums']} unseen sums of two 3-digit "
        f"numbers, four digits and the end of the text in one block, by a model of 0.85 M weights trained here for "
        f"{settings['addition_steps']} steps. Text: the tables of infilling above. ± is the standard error.\n"
    )
    for task in ("sudoku", "addition"):
        lines = []
        for policy, cache, row in of_task(rows, task):
            error = math.sqrt(row["right"] * (1 - row["right"]) / row["of"])
            right = f"{100 * row['right']:.1f} ± {100 * error:.1f} %"
            lines.append([policy, cache, f"{row['tokens_per_forward']:.2f}", right])
        if lines:
            text += f"\n### {task.capitalize()}\n\n" + table(["policy", "cache", "tokens/forward", "right"], lines)
    return text


def draw_trade(store: Store, path: Path) -> None:
    """Three panels, better is up and faster is right: colour says the policy, shape the cache."""
    plt = pyplot("Drawing the trade-off")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    colours = dict(zip(FAMILIES, plt.get_cmap("tab10").colors, strict=False))
    for axis, (task, title, label) in zip(axes, PANELS, strict=True):
        found = points(store, task)
        for family, cache in dict.fromkeys((family, cache) for family, cache, _, _ in found):
            here = sorted((x, y) for f, c, x, y in found if (f, c) == (family, cache))
            axis.plot(
                *zip(*here, strict=True), ls="-" if family == "fixed" else "none", marker=SHAPES[cache], ms=5, lw=1,
                color=colours[family], mfc=colours[family] if cache == "none" else "none", alpha=0.85,
            )  # fmt: skip
        if not found:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        axis.set(title=title, xlabel="tokens per forward", ylabel=label, xscale="log")
        ticks = [2**n for n in range(6) if 2**n <= max((x for _, _, x, _ in found), default=1)]
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        quiet(axis)
    real = store.rows("fluency").get("infilling | real text | -")
    if real:
        axes[0].axhline(per_token(real)[0], color="black", lw=0.8, ls=":")
        axes[0].annotate("real text", (1, per_token(real)[0]), (2, -10), textcoords="offset points", fontsize=8)
        axes[0].invert_yaxis()
    named = [(f, {"color": colours[f], "ls": "-" if f == "fixed" else "none", "marker": "o"}) for f in FAMILIES]
    named += [(f"cache {c}", {"color": "grey", "ls": "none", "marker": s, "mfc": "none"}) for c, s in SHAPES.items()]
    named[len(FAMILIES)] = ("no cache", {"color": "grey", "ls": "none", "marker": SHAPES["none"]})
    handles = [plt.Line2D([], [], label=label, **look) for label, look in named]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, path)


PANELS = (
    ("infilling", "text: a blank filled", "nats per token under the source (up is better)"),
    ("sudoku", "9x9 sudoku", "unseen puzzles solved exactly (%)"),
    ("addition", "addition", "unseen sums right (%)"),
)
FAMILIES = (
    "fixed",
    "fixed, random",
    "fixed, margin",
    "threshold",
    "entropy_bound",
    "factor",
    "klass",
    "hierarchical",
    "remdm",
    "wino",
)
SHAPES = dict(zip(CACHES, ("o", "s", "^", "D", "v"), strict=True))


def points(store: Store, task: str) -> list[tuple[str, str, float, float]]:
    """(family of policies, cache, tokens per forward, quality) of each measurement of a task."""
    found = []
    for policy, cache, row in of_task({**store.rows("fluency"), **store.rows("trade")}, task):
        if cache in SHAPES and "tokens_per_forward" in row:
            quality = per_token(row)[0] if task == "infilling" else 100 * row["right"]
            words = policy.replace(",", "").split()
            family = words[0] + (f", {words[-1]}" if words[-1] in ("random", "margin") else "")
            found.append((family, cache, row["tokens_per_forward"], quality))
    return found
