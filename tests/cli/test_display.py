"""The canvas that fills up: on a terminal every step, elsewhere three frames; what is given never changes."""

from __future__ import annotations

import io
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dllm.cli.display import LiveCanvas, running_text, say, sudoku_grid
from dllm.sampling.trace import StepEvent

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system="standard", highlight=False)


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return CONTROL.sub("", to.file.getvalue())


def event(step: int, *commits: tuple[int, int, int]) -> StepEvent:
    """Of (row, position, token)."""
    row, position, token = torch.tensor(commits).T
    return StepEvent(step, row, position, token, torch.ones(len(commits)))


def letter(token: int) -> str:
    return chr(ord("A") + token)


def letters(tokens: list[int]) -> str:
    return "".join(map(letter, tokens))


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[str | None], list[list[int]]]:
    """A row with blanks, and the blanks in the order in which steps fill them."""
    given_at = draw(st.lists(st.booleans(), min_size=1, max_size=20))
    start = ["g" if there else None for there in given_at]
    blanks = draw(st.permutations([place for place, there in enumerate(given_at) if not there]))
    steps = []
    while blanks:
        count = draw(st.integers(1, len(blanks)))
        steps.append(blanks[:count])
        blanks = blanks[count:]
    return start, steps


@given(runs())
def test_on_a_terminal_masks_become_tokens_and_given_ones_stay(run: tuple[list[str | None], list[list[int]]]) -> None:
    start, steps = run
    to = console(terminal=True)
    frames = []
    with LiveCanvas(start, letters, steps=len(steps), seconds=0, console=to) as live:
        frames.append(list(live.pieces))
        for number, places in enumerate(steps):
            # another row of the batch commits as well, and must not be seen
            live(event(number, *((0, place, number) for place in places), (1, 0, 25)))
            frames.append(list(live.pieces))
        live(event(len(steps), (1, 0, 25)))
    for number, frame in enumerate(frames):
        expected = [piece if piece is not None else "·" for piece in start]
        for done, places in enumerate(steps[:number]):
            for place in places:
                expected[place] = letter(done)
        assert frame == expected
    shown = written(to)
    assert "".join(frames[0]) + f"\nstep 0 of {len(steps)}" in shown
    assert shown.rstrip().endswith("".join(frames[-1]) + f"\nstep {len(steps)} of {len(steps)}")
    for number in range(len(steps) + 1):
        assert f"step {number} of " in shown


def test_what_is_fresh_stands_out_for_one_step() -> None:
    to = console(terminal=True)
    with LiveCanvas(["a", None, None], letters, seconds=0, console=to) as live:
        live(event(0, (0, 1, 0)))
        assert live.styles == ["bold", "black on green", "dim"]
        live(event(1, (0, 2, 1)))
        assert live.styles == ["bold", "green", "black on green"]
    assert live.styles == ["bold", "green", "green"]


def test_a_pipe_gets_three_frames() -> None:
    to = console(terminal=False)
    blanks = 40
    with LiveCanvas([None] * blanks, letters, console=to) as live:
        for place in range(blanks):
            live(event(place, (0, place, 0)))
    lines = written(to).splitlines()
    assert [line for line in lines if line.startswith("step")] == ["step 0 of 40", "step 20 of 40", "step 40 of 40"]
    assert lines[::2] == ["·" * 40, "A" * 20 + "·" * 20, "A" * 40]


def test_fewer_steps_than_foreseen_end_as_all_of_them() -> None:
    to = console(terminal=False)
    with LiveCanvas([None, None], letters, steps=9, console=to) as live:
        live(event(0, (0, 0, 0), (0, 1, 0)))
    assert written(to).endswith("AA\nstep 1 of 1\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_passes_through_and_the_terminal_is_given_back(terminal: bool) -> None:
    to = console(terminal)
    canvas = LiveCanvas([None], letters, console=to)
    with pytest.raises(ZeroDivisionError), canvas:
        raise ZeroDivisionError
    assert not canvas.live.is_started
    assert "A" not in written(to)


@pytest.mark.parametrize(("size", "box_rows", "box_columns"), [(6, 2, 3), (9, 3, 3)])
def test_a_grid_holds_its_cells_in_row_order_and_its_boxes(size: int, box_rows: int, box_columns: int) -> None:
    cells = [letter(place % 26) for place in range(size * size)] + ["end"]
    text = sudoku_grid(cells, ["bold"] * len(cells))
    assert re.sub(r"[^A-Z]", "", text.plain) == "".join(cells[:-1])
    lines = text.plain.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == size + size // box_rows + 1
    for line in lines:
        assert line.count("│") in (0, size // box_columns + 1)
    assert [lines[0][0], lines[-1][-1]] == ["┌", "┘"]


def test_a_character_over_several_tokens_is_whole_once_they_are_all_there() -> None:
    moon = "\N{FULL MOON SYMBOL}".encode()

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    with LiveCanvas([None] * 4, decode, seconds=0, console=console(terminal=True), offset=7) as live:
        for step, place in enumerate((3, 1, 0)):
            live(event(step, (0, 7 + place, moon[place])))
        assert live.pieces == ["\ufffd", "\ufffd", "·", "\ufffd"]
        live(event(3, (0, 9, moon[2])))
        assert live.pieces == ["\N{FULL MOON SYMBOL}", "", "", ""]


def test_a_token_that_is_taken_back_is_a_mask_again() -> None:
    with LiveCanvas(["a", None], letters, seconds=0, console=console(terminal=True), mask_token_id=9) as live:
        live(event(0, (0, 1, 0)))
        live(event(1, (0, 1, 9)))
        assert (live.pieces, live.styles) == (["a", "·"], ["bold", "dim"])


def test_a_transient_canvas_leaves_nothing() -> None:
    to = console(terminal=True)
    with LiveCanvas([None], letters, seconds=0, console=to, transient=True) as live:
        live(event(0, (0, 0, 0)))
    assert isinstance(to.file, io.StringIO)
    end = to.file.getvalue().rpartition("step 1 of 1")[2]
    assert end.count("\x1b[1A\x1b[2K") == 2, "its two lines are wiped"


def test_what_a_model_writes_does_not_steer_a_terminal_and_is_not_changed_in_a_pipe() -> None:
    hostile = "\x1b]0;title\x07\x9b31m\r\x08\x7fé\ttab"
    terminal, pipe = console(terminal=True), console(terminal=False)
    for to in (terminal, pipe):
        say(to, ("> ", "bold"), (hostile, ""))
    assert written(terminal) == "> ␛]0;title␇\ufffd31m␍␈␡é\ttab\n".expandtabs(8)
    assert isinstance(pipe.file, io.StringIO)
    assert pipe.file.getvalue() == f"> {hostile}\n"
    assert running_text([hostile], ["dim"]).plain == "␛]0;title␇\ufffd31m␍␈␡é\ttab"


def test_square_brackets_are_text_and_not_markup() -> None:
    assert running_text(["[bold]", "x"], ["dim", "dim"]).plain == "[bold]x"


def test_a_row_that_grows_is_shown_longer() -> None:
    to = console(terminal=False)
    grown = event(0, (0, 3, 0))._replace(
        grown_row=torch.tensor([0]), grown_position=torch.tensor([2]), grown_count=torch.tensor([2])
    )
    with LiveCanvas([None] * 3, letters, console=to, steps=2, offset=1) as live:
        live(grown)
        live(event(1, (0, 1, 1), (0, 2, 2), (0, 3, 3), (0, 4, 4)))
    assert written(to).splitlines()[-2] == "BCDEA"
