"""Runs requests through a model in batches, and writes what comes out: to people, to pipes, or to a file."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dllm.cli.records import AnswerFile, statistics
from dllm.cli.requests import PromptsFormat, Request
from dllm.cli.tasks import EMBEDDED, Prepared, Task
from dllm.errors import DllmError, OptionError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from dllm.sampling.trace import StepEvent, Trace


def add_run_options(parser: ArgumentParser) -> None:
    """The options that commands with a model, prompts and answers share."""
    from typing import get_args

    parser.add_argument("--model_name_or_path", default=EMBEDDED, help=f"folder, hub id or builtin:NAME ({EMBEDDED})")
    parser.add_argument("--prompts_file", type=Path, help="a file of prompts; - for standard input")
    parser.add_argument(
        "--prompts_format",
        default="auto",
        choices=get_args(PromptsFormat),
        help='lines: a prompt a line; jsonl: {"prompt": ...} or {"messages": [...]}, other keys are carried over to the '
        "answer; auto: by the file's suffix",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at a time; changes nothing but speed")
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt, with its statistics")
    parser.add_argument(
        "--output",
        type=Path,
        help="write those objects into this .jsonl as they come; the same command goes on with a file that is there",
    )
    parser.add_argument(
        "--trace", type=Path, help="write the denoising to look at again: FILE.html, FILE.gif, FILE.json"
    )
    parser.add_argument("--quiet", action="store_true", help="show neither the denoising nor a bar, only the result")


def add_model_options(parser: ArgumentParser) -> None:
    """How a model is loaded."""
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, float32, bfloat16, float16")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the first that is there")


def load(arguments: Namespace) -> tuple[Any, Any]:
    """The model and the tokenizer that the options name, on their device.

    Raises:
        DllmError: there is no such model or device.
    """
    from transformers.utils import logging

    from dllm.pipelines.llada.loading import best_device, load_model
    from dllm.pipelines.llada.tokenizer import load_tokenizer

    if not sys.stderr.isatty() or arguments.model_name_or_path == EMBEDDED:
        logging.disable_progress_bar()
    device = _device(arguments.device) if arguments.device else best_device()
    model = load_model(arguments.model_name_or_path, dtype=arguments.dtype)
    return model.to(device), load_tokenizer(arguments.model_name_or_path)


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch has one for each way of being absent
        raise OptionError(
            f"--device {name} is not there: say cuda, mps or cpu, or leave it out for the best that is."
        ) from error
    return device


def run(
    arguments: Namespace,
    kind: type[Task],
    requests: Sequence[Request],
    options: dict[str, Any],
    settings: dict[str, Any],
) -> int:
    """Answers requests.

    Args:
        arguments: those of `add_run_options`.
        kind: what to do with them.
        requests: in the order of their answers.
        options: of the sampler, as they were given.
        settings: what answers depend on, all of it, for the file of answers.

    Returns:
        The exit status: 1 where a request of a file could not be answered.

    Raises:
        DllmError: an option is wrong, or a prompt of the command line cannot be answered.
    """
    if arguments.batch_size < 1:
        raise OptionError(f"--batch_size {arguments.batch_size}: it is at least 1.")
    if arguments.json and arguments.output is not None:
        raise OptionError("--output writes into a file what --json prints: keep one.")
    for request in requests:
        _try(request, kind.check)
    if arguments.trace is not None:
        from dllm.evaluation.replay import check_trace_path

        check_trace_path(arguments.trace, len(requests))
    with ExitStack() as stack:
        answers = None
        if arguments.output is not None:
            answers = stack.enter_context(AnswerFile(arguments.output, settings, requests))
        left = [request for request in requests if answers is None or request.row not in answers.done]
        run = _Run(arguments, answers, len(left))
        if any(request.error is None for request in left):
            model, tokenizer = load(arguments)
            run.answer(kind(model, tokenizer, options, getattr(arguments, "raw", False)), left)
        else:
            for request in left:
                run.write(request, None, None)
        errors = run.errors if answers is None else answers.errors
        if answers is not None:
            failed = f", {errors} of them with an error" if errors else ""
            print(f"{arguments.output}: {len(answers.done) + len(left)} rows{failed}")
    return 1 if errors else 0


def _try(request: Request, act: Callable[[Request], Any]) -> Any:
    """Does something with a request that may turn out to be bad; in a file such a one fails alone."""
    if request.error is not None:
        return None
    try:
        return act(request)
    except DllmError as error:
        if not request.from_file:
            raise
        request.error = str(error)
        return None


class _Run:
    """Where the answers of a command go, and what of it is shown meanwhile."""

    def __init__(self, arguments: Namespace, answers: AnswerFile | None, rows: int) -> None:
        self.arguments, self.answers = arguments, answers
        self.console = Console(highlight=False)
        self.to_people = not arguments.json and answers is None
        self.live = self.to_people and self.console.is_terminal and not arguments.quiet
        # answers that scroll by on the same terminal are their own sign of progress
        quiet = arguments.quiet or rows < 2 or (self.to_people and self.console.is_terminal)
        self.bar = sys.stderr.isatty() and not quiet
        self.errors = 0
        self.traces: list[Trace] = []
        self.titles: list[str] = []

    def answer(self, task: Task, requests: Sequence[Request]) -> None:
        """Answers requests, those with an error by it."""
        prepared = {request.row: _try(request, task.prepare) for request in requests}
        live = self.live and (len(requests) == 1 or task.seconds > 0)
        size = 1 if live else self.arguments.batch_size
        masks = sum(one.masks for one in prepared.values() if one is not None)
        with _Bar(masks, len(requests)) if self.bar else nullcontext() as bar:
            for first in range(0, len(requests), size):
                chunk = requests[first : first + size]
                batch = [one for request in chunk if (one := prepared[request.row]) is not None]
                records = self._run(task, batch, live, bar)
                for request in chunk:
                    self.write(request, task, records.get(request.row), prepared[request.row], live)
                if bar is not None:
                    bar.rows(len(chunk), sum(one.masks for one in batch))
        self._save_trace(task)

    def _run(self, task: Task, batch: list[Prepared], live: bool, bar: _Bar | None) -> dict[int, dict[str, Any]]:
        if not batch:
            return {}
        extra: dict[str, Any] = {"requests": [one.request.row for one in batch]}  # whatever the size of a batch
        extra["trace"] = self.arguments.trace is not None
        began = time.perf_counter()
        if live:
            with task.canvas(batch[0]) as canvas:
                result = task.sample(batch, on_step=canvas, **extra)
        else:
            try:
                result = task.sample(batch, on_step=None if bar is None else bar.step, **extra)
            except DllmError as error:
                if not all(one.request.from_file for one in batch):
                    raise
                if len(batch) == 1:  # of a file, a bad one fails alone
                    batch[0].request.error = str(error)
                    return {}
                return {row: answer for one in batch for row, answer in self._run(task, [one], live, bar).items()}
        seconds = time.perf_counter() - began
        if result.trace is not None:
            self.traces.append(result.trace)
            self.titles += [one.request.title for one in batch]
        return {
            one.request.row: task.answer(one, result.sequences[place], result.texts[place])
            | statistics(result, place, seconds)
            for place, one in enumerate(batch)
        }

    def write(
        self,
        request: Request,
        task: Task | None,
        answer: dict[str, Any] | None,
        prepared: Prepared | None = None,
        live: bool = False,
    ) -> None:
        """Puts one answer where it belongs."""
        record = {"row": request.row, **request.given, **(answer or {"error": request.error})}
        self.errors += answer is None
        if self.answers is not None:
            self.answers.write(record)
        elif self.arguments.json:
            print(json.dumps(record), flush=True)
        elif answer is None:
            print(f"row {request.row}: {request.error}", file=sys.stderr)
        elif task is not None and prepared is not None:
            task.show(self.console, prepared, record, live=live)

    def _save_trace(self, task: Task) -> None:
        if self.arguments.trace is None:
            return
        if not self.traces:
            print(f"--trace {self.arguments.trace}: no row was run, so there is nothing to show.", file=sys.stderr)
            return
        from dllm.evaluation.replay import save_trace
        from dllm.sampling.trace import Trace

        whole = Trace.joined(self.traces)
        save_trace(whole, task.tokenizer, self.arguments.trace, titles=self.titles, columns=task.columns)


class _Bar:
    """Progress on standard error: tokens while a batch runs, rows as they finish."""

    def __init__(self, masks: int, rows: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.fields[done]}/{task.fields[rows]} rows"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task("", total=masks, done=0, rows=rows)
        self.before = self.done = 0

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def step(self, event: StepEvent) -> None:
        self.progress.advance(self.task, len(event.position))

    def rows(self, rows: int, masks: int) -> None:
        """Rows are done, with so many masks: tokens that were taken back count once."""
        self.before += masks
        self.done += rows
        self.progress.update(self.task, completed=self.before, done=self.done)
