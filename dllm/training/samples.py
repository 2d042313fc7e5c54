"""Samples of text while a model trains: printed, and kept in `samples.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.errors import OptionError
from dllm.training.arguments import TrainingArguments

SAMPLES = "samples.jsonl"
BEGINNING = 16
"""Tokens of a row, at most half of it, that a sample goes on from where no prompt is given."""

Sample = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[list[int]], int, int], list[str]]
"""(model, tokenizer, ids of each prompt, tokens to write, seed) -> texts; the noise is keyed by the seed."""


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str] | None, *, chat: bool, row: dict[str, Any], length: int, context: int
) -> list[list[int]]:
    """The ids that samples go on from.

    Args:
        tokenizer: of the model.
        prompts: texts, or what the user says; None for the beginning of `row`.
        chat: whether they go through the chat template.
        row: of the data.
        length: tokens of a sample.
        context: of the model.

    Raises:
        OptionError: a prompt leaves no room for the sample.
    """
    if prompts:
        encoded = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True
            )["input_ids"]
            if chat
            else tokenizer(prompt, add_special_tokens=False)["input_ids"]
            for prompt in prompts
        ]
    else:
        ids = list(row["input_ids"])
        encoded = [ids[: row["turns"][0]] if chat else ids[: min(BEGINNING, len(ids) // 2)]]
    for ids in encoded:
        if len(ids) + length > context:
            raise OptionError(
                f"--sample_length {length}: with a prompt of {len(ids)} tokens that exceeds the model's context of {context}. "
                f"Ask for at most {context - len(ids)}, or give a shorter --sample_prompt."
            )
    return [list(ids) for ids in encoded]


def make_sampler(
    args: TrainingArguments,
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    chat: bool,
    row: dict[str, Any],
    resume: str | None,
) -> Sampler | None:
    """The sampler that the arguments ask for, if they do; see `encode_prompts`.

    Args:
        args: the settings.
        sample: the family's.
        tokenizer: of the model.
        model: of which the context is read.
        chat: whether prompts go through the chat template.
        row: of the data, for a prompt where none is given.
        resume: the checkpoint that the run goes on from.

    Raises:
        OptionError: a prompt leaves no room for the sample.
    """
    if not args.sample_every:
        return None
    context = model.config.max_position_embeddings
    prompts = encode_prompts(
        tokenizer, args.sample_prompt, chat=chat, row=row, length=args.sample_length, context=context
    )
    sampler = Sampler(
        lambda model, ids, length: sample(model, tokenizer, ids, length, args.seed),
        prompts,
        decode=tokenizer.decode,
        folder=Path(str(args.output_dir)),
        every=args.sample_every,
        length=args.sample_length,
        first=args.process_index == 0,
    )
    number = "0" if resume is None else Path(resume).name.rpartition("-")[2]
    sampler.go_on_from(int(number) if number.isdigit() else 0)
    return sampler


class Sampler:
    """Writes samples every `every` steps.

    Every rank samples, for where weights are shared out no forward can be made alone; the noise is keyed, so all write the
    same, and the training's own random numbers are not touched. The first process shows and keeps it.

    Args:
        write: (model, ids of each prompt, tokens to write) -> texts, the same on every rank.
        prompts: ids of each prompt.
        decode: ids -> text.
        folder: of the run.
        every: steps.
        length: tokens of a sample.
        first: whether this is the first process.
    """

    def __init__(
        self,
        write: Callable[[Any, list[list[int]], int], list[str]],
        prompts: list[list[int]],
        *,
        decode: Callable[[list[int]], str],
        folder: Path,
        every: int,
        length: int,
        first: bool,
    ) -> None:
        self.write, self.prompts, self.every, self.length, self.first = write, prompts, every, length, first
        self.shown = [decode(prompt) for prompt in prompts]
        self.path = folder / SAMPLES
        self.done = 0  # transformers looks what is due once more where an epoch ends

    def __call__(self, model: Any, step: int) -> None:
        """Samples, if it is time to."""
        if step % self.every or step <= self.done:
            return
        self.done = step
        texts = self.write(model, self.prompts, self.length)
        if not self.first:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, text in zip(self.shown, texts, strict=True):
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
                tqdm.write(f"step {step}  {prompt!r} -> {text!r}")

    def go_on_from(self, step: int) -> None:
        """Drops what a run wrote after the step that it resumes from."""
        self.done = step
        if not (self.first and self.path.exists()):
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # a line that a killed process left half-written
                continue
        self.path.write_text("".join(kept), encoding="utf-8")
