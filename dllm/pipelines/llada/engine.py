"""The engine: many requests at once, each with its own settings, coming and going at any time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.engine.buffers import bytes_per_position
from dllm.engine.caching import caching
from dllm.engine.scheduler import Scheduler
from dllm.engine.tickets import Answer, CommittedBlock, Ticket
from dllm.errors import NonFiniteError, OptionError
from dllm.pipelines.llada.generate import (
    Prompt,
    answer_text,
    generation_config,
    generation_request,
    infilling_config,
    infilling_request,
    special_tokens,
    whole_text,
)
from dllm.pipelines.llada.network import network_of
from dllm.pipelines.llada.result import SamplingResult
from dllm.sampling.config import SamplingConfig
from dllm.sampling.rows import Request
from dllm.sampling.trace import StepEvent

ACTIVATIONS = 24
"""Values of the model's width that a position of a pass holds at once, about: queries, keys, values, both halves of the
gated network, and copies in fp32."""
MEMORY_SHARE = 0.5
"""Of the memory that is free when the engine starts."""


class Streamer(Protocol):
    """The interface of transformers' TextDiffusionStreamer; tensors are int64, on the CPU."""

    def put(self, value: Tensor) -> None:
        """Confirmed tokens: first the prompt's, then those of each block, up to the first end of text or of turn."""

    def put_draft(self, value: Tensor) -> None:
        """All tokens from the first that is not confirmed, masks among them."""

    def end(self) -> None:
        """There is no more, be it that the answer is complete, failed or given up."""


class Engine:
    """Fills requests in as they come, with continuous batching. What a request gives does not depend on the others.

        with llada.Engine(model, tokenizer) as engine:
            for text in engine.stream("Why is the sky blue?", gen_length=128, threshold=0.9):
                print(text, end="", flush=True)

    Args:
        model: a LLaDA model; device and dtype are its own. It is put into evaluation mode.
        tokenizer: for ids and text alone; None if all prompts are ids.
        max_rows: rows of a forward at most; guidance takes two a request.
        memory_gb: memory for caches and activations; half of what is free by default.
        max_waiting: requests in line at most; None for any number.
        background: a thread of the engine's own takes the steps; otherwise whoever waits for an answer does.

    Raises:
        OptionError: `max_rows` or `memory_gb` is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_rows: int = 32,
        memory_gb: float | None = None,
        max_waiting: int | None = None,
        background: bool = False,
    ) -> None:
        if memory_gb is not None and not 0 < memory_gb < math.inf:
            raise OptionError(f"memory_gb={memory_gb}: it is a number above 0.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self._tokenizing = threading.Lock()  # a fast tokenizer is one object, with settings that every call may change
        cuda = model.device.type == "cuda"
        free = torch.cuda.mem_get_info(model.device)[0] if cuda else psutil.virtual_memory().available
        self.scheduler = Scheduler(
            network_of(model),
            special_tokens(model, tokenizer),
            model.device,
            reuse=lambda config: caching(config, model),
            max_rows=max_rows,
            max_bytes=free * MEMORY_SHARE if memory_gb is None else memory_gb * 2**30,
            bytes_per_position=self._bytes_per_position,
            max_waiting=max_waiting,
        )
        if background:
            self.scheduler.start()

    def _bytes_per_position(self, config: SamplingConfig) -> int:
        shape = self.model.config
        needed = ACTIVATIONS * shape.hidden_size * self.model.dtype.itemsize
        if config.cache != "none":
            layers, heads, width = shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim
            needed += bytes_per_position(layers, heads, width, self.model.dtype)
        if config.policy == "klass":  # the distributions of the last step
            needed += 4 * shape.vocab_size
        return needed

    def submit(self, prompt: Prompt, *, request: int = 0, watch: bool = False, **options: Any) -> Ticket:
        """Puts a prompt in line; its ticket can be iterated over, waited for (`answer().text`), and cancelled.

        Args:
            prompt: text, ids, or a conversation.
            request: keys the noise, with the seed.
            watch: whether the ticket gives every denoising step, not only complete blocks.
            **options: of `dllm.generate`.

        Raises:
            OptionError: see `dllm.generate`; or the line is full, or the row larger than the memory.
        """
        config = generation_config(**options)
        tokenizer = self.tokenizer
        read = None if tokenizer is None else lambda request, canvas: self._text(tokenizer, request, canvas)
        return self.scheduler.submit(self._request(prompt, config, request), watch=watch, read=read)

    def _request(self, prompt: Prompt, config: SamplingConfig, number: int, what: str = "the prompt") -> Request:
        with self._tokenizing:
            return generation_request(self.model, self.tokenizer, prompt, config, number, what)

    def _text(
        self,
        tokenizer: PreTrainedTokenizerBase,
        request: Request,
        canvas: Tensor,
        read: Callable[..., str] = answer_text,
    ) -> str:
        with self._tokenizing:
            return read(self.model, tokenizer, request, canvas)

    def submit_infilling(
        self, text: str | Sequence[int] | Tensor, *, request: int = 0, watch: bool = False, **options: Any
    ) -> Ticket:
        """As `submit`, for a text with masks: see `dllm.infilling`."""
        config = infilling_config(**options)
        with self._tokenizing:
            asked = infilling_request(self.model, self.tokenizer, text, config, request)
        tokenizer = self.tokenizer
        read = None if tokenizer is None else lambda request, canvas: self._text(tokenizer, request, canvas, whole_text)
        return self.scheduler.submit(asked, watch=watch, read=read)

    def stream(self, prompt: Prompt, *, streamer: Streamer | None = None, **options: Any) -> Iterator[str]:
        """The answer, piece by piece: text comes when the block that it is in is complete, and is final.

        Args:
            prompt: see `submit`.
            streamer: is shown the prompt, a draft after every step, and each block as it is complete.
            **options: see `submit`.

        Yields:
            Pieces that joined are the answer's text. Leaving the loop cancels the request.

        Raises:
            OptionError: see `submit`; the engine has no tokenizer.
        """
        if streamer is not None and not all(hasattr(streamer, name) for name in ("put", "put_draft", "end")):
            raise OptionError(
                f"streamer={streamer!r} has not the methods put, put_draft and end: give transformers' TextDiffusionStreamer, or "
                f"one like it."
            )
        if self.tokenizer is None:
            raise OptionError("Streaming text needs a tokenizer: give the engine one, or iterate over submit(...).")
        ticket = self.submit(prompt, watch=streamer is not None, **options)
        pieces = self._pieces(ticket, self.tokenizer, streamer)
        next(pieces)  # from here on, letting go of it cancels the request, also before the first piece
        return pieces

    def _pieces(self, ticket: Ticket, tokenizer: PreTrainedTokenizerBase, streamer: Streamer | None) -> Iterator[str]:
        """First an empty piece, then those of the answer."""
        request, said = ticket.request, ""
        canvas, ends = request.canvas.clone(), torch.tensor(self.scheduler.tokens.ends)
        final = int((~request.masked).sum())
        over = False  # everything up to the answer's end is confirmed
        try:
            if streamer is not None:
                streamer.put(canvas[:final][None])
            yield ""
            for event in ticket:
                if isinstance(event, StepEvent):
                    canvas = event.applied(canvas)
                else:
                    missing = int(event.position[-1]) + 1 - len(canvas)  # an answer may grow
                    canvas = torch.cat([canvas, request.canvas[-1:].expand(max(0, missing))])
                    canvas[event.position] = event.token
                if isinstance(event, CommittedBlock):
                    start, final = final, int(event.position[-1]) + 1
                    block = canvas[start:final]
                    if streamer is not None and not over:
                        streamer.put(_through_the_first(block, ends))
                    over = over or bool(torch.isin(block, ends).any())
                    text = self._text(tokenizer, request, canvas[:final])
                    whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character whose last bytes are still masks
                    if whole.startswith(said) and len(whole) > len(said):
                        yield whole[len(said) :]
                        said = whole
                elif streamer is not None and not over:
                    streamer.put_draft(canvas[final:])
            text = self._text(tokenizer, request, ticket.answer().canvas)
            if len(text) > len(said) and text.startswith(said):
                yield text[len(said) :]
        finally:
            ticket.cancel()
            if streamer is not None:
                streamer.end()

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> SamplingResult:
        """As `dllm.generate`, for more prompts than fit into one batch: rows that are done make room for those in line.

        Args:
            prompts: see `dllm.generate`.
            **options: see `dllm.generate`.

        Returns:
            As `dllm.generate`; `nfe` counts the engine's forwards while it ran, those for others too.

        Raises:
            OptionError: see `dllm.generate`, before any work is done; or there are more prompts than `max_waiting` allows.
            NonFiniteError: see `dllm.generate`.
        """
        config = generation_config(**options)
        asked = [self._request(prompt, config, row, f"prompt {row}") for row, prompt in enumerate(prompts)]
        before = self.scheduler.nfe
        tickets, answers, failed = list[Ticket](), list[Answer](), dict[int, NonFiniteError]()
        try:
            for request in asked:
                tickets.append(self.scheduler.submit(request))
            for row, ticket in enumerate(tickets):
                try:
                    answers.append(ticket.answer())
                except NonFiniteError as error:
                    failed[row] = error
                    answers.append(Answer(ticket.request.canvas, 0, 0, 0.0))
        finally:
            for ticket in tickets:
                ticket.cancel()
        texts = []
        if self.tokenizer is not None:
            pairs = zip(asked, answers, strict=True)
            texts = [self._text(self.tokenizer, request, answer.canvas) for request, answer in pairs]
        return SamplingResult(
            sequences=[answer.canvas for answer in answers],
            texts=texts,
            nfe=self.scheduler.nfe - before,
            steps=[answer.steps for answer in answers],
            new_tokens=[answer.written for answer in answers],
            branches=config.branches,
            exact=config.exact,
        ).whole(failed)

    def close(self) -> None:
        """Cancels what is left, and frees the rows."""
        self.scheduler.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _through_the_first(block: Tensor, ends: Tensor) -> Tensor:
    """The block, cut after the first token that is one of these."""
    places = torch.isin(block, ends).nonzero()[:1, 0].tolist()
    return block[: places[0] + 1] if places else block
