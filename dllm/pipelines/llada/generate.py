"""The front door to sampling: `generate()` writes after prompts, `infilling()` fills masks wherever they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.data.columns import check_conversation
from dllm.engine.caching import caching
from dllm.errors import CheckpointError, OptionError
from dllm.pipelines.llada.network import network_of
from dllm.pipelines.llada.result import SamplingResult
from dllm.sampling.blanks import brings_spaces, expand_blanks
from dllm.sampling.config import ALIASES, SamplingConfig
from dllm.sampling.loop import denoise
from dllm.sampling.rows import Request, SpecialTokens, check_steps
from dllm.sampling.trace import StepEvent

Prompt = str | Sequence[int] | Tensor | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation (a list of {"role", "content"})."""


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
            block_length, policy, threshold, cache, early_stop, temperature, remasking, cfg_scale, seed, ...).

    Returns:
        Sequences (prompt and answer, untrimmed), texts of the answers, and the number of forwards.

    Raises:
        OptionError: an unknown option, a value out of range, `block_length` or `steps` above `gen_length`, an empty prompt,
            or one that leaves no room for the answer in the model's context.
        NonFiniteError: the model gave logits that are no numbers; once all other rows are done, and with their answers.
    """
    config = generation_config(**options)
    numbers = _numbers(prompts, requests)
    asked = [
        generation_request(model, tokenizer, prompt, config, number, f"prompt {row}")
        for row, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
    ]
    return _run(model, tokenizer, asked, config, trace, on_step, answer_text)


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
        inputs: texts with blanks, `[MASK:n]` for n tokens or the tokenizer's mask token for one; or ids with the mask id. Where
            the tokenizer's words bring the space before them, the one before `[MASK:n]` is a part of the blank.
        trace: keep every denoising step in the result.
        on_step: called after every step with what it committed.
        requests: one integer a row that keys its noise; its place by default.
        **options: as for `generate`, less `gen_length`; a block is `block_length` masks in reading order.

    Returns:
        The filled canvases and their whole texts.

    Raises:
        OptionError: an unknown option, a value out of range, `gen_length` or a rule of an answer's length, or an input longer
            than the model's context.
        NonFiniteError: the model gave logits that are no numbers; once all other rows are done, and with their answers.
    """
    config = infilling_config(**options)
    asked = [
        infilling_request(model, tokenizer, item, config, number, f"input {row}")
        for row, (item, number) in enumerate(zip(inputs, _numbers(inputs, requests), strict=True))
    ]
    return _run(model, tokenizer, asked, config, trace, on_step, whole_text)


def generation_request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    config: SamplingConfig,
    number: int = 0,
    what: str = "the prompt",
) -> Request:
    """A canvas whose tail of `gen_length` tokens (with length policy daedal so many at most) is to be written, checked
    against the model.

    Args:
        model: a LLaDA model.
        tokenizer: None if the prompt is ids.
        prompt: see `generate`.
        config: of `generation_config`.
        number: keys the noise, with the seed.
        what: the prompt's name in errors.

    Raises:
        OptionError: see `generate`.
    """
    mask_token_id = _mask_token_id(model, tokenizer)
    ids = encode_prompt(tokenizer, prompt)
    if not len(ids):
        raise OptionError(f"{what} is empty: give it some text, or one token such as the beginning-of-text token.")
    _check_ids(model, ids, what)
    _check_room(model, len(ids) + config.gen_length, f"{what} ({len(ids)} tokens) and gen_length={config.gen_length}")
    _check_tokens(model, tokenizer, config)
    length = int(config.length_options.get("initial_length", config.gen_length))
    canvas = torch.cat([ids, torch.full((length,), mask_token_id)])
    # by place, not by token: a prompt may hold the mask token as a token
    request = Request(canvas, torch.arange(len(canvas)) >= len(ids), config, number)
    check_steps(request)
    return request


def infilling_request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    item: str | Sequence[int] | Tensor,
    config: SamplingConfig,
    number: int = 0,
    what: str = "the input",
) -> Request:
    """A canvas whose masks are to be filled, checked against the model; arguments as in `generation_request`.

    Raises:
        OptionError: see `infilling`.
    """
    if isinstance(item, str) and tokenizer is not None:
        item = expand_blanks(item, str(tokenizer.mask_token or ""), take_space=brings_spaces(tokenizer))
    canvas = encode_prompt(tokenizer, item)
    _check_tokens(model, tokenizer, config)
    _check_ids(model, canvas, what)
    _check_room(model, len(canvas), f"{what} ({len(canvas)} tokens)")
    request = Request(canvas, canvas == _mask_token_id(model, tokenizer), config, number)
    check_steps(request)
    return request


def answer_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: Request, canvas: Sequence[int] | Tensor
) -> str:
    """What was written after the prompt, up to its first end token; decoded without special tokens."""
    ends = set(_end_token_ids(model, tokenizer))
    answer = [int(token) for token in canvas[int((~request.masked).sum()) :]]
    stop = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    return tokenizer.decode(answer[:stop], skip_special_tokens=True)


def whole_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: Request, canvas: Sequence[int] | Tensor
) -> str:
    """The text of a canvas, what was given and what was filled in; decoded without special tokens."""
    return tokenizer.decode([int(token) for token in canvas], skip_special_tokens=True)


def infilling_config(**options: Any) -> SamplingConfig:
    """The settings of `infilling`, checked without a model.

    Raises:
        OptionError: an unknown option, a value out of range, `gen_length`, `early_stop`, or a rule of an answer's length.
    """
    for name in options:
        if ALIASES.get(name, name) in ("gen_length", "early_stop"):
            raise OptionError(f"infilling takes no {name}: it writes where the masks of its inputs stand, all of them.")
    config = SamplingConfig.from_options(**options, early_stop=False)
    for name, off in (("length_policy", "fixed"), ("early_answer", "none")):
        if getattr(config, name) != off:
            raise OptionError(
                f"infilling takes no {name}={getattr(config, name)!r}: it writes where the masks of its inputs stand, all of "
                f"them, and there is no answer whose end could be known. Leave out {name}."
            )
    return config


infill = infilling


def generation_config(**options: Any) -> SamplingConfig:
    """The settings of `generate`, checked without a model.

    Raises:
        OptionError: an unknown option, a value out of range, or `block_length` or `steps` above `gen_length`.
    """
    config = SamplingConfig.from_options(**options)
    if config.block_length is not None and config.block_length > config.gen_length:
        raise OptionError(
            f"block_length={config.block_length} exceeds gen_length={config.gen_length}: give a block_length of at most "
            f"{config.gen_length}, or leave it out for one block."
        )
    if config.steps is not None and config.steps > config.gen_length:
        raise OptionError(
            f"steps={config.steps} exceeds gen_length={config.gen_length}: a step writes at least one token, so give at most "
            f"{config.gen_length} steps, or leave steps out for one a token."
        )
    return config


def _numbers(prompts: Sequence[Any], requests: Sequence[int] | None) -> Sequence[int]:
    """What keys the noise of each row. Refuses one prompt in place of a list of them, which would be taken apart into rows."""
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.dim() < 2):
        raise OptionError("One prompt was given where a list of them belongs: write [prompt].")
    if any(isinstance(prompt, int | Mapping) for prompt in prompts):
        raise OptionError(
            "One prompt (its ids, or its messages) was given where a list of them belongs: write [prompt]."
        )
    if requests is not None and len(requests) != len(prompts):
        raise OptionError(
            f"requests has {len(requests)} numbers for {len(prompts)} rows: give one a row, or none at all."
        )
    return range(len(prompts)) if requests is None else requests


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
        messages = [dict(message) if isinstance(message, Mapping) else message for message in prompt]
        ids = apply_template(tokenizer, messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **options: Any) -> Any:
    """A conversation in the tokenizer's chat template: `apply_chat_template`, with errors that say what to do.

    Args:
        tokenizer: with a template.
        messages: dictionaries with `role` and `content`.
        **options: of `apply_chat_template`.

    Raises:
        DataError: that is no conversation.
        OptionError: there is no template, or it refuses this conversation.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise OptionError("The tokenizer has no chat template for a conversation: give a prompt of plain text.")
    check_conversation(messages, "The prompt's messages")
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise OptionError(f"The chat template refuses this conversation: {error}") from error


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    asked: list[Request],
    config: SamplingConfig,
    trace: bool,
    on_step: Callable[[StepEvent], None] | None,
    read: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Request, Tensor], str],
) -> SamplingResult:
    """The loop with LLaDA's ids, and the model in evaluation mode while it runs."""
    tokens, reuse = special_tokens(model, tokenizer), caching(config, model)
    was_training = model.training
    model.eval()
    try:
        done = denoise(
            network_of(model), asked, config, tokens, device=model.device, reuse=reuse, trace=trace, on_step=on_step
        )
    finally:
        model.train(was_training)
    texts = []
    if tokenizer is not None:
        texts = [read(model, tokenizer, *pair) for pair in zip(asked, done.canvases, strict=True)]
    return SamplingResult(
        done.canvases, texts, done.nfe, done.steps, done.written, done.trace, config.branches, config.exact
    ).whole(done.failed)


def special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> SpecialTokens:
    """The ids that the loop has to know.

    Raises:
        CheckpointError: model and tokenizer do not agree which token is the mask, or have none.
    """
    ends = _end_token_ids(model, tokenizer)
    eos, delimiters = tuple(_eos_token_ids(model)), _delimiters(tokenizer)
    return SpecialTokens(_mask_token_id(model, tokenizer), eos, tuple(ends), delimiters)


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


def _delimiters(tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """The line break, where it is one token."""
    if tokenizer is None:
        return ()
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return tuple(ids) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else ()


def _check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: SamplingConfig) -> None:
    """Refuses ids that the model has not, and a rule of lengths that would wait for a token that there is not."""
    for name in ("cfg_keep_tokens", "delimiters"):
        _check_ids(model, torch.tensor(getattr(config, name), dtype=torch.int64), name)
    if config.block_policy == "adablock" and not (config.delimiters or _delimiters(tokenizer)):
        raise OptionError(
            "block_policy='adablock' ends blocks at a line break, and no tokenizer says which token that is: give delimiters, "
            "the ids of the tokens that may end a block."
        )
    if config.length_policy == "daedal" and not _eos_token_ids(model):
        raise OptionError(
            "length_policy='daedal' waits for the model to be sure of end-of-text, and its configuration has no eos_token_id: "
            "leave length_policy out."
        )


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
