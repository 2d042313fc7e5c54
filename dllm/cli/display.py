"""Denoising, shown while it happens: a canvas whose masks turn into tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dllm.sampling.pieces import TokenPieces
from dllm.sampling.trace import StepEvent

MASK = "·"
GIVEN, FRESH, FILLED, BLANK = "bold", "black on green", "green", "dim"
Draw = Callable[[Sequence[str], Sequence[str]], Text]
"""(pieces, styles) -> what to print; a piece is a token's text, or a sign for a mask."""


class LiveCanvas:
    """Shows one row of a run. Pass the object as `on_step`; use it as a context manager around the call.

    Args:
        start: the text of each position; None where it is masked.
        decode: the text of token ids, such as `tokenizer.decode`; neighbours are decoded together.
        draw: lays the pieces out; plain running text by default.
        row: which row of the batch to show.
        seconds: time over which to spread the steps that are shown, however fast the model is.
        steps: how many steps there will be.
        console: where to; standard output by default. Not a terminal: the first, the middle and the last frame.
        offset: the canvas position of the first piece.
        mask_token_id: a token that is taken back comes as this one.
        transient: the canvas goes from the terminal when it is done.
    """

    def __init__(
        self,
        start: Sequence[str | None],
        decode: Callable[[list[int]], str],
        *,
        draw: Draw | None = None,
        row: int = 0,
        seconds: float = 6.0,
        steps: int | None = None,
        console: Console | None = None,
        offset: int = 0,
        mask_token_id: int | None = None,
        transient: bool = False,
    ) -> None:
        self.pieces = [MASK if piece is None else piece for piece in start]
        self.styles = [BLANK if piece is None else GIVEN for piece in start]
        self.tokens: list[int | None] = [None] * len(start)
        self.split, self.draw, self.row = TokenPieces(decode), draw or running_text, row
        self.offset, self.mask_token_id = offset, mask_token_id
        self.total = steps if steps is not None else sum(piece is None for piece in start)
        self.pause = seconds / max(1, self.total)
        self.console = console or Console()
        self.done = 0
        self.live = Live(console=self.console, auto_refresh=False, transient=transient)

    def __enter__(self) -> LiveCanvas:
        if self.console.is_terminal:
            self.live.start()
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.styles = [FILLED if style == FRESH else style for style in self.styles]
        if error is None:
            self.total = self.done  # a block with few masks takes fewer steps than its share
        if self.console.is_terminal:
            self._show()
            self.live.stop()
        elif error is None:
            self.console.print(self._frame())

    def __call__(self, event: StepEvent) -> None:
        self.styles = [FILLED if style == FRESH else style for style in self.styles]
        event = event.of_row(self.row)
        if not len(event.row) and not len(event.grown_row):
            return
        for position, token in zip(event.position.tolist(), event.token.tolist(), strict=True):
            place = position - self.offset
            self.tokens[place] = None if token == self.mask_token_id else token
            self.pieces[place], self.styles[place] = MASK, BLANK if self.tokens[place] is None else FRESH
        for position, count in zip(event.grown_position.tolist(), event.grown_count.tolist(), strict=True):
            place = position - self.offset + 1
            self.tokens[place:place], self.styles[place:place] = [None] * count, [BLANK] * count
            self.pieces[place:place] = [MASK] * count
        for place, piece in enumerate(
            self.split(self.tokens)
        ):  # all: a new token may make its neighbours' character whole
            if piece is not None:
                self.pieces[place] = piece
        self.done += 1
        self._show()
        if self.console.is_terminal:
            time.sleep(self.pause)

    def _show(self) -> None:
        if self.console.is_terminal:
            self.live.update(self._frame(), refresh=True)
        elif self.done in (0, self.total // 2):
            self.console.print(self._frame())

    def _frame(self) -> Group:
        return Group(self.draw(self.pieces, self.styles), Text(f"step {self.done} of {self.total}", style="dim"))


def running_text(pieces: Sequence[str], styles: Sequence[str]) -> Text:
    """One piece after the other."""
    return Text.assemble(*((visible(piece), style) for piece, style in zip(pieces, styles, strict=True)))


def visible(text: str) -> str:
    """Control characters as the signs that stand for them: what a model writes must not steer a terminal."""
    return text.translate(_SIGNS)


_SIGNS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_SIGNS |= {0x7F: "\u2421"} | dict.fromkeys(range(128, 160), "�")


def say(console: Console, *parts: tuple[str, str]) -> None:
    """Prints (text, style) one after the other; on a terminal with colours and with control characters made visible."""
    if console.is_terminal:
        console.print(Text.assemble(*((visible(text), style) for text, style in parts)), soft_wrap=True)
    else:
        print("".join(text for text, _ in parts), file=console.file)


def sudoku_grid(pieces: Sequence[str], styles: Sequence[str]) -> Text:
    """81 or 36 cells as a grid with its boxes; what follows the cells is left out."""
    size, box_rows, box_columns = (9, 3, 3) if len(pieces) >= 81 else (6, 2, 3)
    boxes = size // box_columns

    def rule(left: str, middle: str, right: str) -> Text:
        return Text(left + middle.join(["─" * (2 * box_columns + 1)] * boxes) + right + "\n")

    text = rule("┌", "┬", "┐")
    for row in range(size):
        if row and row % box_rows == 0:
            text += rule("├", "┼", "┤")
        for column in range(size):
            cell = row * size + column
            text += Text("│ " if column % box_columns == 0 else "") + Text(pieces[cell], styles[cell]) + Text(" ")
        text += Text("│\n")
    return text + rule("└", "┴", "┘")
