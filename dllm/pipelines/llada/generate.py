"""The front door to sampling: `generate()` writes after prompts, `infilling()` fills masks wherever they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.engine.caching import caching
from dllm.errors import CheckpointError, OptionError
from dllm.sampling.config import ALIASES, SamplingConfig
from dllm.sampling.loop import denoise
from dllm.sampling.network import Network, Pass
from dllm.sampling.proposals import Proposals
from dllm.sampling.rows import SpecialTokens
from dllm.sampling.trace import StepEvent, Trace

Prompt = str | Sequence[int] | Tensor | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation (a list of {"role", "content"})."""


@dataclass(frozen=True)
class SamplingResult:
    """What sampling gives back, one entry a row, in the order of the inputs."""

    sequences: list[Tensor]
    """int64 [length] each: prompt and answer, or the filled canvas; untrimmed."""
    texts: list[str]
    """The answer (generate: up to its first end token) or the whole filled text (infilling). Empty without a tokenizer."""
    nfe: int
    """Forwards of the network, those of guidance included."""
    steps: list[int]
    """Denoising steps of each row."""
    new_tokens: list[int]
    """Masks that were filled in each row."""
    trace: Trace | None = None
    """Every step, if it was asked for."""
    exact: bool = True
    """Whether every step computed everything; a cache is an approximation, see docs/sampling.md."""

    @property
    def tokens_per_forward(self) -> float:
        """Tokens written a row and forward, the mean over rows: 1 is one at a time."""
        written = [tokens / steps for tokens, steps in zip(self.new_tokens, self.steps, strict=True) if steps]
        return sum(written) / len(written) if written else 0.0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    *,
    trace: bool = False,
    on_step: Callable[[StepEvent], None] | None = None,
    requests: Sequence[int] | None = None,
    **options: Any,
) -> SamplingResult:
    """Writes `gen_length` tokens after each prompt.

    Args:
        model: a LLaDA model; device and dtype are its own.
        tokenizer: for ids and text alone; None if the prompts are ids.
        prompts: texts, id lists or conversations, of any mix of lengths.
        trace: keep every denoising step in the result.
        on_step: called after every step with what it committed.
        requests: one integer a row that keys its noise, so that it can be drawn again alone; its place by default.
        **options: the fields of `dllm.sampling.config.SamplingConfig` (steps, gen_length or max_new_tokens,
            block_length, temperature, cfg_scale, cfg_keep_tokens, remasking, suppress_eos, eos_last, seed).

    Returns:
        Sequences (prompt and answer, untrimmed), texts of the answers, and the number of forwards.

    Raises:
        OptionError: an unknown option, a value out of range, `block_length` above `gen_length`, or a prompt that leaves no
            room for the answer in the model's context.
    """
    config = generation_config(**options)
    mask_token_id = _mask_token_id(model, tokenizer)
    tails = torch.full((config.gen_length,), mask_token_id)
    ids = [encode_prompt(tokenizer, prompt) for prompt in _one_a_row(prompts)]
    for row, prompt in enumerate(ids):
        _check_ids(model, prompt, f"prompt {row}")
        _check_room(
            model,
            len(prompt) + config.gen_length,
            f"prompt {row} ({len(prompt)} tokens) and gen_length={config.gen_length}",
        )
    canvases = [torch.cat([prompt, tails]) for prompt in ids]
    # by place, not by token: a prompt may hold the mask token as a token
    masked = [torch.arange(len(canvas)) >= len(prompt) for prompt, canvas in zip(ids, canvases, strict=True)]
    result = _run(model, tokenizer, canvases, masked, config, trace, on_step, requests)
    texts = []
    if tokenizer is not None:
        ends = set(_end_token_ids(model, tokenizer))
        for prompt, sequence in zip(ids, result.sequences, strict=True):
            answer = sequence[len(prompt) :].tolist()
            stop = next((place for place, token in enumerate(answer) if token in ends), len(answer))
            texts.append(tokenizer.decode(answer[:stop], skip_special_tokens=True))
    return replace(result, texts=texts)


def infilling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    inputs: Sequence[str | Sequence[int] | Tensor],
    *,
    trace: bool = False,
    on_step: Callable[[StepEvent], None] | None = None,
    requests: Sequence[int] | None = None,
    **options: Any,
) -> SamplingResult:
    """Fills the masks of each input; the tokens that are given never change.

    Args:
        model: a LLaDA model.
        tokenizer: for ids and text alone; None if the inputs are ids.
        inputs: texts with the tokenizer's mask token in them, or ids with the mask id.
        trace: keep every denoising step in the result.
        on_step: called after every step with what it committed.
        requests: one integer a row that keys its noise; its place by default.
        **options: as for `generate`, less `gen_length`; a block is `block_length` masks in reading order.

    Returns:
        The filled canvases and their whole texts.

    Raises:
        OptionError: an unknown option, a value out of range, `gen_length`, or an input longer than the model's context.
    """
    for name in options:
        if ALIASES.get(name, name) in ("gen_length", "early_stop"):
            raise OptionError(f"infilling takes no {name}: it writes where the masks of its inputs stand, all of them.")
    config = SamplingConfig.from_options(**options, early_stop=False)
    mask_token_id = _mask_token_id(model, tokenizer)
    canvases = [encode_prompt(tokenizer, item) for item in _one_a_row(inputs)]
    for row, canvas in enumerate(canvases):
        _check_ids(model, canvas, f"input {row}")
        _check_room(model, len(canvas), f"input {row} ({len(canvas)} tokens)")
    masked = [canvas == mask_token_id for canvas in canvases]
    result = _run(model, tokenizer, canvases, masked, config, trace, on_step, requests)
    texts = (
        [] if tokenizer is None else [tokenizer.decode(x.tolist(), skip_special_tokens=True) for x in result.sequences]
    )
    return replace(result, texts=texts)


def generation_config(**options: Any) -> SamplingConfig:
    """The settings of `generate`, checked without a model.

    Raises:
        OptionError: an unknown option, a value out of range, or `block_length` above `gen_length`.
    """
    config = SamplingConfig.from_options(**options)
    if config.block_length is not None and config.block_length > config.gen_length:
        raise OptionError(
            f"block_length={config.block_length} exceeds gen_length={config.gen_length}: give a block_length of at most "
            f"{config.gen_length}, or leave it out for one block."
        )
    return config


def _one_a_row(prompts: Sequence[Any]) -> Sequence[Any]:
    """Refuses one prompt in place of a list of them, which would be taken apart into rows."""
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.dim() < 2):
        raise OptionError("One prompt was given where a list of them belongs: write [prompt].")
    if any(isinstance(prompt, int | Mapping) for prompt in prompts):
        raise OptionError(
            "One prompt (its ids, or its messages) was given where a list of them belongs: write [prompt]."
        )
    return prompts


def encode_prompt(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> Tensor:
    """int64 [length] of a text (as it stands, no token added), of ids, or of a conversation (through the chat template)."""
    if hasattr(prompt, "__array__"):  # tensors, and arrays of numpy and its like
        ids = torch.as_tensor(prompt)
        if ids.dim() != 1 or ids.is_floating_point():
            raise OptionError(
                f"A prompt of ids has one axis, [length], and whole numbers; this one has shape {tuple(ids.shape)}, {ids.dtype}."
            )
        return ids.long().cpu()
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and (not prompt or isinstance(prompt[0], int)):
        return torch.tensor(list(prompt), dtype=torch.int64)
    if tokenizer is None:
        raise OptionError("Prompts of text need a tokenizer: pass one, or pass token ids.")
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    canvases: list[Tensor],
    masked: list[Tensor],
    config: SamplingConfig,
    trace: bool,
    on_step: Callable[[StepEvent], None] | None,
    requests: Sequence[int] | None,
) -> SamplingResult:
    """The loop with LLaDA's ids, and the model in evaluation mode while it runs."""
    tokens, reuse = special_tokens(model, tokenizer), caching(config, model)
    was_training = model.training
    model.eval()
    try:
        done = denoise(
            network_of(model),
            canvases,
            config,
            tokens,
            masked=masked,
            requests=requests,
            device=model.device,
            reuse=reuse,
            trace=trace,
            on_step=on_step,
        )
    finally:
        model.train(was_training)
    return SamplingResult(
        done.canvases,
        [],
        done.nfe,
        done.steps,
        [int(m.sum()) for m in masked],
        done.trace,
        exact=reuse is None or reuse.exact,
    )


def network_of(model: PreTrainedModel) -> Network:
    """The model as the loop sees it."""

    def network(work: Pass, readout: Callable[[nn.Module, Tensor], Proposals]) -> Proposals:
        output = model(
            input_ids=work.ids_T[None],
            position_ids=work.position_T[None],
            attention_mask=work.plan,
            logits_to_keep=work.wanted_M,
            readout=readout,
        )
        return output.readout

    return network


def special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> SpecialTokens:
    """The ids that the loop has to know.

    Raises:
        CheckpointError: model and tokenizer do not agree which token is the mask, or have none.
    """
    ends = _end_token_ids(model, tokenizer)
    return SpecialTokens(_mask_token_id(model, tokenizer), tuple(_eos_token_ids(model)), tuple(ends))


def _mask_token_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    ids = {model.config.mask_token_id, tokenizer.mask_token_id if tokenizer is not None else None} - {None}
    if len(ids) != 1:
        raise CheckpointError(
            f"The model's configuration says mask_token_id={model.config.mask_token_id} and the tokenizer says "
            f"{tokenizer.mask_token_id if tokenizer is not None else None}: they must agree. Load the tokenizer with "
            f"dllm.pipelines.llada.load_tokenizer, or set mask_token_id in config.json."
        )
    return int(ids.pop())


def _eos_token_ids(model: PreTrainedModel) -> list[int]:
    eos = model.config.eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, Sequence) else [eos]


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """End of text and end of turn."""
    eot = getattr(tokenizer, "eot_token_id", None)
    return _eos_token_ids(model) + ([eot] if eot is not None else [])


def _check_ids(model: PreTrainedModel, ids: Tensor, what: str) -> None:
    weight = model.get_input_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # under ZeRO-3 a weight is empty until it is used
    outside = ids[(ids < 0) | (ids >= rows)]
    if len(outside):
        raise OptionError(
            f"{what} holds the token id {int(outside[0])}, and the model has ids 0 to {rows - 1}: is this another tokenizer?"
        )


def _check_room(model: PreTrainedModel, needed: int, what: str) -> None:
    room = model.config.max_position_embeddings
    if needed > room:
        raise OptionError(
            f"{what} need {needed} positions, and the model's context is {room}: shorten the prompt or ask for fewer tokens."
        )
