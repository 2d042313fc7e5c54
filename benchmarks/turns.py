"""What the sampling benchmarks share: variants that take turns, the options that this version has, a result's heading."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from machine import processor
from torch import Tensor

import dllm
from dllm.errors import OptionError
from dllm.sampling.config import SamplingConfig

CACHES = ("none", "prefix", "dual", "vicinity", "delayed")
Run = Callable[[], Any]


class Timed(NamedTuple):
    """What a variant's rounds gave."""

    seconds: float
    """Median."""
    last: Any
    """What its last round returned."""


def one_thread() -> bool:
    """Then the process's own time is the time that its work takes, whatever else the machine does."""
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()


def clock() -> float:
    return time.process_time() if one_thread() else time.perf_counter()


def in_turns(runs: dict[str, Run], rounds: int) -> dict[str, Timed]:
    """Every variant once, then all again."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    last: dict[str, Any] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            last[name] = run()
            seconds[name].append(clock() - began)
    return {name: Timed(statistics.median(seconds[name]), last[name]) for name in runs}


def exists(options: dict[str, Any]) -> bool:
    """Whether this version has these options."""
    try:
        SamplingConfig.from_options(**options)
    except OptionError:
        return False
    return True


WHOLE: dict[str, Any] = {"early_stop": False}
"""Every step is taken, as the published loop takes them."""


def cached(cache: str) -> dict[str, Any]:
    return {} if cache == "none" else {"cache": cache}


def logits_of(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).logits


def heading(title: str, what: str) -> str:
    seconds = "seconds of the process on the CPU" if one_thread() else "seconds of the clock"
    return (
        f"# {title}\n\n`python benchmarks/sampling.py {' '.join(sys.argv[1:])}`: {what} Median of rounds in turns, in {seconds}, "
        f"{torch.get_num_threads()} threads of a {processor()}, dllm {dllm.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.\n\n"
    )
