"""What `dllm generate` and `dllm infill` do with a request: puzzles, text after a prompt, blanks in a text."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from dllm.cli.requests import Request
from dllm.errors import OptionError
from dllm.sampling.blanks import brings_spaces, expand_blanks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dllm.cli.display import LiveCanvas
    from dllm.engine.tickets import Ticket
    from dllm.pipelines.llada.engine import Engine

EMBEDDED = "builtin:sudoku9"


class Prepared(NamedTuple):
    """A request that a model can be given."""

    request: Request
    ids: Tensor
    """int64 [length]: the prompt, or the canvas with its masks."""
    masks: int
    """How many masks will be filled."""


class Task:
    """What is common: a model, its settings, and how one request goes in and comes out.

    Args:
        model: a LLaDA model.
        tokenizer: its tokenizer.
        options: of the sampler.
        raw: prompts are plain text, also where there is a chat template.
    """

    columns: int | None = None
    """Lay out a trace as a grid."""
    seconds = 0.0
    """Over which a live display spreads its steps."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], raw: bool = False
    ) -> None:
        self.model, self.tokenizer, self.options, self.raw = model, tokenizer, options, raw
        self.mask = str(tokenizer.mask_token)

    @staticmethod
    def check(request: Request) -> None:
        """What can be told without a model; it may put the prompt into a uniform spelling.

        Raises:
            DllmError: it cannot be answered.
        """

    def prepare(self, request: Request) -> Prepared:
        """The tokens of a request.

        Raises:
            DllmError: it cannot be answered by this model.
        """
        raise NotImplementedError

    def submit(self, engine: Engine, prepared: Prepared, *, watch: bool) -> Ticket:
        """Puts it in the engine's line; with `watch` its ticket tells of every step.

        Raises:
            OptionError: it is larger than the engine's memory.
        """
        return engine.submit_infilling(prepared.ids, request=prepared.request.row, watch=watch, **self.options)

    def answer(self, prepared: Prepared, sequence: Tensor, text: str) -> dict[str, Any]:
        """What is written down of a row, beside its statistics."""
        raise NotImplementedError

    def canvas(self, prepared: Prepared) -> LiveCanvas:
        """Shows the row while it is written."""
        raise NotImplementedError

    def show(self, console: Console, prepared: Prepared, record: dict[str, Any], *, live: bool) -> None:
        """Prints the answer for people; `live`: after its canvas was shown."""
        raise NotImplementedError

    def _steps(self, masks: int) -> int:
        return min(self.options.get("steps") or masks, masks)

    def _plain(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Puzzles(Task):
    """Sudoku: blanks are masks, and solving is infilling."""

    columns = 9
    seconds = 6.0

    @staticmethod
    def unseen(seed: int | None, output: Path | None = None) -> Request:
        """A puzzle whose grid the model has not seen; without a seed another one each time.

        Raises:
            OptionError: it would be another one each time in a file that a later run goes on with.
        """
        if seed is None and output is not None:
            raise OptionError(
                f"--output {output}: without a prompt another puzzle is drawn each time, and no later run could go on with the "
                f"file. Give puzzles, or --seed N."
            )
        from dllm.data.sudoku import puzzles

        seed = random.randrange(10**6) if seed is None else seed
        return Request(0, {"prompt": puzzles(9, "test", 1, clues=(36, 45), seed=seed)[0][0]})

    @staticmethod
    def check(request: Request) -> None:
        from dllm.data.sudoku import solve
        from dllm.errors import DataError

        if not isinstance(request.prompt, str):
            raise DataError("A puzzle is text. For conversations, name a model with --model_name_or_path.")
        puzzle = expand_blanks(request.prompt, ".")
        if len(puzzle) != 81:
            raise DataError(
                f"{puzzle[:90]!r} has {len(puzzle)} characters: the model that ships inside solves 9x9 sudoku, 81 characters in "
                f"row order with . for blanks. To continue text, name another model with --model_name_or_path."
            )
        if not solve(puzzle, limit=1):
            raise DataError(f"The puzzle {puzzle} has no solution.")
        request.given["prompt"] = puzzle.replace("0", ".").replace("_", ".")

    def prepare(self, request: Request) -> Prepared:
        from dllm.evaluation.sudoku import puzzle_text
        from dllm.pipelines.llada.generate import encode_prompt

        puzzle = str(request.prompt)
        return Prepared(request, encode_prompt(self.tokenizer, puzzle_text(self.tokenizer, puzzle)), puzzle.count("."))

    def answer(self, prepared: Prepared, sequence: Tensor, text: str) -> dict[str, Any]:
        from dllm.data.sudoku import is_solution

        return {"text": text[:81], "solved": is_solution(str(prepared.request.prompt), text[:81])}

    def canvas(self, prepared: Prepared) -> LiveCanvas:
        from dllm.cli.display import LiveCanvas, sudoku_grid

        start = [None if cell == "." else cell for cell in str(prepared.request.prompt)]
        mask = self.tokenizer.mask_token_id
        steps, seconds = self._steps(prepared.masks), self.seconds
        return LiveCanvas(start, self._plain, draw=sudoku_grid, steps=steps, seconds=seconds, mask_token_id=mask)

    def show(self, console: Console, prepared: Prepared, record: dict[str, Any], *, live: bool) -> None:
        from dllm.cli.display import sudoku_grid

        if not live:
            styles = ["bold" if cell != "." else "green" for cell in str(prepared.request.prompt)]
            console.print(sudoku_grid(record["text"], styles), end="")
        verdict = "solved" if record["solved"] else "NOT solved: the model erred"
        # not through rich, which would break lines
        print(f"{prepared.masks} blanks, {record['nfe']} forwards: {verdict}\n{record['text']}", file=console.file)


class Writing(Task):
    """Text after a prompt; in the chat template where the tokenizer has one, unless the prompts are raw."""

    def prepare(self, request: Request) -> Prepared:
        from dllm.pipelines.llada.generate import generation_config, generation_request

        prompt: Any = request.prompt
        if not isinstance(prompt, str):
            if self.raw:
                raise OptionError("--raw takes prompts as plain text, and this one is a conversation.")
        elif self.tokenizer.chat_template is not None and not self.raw:
            prompt = [{"role": "user", "content": prompt}]
        config = generation_config(**self.options)
        asked = generation_request(self.model, self.tokenizer, prompt, config, what="The prompt")
        return Prepared(request, asked.canvas[~asked.masked], int(asked.masked.sum()))

    def submit(self, engine: Engine, prepared: Prepared, *, watch: bool) -> Ticket:
        return engine.submit(prepared.ids, request=prepared.request.row, watch=watch, **self.options)

    def answer(self, prepared: Prepared, sequence: Tensor, text: str) -> dict[str, Any]:
        return {"text": text}

    def canvas(self, prepared: Prepared) -> LiveCanvas:
        from dllm.cli.display import LiveCanvas

        return LiveCanvas(
            [None] * prepared.masks,
            self._plain,
            steps=self._steps(prepared.masks),
            seconds=self.seconds,
            offset=len(prepared.ids),
            mask_token_id=self.tokenizer.mask_token_id,
            transient=True,
        )

    def show(self, console: Console, prepared: Prepared, record: dict[str, Any], *, live: bool) -> None:
        from dllm.cli.display import say

        if live:
            say(console, (record["text"], "green"))
        else:
            say(console, ("> ", "bold"), (f"{prepared.request.title}\n{record['text']}\n", ""))


class Blanks(Task):
    """Blanks in a text, `[MASK:n]` or the tokenizer's mask token: what is given stays."""

    @staticmethod
    def check(request: Request) -> None:
        for text in _texts(request):
            expand_blanks(text, "")

    def prepare(self, request: Request) -> Prepared:
        from dllm.pipelines.llada.generate import apply_template, infilling_request
        from dllm.sampling.config import SamplingConfig

        prompt: Any = request.prompt
        if not isinstance(prompt, str):
            take = brings_spaces(self.tokenizer)
            turns = [{**turn, "content": expand_blanks(turn["content"], self.mask, take_space=take)} for turn in prompt]
            text = str(apply_template(self.tokenizer, turns, tokenize=False))
        else:
            text = prompt
        config = SamplingConfig.from_options(**self.options, early_stop=False)
        asked = infilling_request(self.model, self.tokenizer, text, config, what="The text")
        masks = int(asked.masked.sum())
        if not masks:
            raise OptionError(
                f"{request.title[:80]!r} has no blank: write [MASK:3] for three tokens, or {self.mask} for one."
            )
        return Prepared(request, asked.canvas, masks)

    def answer(self, prepared: Prepared, sequence: Tensor, text: str) -> dict[str, Any]:
        return {"text": text, "spans": [piece for piece, filled in self._parts(prepared, sequence) if filled]}

    def canvas(self, prepared: Prepared) -> LiveCanvas:
        from dllm.cli.display import LiveCanvas
        from dllm.sampling.pieces import TokenPieces

        mask = self.tokenizer.mask_token_id
        start = TokenPieces(self._plain)([None if token == mask else token for token in prepared.ids.tolist()])
        steps = self._steps(prepared.masks)
        return LiveCanvas(start, self._plain, steps=steps, seconds=self.seconds, mask_token_id=mask, transient=True)

    def show(self, console: Console, prepared: Prepared, record: dict[str, Any], *, live: bool) -> None:
        from dllm.cli.display import say

        text, place = record["text"], 0
        parts: list[tuple[str, str]] = []
        for span in record["spans"]:  # in their order; one that stands nowhere shares a character with what was given
            found = text.find(span, place)
            if span and found >= 0:
                parts += [(text[place:found], ""), (span, "green")]
                place = found + len(span)
        say(console, *parts, (text[place:], ""))

    def _parts(self, prepared: Prepared, sequence: Tensor) -> list[tuple[str, bool]]:
        """The text in runs of given and of filled tokens: (text, whether it was filled)."""
        filled = (prepared.ids == self.tokenizer.mask_token_id).tolist()
        parts: list[tuple[list[int], bool]] = []
        for token, new in zip(sequence.tolist(), filled, strict=True):
            if not parts or parts[-1][1] != new:
                parts.append(([], new))
            parts[-1][0].append(token)
        return [(self._plain(ids), new) for ids, new in parts]


def refuse_lengths(options: Mapping[str, Any]) -> None:
    """Blanks say where to write, all of them.

    Raises:
        OptionError: an option says how much to write.
    """
    for name in ("gen_length", "early_stop", "length_policy", "early_answer"):
        if options.get(name, "none") not in ("fixed", "none"):
            raise OptionError(
                f"--{name} has no meaning for puzzles and texts with blanks, which are filled whole: leave it out."
            )


def _texts(request: Request) -> list[str]:
    prompt = request.prompt
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
