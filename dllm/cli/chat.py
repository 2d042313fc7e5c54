"""`dllm chat`: a conversation in the terminal, with each answer shown while it takes shape."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from dllm.cli.options import Parser, add_settings, given_settings
from dllm.errors import DllmError, OptionError, did_you_mean
from dllm.sampling.config import ALIASES, SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]
COMMANDS = {
    "/help": "this list",
    "/clear": "begin anew; the system text and the options stay",
    "/system": "TEXT: what the model is told first, and begin anew; without a text, nothing",
    "/set": "OPTION VALUE: an option of the sampler (VALUE default takes it back); alone: those that are set",
    "/save": "FILE: write the conversation as JSON",
    "/exit": "end (also Ctrl-D)",
}
_NOTE = "dim"


def main(argv: Sequence[str]) -> None:
    """Parses the command line and talks until the end of the input."""
    from dllm.cli.batches import add_model_options, load
    from dllm.cli.tasks import EMBEDDED

    parser = Parser(
        prog="dllm chat",
        description="Talk with a model whose tokenizer has a chat template. Ctrl-C stops an answer. In the conversation: "
        + "; ".join(f"{name}, {what}" for name, what in COMMANDS.items())
        + ". A message that begins with // begins with one /.",
    )
    parser.add_argument("--model_name_or_path", help="folder or hub id", required=True)
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument("--quiet", action="store_true", help="do not show the denoising, only the answers")
    add_model_options(parser)
    add_settings(parser, SamplingConfig, ALIASES)
    arguments = parser.parse_args(list(argv))
    options = given_settings(arguments, SamplingConfig)
    SamplingConfig.from_options(**options)  # wrong values are told before seconds of loading

    from dllm.pipelines.llada.generate import generation_config

    generation_config(**options)
    if arguments.model_name_or_path == EMBEDDED:
        raise OptionError(f"{EMBEDDED} writes sudoku grids and nothing else: name a model that was made to talk.")
    model, tokenizer = load(arguments)
    if tokenizer.chat_template is None:
        raise OptionError(
            f"{arguments.model_name_or_path} has no chat template: it was not made to talk. Use  dllm generate"
        )
    Chat(model, tokenizer, options, system=arguments.system, quiet=arguments.quiet).run()


class Chat:
    """A conversation, and what is typed into it.

    On a terminal an answer is shown while it takes shape; elsewhere answers are printed when they are done, and notes go to
    standard error, so that what is piped is the model's words alone.

    Args:
        model: a LLaDA model.
        tokenizer: with a chat template.
        options: of the sampler.
        system: what the model is told first.
        quiet: show no denoising.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: dict[str, Any],
        *,
        system: str | None = None,
        quiet: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, dict(options)
        self.system, self.messages, self.turn = system, list[Message](), 0
        self.console = Console(highlight=False)
        self.typed = sys.stdin.isatty() and self.console.is_terminal
        self.notes = self.console if self.typed else Console(highlight=False, stderr=True)
        self.live = self.console.is_terminal and not quiet

    def run(self) -> None:
        """Reads and answers until the end of the input or /exit."""
        if self.typed:
            import readline  # noqa: F401  input() edits lines and remembers them once it is loaded

            self._note("Ctrl-C stops an answer, Ctrl-D ends. /help lists the commands.")
        while (line := self._read()) is not None:
            line = line.strip()
            if line.startswith("/") and not line.startswith("//"):
                if self._obey(line):
                    return
            elif line:
                self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _read(self) -> str | None:
        """The next line; None at the end."""
        while True:
            try:
                if self.typed:
                    return input("> ")
                line = sys.stdin.readline()
                return line if line else None
            except EOFError:
                print(file=self.console.file)
                return None
            except KeyboardInterrupt:
                if not self.typed:
                    raise
                self._note("\nCtrl-D or /exit ends.")

    def _answer(self, content: str) -> None:
        if not content.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in content):
            self._note("This message holds bytes that are no text in UTF-8: it is left out.")
            return
        self.messages.append({"role": "user", "content": content})
        from dllm.cli.display import say

        try:
            prompt = self._prompt()
            text = self._write(prompt)
        except KeyboardInterrupt:
            self.messages.pop()
            self._note("Stopped: this answer and its question are taken out of the conversation.")
        except DllmError as error:
            self.messages.pop()
            self._note(str(error))
        else:
            self.messages.append({"role": "assistant", "content": text})
            say(self.console, (text, ""))

    def _prompt(self) -> Tensor:
        """int64 [length] of what the model is given: the conversation, less its oldest exchanges where the context is full.

        Raises:
            OptionError: not even the last message fits, or the chat template refuses the conversation.
        """
        from dllm.pipelines.llada.generate import encode_prompt, generation_config, generation_request

        first, config = 0, generation_config(**self.options)
        while True:
            told: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
            ids = encode_prompt(self.tokenizer, told + self.messages[first:])
            try:
                generation_request(self.model, self.tokenizer, ids, config, what="The message")
            except OptionError:
                first += 2  # a question and its answer
                if first >= len(self.messages):
                    raise
                continue
            if first:
                self._note(f"The context is full: the model does not see the {first} oldest messages any more.")
            return ids

    def _write(self, prompt: Tensor) -> str:
        from dllm.cli.display import LiveCanvas
        from dllm.pipelines.llada.generate import generate

        # noise of its own for each answer: asked again, a question may be answered in other words
        extra: dict[str, Any] = {"requests": [self.turn], **self.options}
        self.turn += 1
        if not self.live:
            return generate(self.model, self.tokenizer, [prompt], **extra).texts[0]
        config = SamplingConfig.from_options(**self.options)
        gen_length = int(config.length_options.get("initial_length", config.gen_length))
        steps = min(self.options.get("steps") or gen_length, gen_length)
        canvas = LiveCanvas(
            [None] * gen_length,
            lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)),
            steps=steps,
            seconds=0,
            console=self.console,
            offset=len(prompt),
            mask_token_id=self.tokenizer.mask_token_id,
            transient=True,
        )
        with canvas:
            return generate(self.model, self.tokenizer, [prompt], on_step=canvas, **extra).texts[0]

    def _obey(self, line: str) -> bool:
        """Does what a command says; True if it ends the conversation."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name not in COMMANDS:
            self._note(f"There is no command {name}.{did_you_mean(name, COMMANDS)}")
        elif name == "/exit":
            return True
        elif name == "/help":
            self._note("\n".join(f"{command:<8}  {what}" for command, what in COMMANDS.items()))
        elif name == "/set":
            self._set(rest)
        elif name == "/save":
            self._save(rest)
        else:
            if name == "/system":
                self.system = rest or None
            self.messages = []
            self._note("The conversation begins anew.")
        return False

    def _set(self, words: str) -> None:
        name, _, value = words.partition(" ")
        value = value.strip()
        if not name:
            shown = [f"{option} {setting}" for option, setting in sorted(self.options.items())]
            self._note("\n".join(shown) or "No option is set: all are at their defaults.")
            return
        from dllm.pipelines.llada.generate import generation_config

        parser = Parser(prog="dllm chat", add_help=False)
        add_settings(parser, SamplingConfig, ALIASES)
        target = ALIASES.get(name, name)
        try:
            if value in ("default", ""):
                SamplingConfig.from_options(
                    **{name: getattr(SamplingConfig(), target, None)}
                )  # is there such an option?
                if not value:
                    raise OptionError(f"/set {name} needs a value, or the word default.")
                changed = {option: setting for option, setting in self.options.items() if option != target}
            else:
                switch = {"true": f"--{name}", "false": f"--no-{name}"}.get(value.lower())
                given = parser.parse_args([switch] if switch else [f"--{name}", *value.split()])
                changed = self.options | given_settings(given, SamplingConfig)
            generation_config(**changed)
        except OptionError as error:
            self._note(str(error).replace(". See  dllm chat --help", ". See  /help"))
            return
        self.options = changed
        self._note(f"{target} is {changed.get(target, 'at its default')}.")

    def _save(self, name: str) -> None:
        if not name:
            self._note("/save needs the name of a file.")
            return
        told: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": told + self.messages}, ensure_ascii=False) + "\n")
        except FileExistsError:
            self._note(f"{name} is there already: name another file.")
        except (OSError, UnicodeEncodeError) as error:
            self._note(f"{name} cannot be written: {error}")
        else:
            self._note(f"Wrote {len(told + self.messages)} messages to {name}.")

    def _note(self, text: str) -> None:
        self.notes.print(Text(text, style=_NOTE), soft_wrap=True)
