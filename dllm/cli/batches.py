"""Runs requests through an engine, many at a time, and writes what comes out: to people, to pipes, or to a file."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dllm.cli.line import Bar, Line
from dllm.cli.records import AnswerFile, statistics
from dllm.cli.requests import PromptsFormat, Request
from dllm.cli.tasks import EMBEDDED, Prepared, Task
from dllm.errors import DllmError, OptionError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from dllm.engine.tickets import Answer
    from dllm.sampling.trace import Trace


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
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="prompts at a time, the most: one that is done makes room for the next; changes nothing but speed",
    )
    parser.add_argument(
        "--memory_gb",
        type=float,
        help="for caches and activations, which bounds the prompts at a time; half of what is free",
    )
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
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of the weights: float32, bfloat16, float16; auto is what they are stored in, or float32 on a CPU without bfloat16",
    )
    parser.add_argument("--device", help="cuda, mps or cpu; by default the first that is there")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the model's blocks: a minute or so at first, faster steps from then on",
    )


def load(arguments: Namespace) -> tuple[Any, Any]:
    """The model and the tokenizer that the options name, on their device.

    Raises:
        DllmError: there is no such model or device.
    """
    from transformers.utils import logging

    from dllm.pipelines.llada.loading import best_device, compile_blocks, load_model, to_device
    from dllm.pipelines.llada.tokenizer import load_tokenizer

    if not sys.stderr.isatty() or arguments.model_name_or_path == EMBEDDED or getattr(arguments, "quiet", False):
        logging.disable_progress_bar()
    device = _device(arguments.device) if arguments.device else best_device()
    model = load_model(arguments.model_name_or_path, dtype=arguments.dtype)
    model = to_device(model, device) if arguments.dtype == "auto" else model.to(device)
    return compile_blocks(model) if arguments.compile else model, load_tokenizer(arguments.model_name_or_path)


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
    if arguments.memory_gb is not None and not 0 < arguments.memory_gb < math.inf:
        raise OptionError(f"--memory_gb {arguments.memory_gb}: it is a number above 0.")
    if arguments.output is not None and arguments.output.suffix != ".jsonl":
        raise OptionError(f"--output {arguments.output}: a line is a JSON object; name a file that ends in .jsonl.")
    if arguments.json and arguments.output is not None:
        raise OptionError("--output writes into a file what --json prints: keep one.")
    for request in requests:
        _try(request, kind.check, len(requests))
    if arguments.trace is not None:
        from dllm.evaluation.replay import check_trace_path

        check_trace_path(arguments.trace, len(requests))
    with ExitStack() as stack:
        answers = None
        if arguments.output is not None:
            answers = stack.enter_context(AnswerFile(arguments.output, settings, requests))
        left = [request for request in requests if answers is None or request.row not in answers.done]
        run = _Run(arguments, answers, len(left), len(requests))
        if any(request.error is None for request in left):
            model, tokenizer = load(arguments)
            run.answer(kind(model, tokenizer, options, getattr(arguments, "raw", False)), left)
        else:
            for request in left:
                run.write(request, None, None)
            run.save_trace(None)
        errors = run.errors if answers is None else answers.errors
        if answers is not None:
            failed = f", {errors} of them with an error" if errors else ""
            print(f"{arguments.output}: {len(answers.done) + len(left)} rows{failed}")
    return 1 if errors else 0


def _try(request: Request, act: Callable[[Request], Any], of: int) -> Any:
    """Does something with one of so many requests that may turn out to be bad; in a file such a one fails alone."""
    if request.error is not None:
        return None
    try:
        return act(request)
    except DllmError as error:
        if not request.from_file:
            if of == 1:
                raise
            raise OptionError(f"Prompt {request.row + 1} of {of}: {error}") from error
        request.error = str(error)
        return None


class _Run:
    """Where the answers of a command go, and what of it is shown meanwhile."""

    def __init__(self, arguments: Namespace, answers: AnswerFile | None, rows: int, of: int) -> None:
        self.arguments, self.answers, self.of = arguments, answers, of
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
        import torch

        from dllm.pipelines.llada.engine import Engine
        from dllm.sampling.config import SamplingConfig

        prepared = {request.row: _try(request, task.prepare, self.of) for request in requests}
        config = SamplingConfig.from_options(**task.options)
        live = self.live and len(requests) == 1
        rows = config.branches * (1 if live else self.arguments.batch_size)
        good = [one for one in prepared.values() if one is not None]
        with (
            Engine(task.model, task.tokenizer, max_rows=rows, memory_gb=self.arguments.memory_gb) as engine,
            Bar(sum(one.masks for one in good), len(requests)) if self.bar else nullcontext() as bar,
        ):
            watch = live or self.arguments.trace is not None
            line = Line(engine, lambda one: task.submit(engine, one, watch=watch), good)
            for request in requests:
                one, record = prepared[request.row], None
                if one is not None:
                    try:
                        answer = self._answer(task, one, line, live, bar)
                        record = task.answer(one, answer.canvas, answer.text or "") | statistics(answer, config)
                    except (
                        DllmError,
                        torch.OutOfMemoryError,
                    ) as error:  # it took a model to find, and is this row's alone
                        request.error = str(error)
                self.write(request, task, record, one, live)
                if bar is not None:
                    bar.row(0 if one is None else one.masks)
        self.save_trace(task)

    def _answer(self, task: Task, one: Prepared, line: Line, live: bool, bar: Bar | None) -> Answer:
        from dllm.sampling.trace import StepEvent, Trace

        ticket, events = line.ticket(one), list[StepEvent]()
        with task.canvas(one) if live else nullcontext() as canvas:
            while not (live or ticket.done):
                line.step()
                if bar is not None:
                    bar.filled(line.filled)
            for event in ticket:
                if isinstance(event, StepEvent):
                    events.append(event)
                    if canvas is not None:
                        canvas(event)
        if self.arguments.trace is not None:
            self.traces.append(Trace([ticket.request.canvas], events))
            self.titles.append(one.request.title)
        return ticket.answer()

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

    def save_trace(self, task: Task | None) -> None:
        """Writes what --trace asks for, of the rows that this run ran."""
        if self.arguments.trace is None:
            return
        if task is None or not self.traces:
            print(f"--trace {self.arguments.trace}: no row was run, so there is nothing to show.", file=sys.stderr)
            return
        from dllm.evaluation.replay import save_trace
        from dllm.sampling.trace import Trace

        whole = Trace.joined(self.traces)
        save_trace(whole, task.tokenizer, self.arguments.trace, titles=self.titles, columns=task.columns)
