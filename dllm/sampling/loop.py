"""The denoising loop. There is one: generation is infilling on a canvas whose tail is masked.

A row is a canvas of its own length: given tokens, and masks wherever they stand. Its masks, in reading order, are cut into
blocks of `block_length`, which are filled from left to right, each in its steps. `dllm.sampling.batch.Batch` takes a step;
here all rows begin together, and each leaves when it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dllm.errors import NonFiniteError
from dllm.sampling.batch import Batch
from dllm.sampling.config import SamplingConfig
from dllm.sampling.network import Network, Reuse
from dllm.sampling.rows import Request, SpecialTokens
from dllm.sampling.trace import StepEvent, Trace


class Denoised(NamedTuple):
    """What the loop gives back."""

    canvases: list[Tensor]
    """One int64 [length] a row, on the CPU. A mask is left only where the model proposed the mask token to the end."""
    nfe: int
    """Forwards of the network; with guidance each step counts two."""
    steps: list[int]
    """Steps each row took."""
    written: list[int]
    """Masks that were filled in each row: less than it had where an early stop left some open."""
    trace: Trace | None
    failed: dict[int, NonFiniteError]
    """Of the rows whose logits were no numbers; their canvases are what they were before."""


def denoise(
    network: Network,
    requests: Sequence[Request],
    config: SamplingConfig,
    tokens: SpecialTokens,
    *,
    device: torch.device | str = "cpu",
    reuse: Reuse | None = None,
    trace: bool = False,
    on_step: Callable[[StepEvent], None] | None = None,
) -> Denoised:
    """Fills every mask of every canvas.

    Args:
        network: the mask predictor.
        requests: the canvases, and where to write.
        config: the settings that all of them share; `gen_length` plays no part here.
        tokens: the special ids.
        device: where the network lives.
        reuse: a cache, made for this call; None computes everything.
        trace: keep every step.
        on_step: called after each step with what it committed (a live display, a stream).

    Returns:
        The filled canvases in the order given, the number of forwards and, if asked, the trace; rows fail alone.

    Raises:
        OptionError: fewer steps than blocks.
    """
    asked = list(requests)
    results = [request.canvas.masked_fill(request.masked, tokens.mask) for request in asked]
    log = Trace([result.clone() for result in results]) if trace else None
    steps, written = [0] * len(asked), [0] * len(asked)
    batch = Batch(network, config, tokens, device, reuse=reuse, watch=trace or on_step is not None)
    busy = [row for row, request in enumerate(asked) if bool(request.masked.any())]
    batch.add([asked[row] for row in busy], busy)
    count, failed = 0, dict[int, NonFiniteError]()
    while len(batch):
        names: list[Any] = list(batch.names)
        event = batch.step()
        if event is not None:
            event = event.with_rows(torch.tensor(names, dtype=torch.int64))._replace(step=count)
            if log is not None:
                log.events.append(event)
            if on_step is not None:
                on_step(event)
        count += 1
        for row in batch.take_finished():
            assert isinstance(row.name, int)
            if row.error is not None:
                failed[row.name] = row.error
            results[row.name], steps[row.name], written[row.name] = row.canvas, row.steps, row.written
    return Denoised(results, batch.nfe, steps, written, log, failed)
