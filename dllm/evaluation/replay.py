"""A denoising run to look at again: a page that stands alone, an animated picture, or the plain trace."""

from __future__ import annotations

import html
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dllm.disk import written_beside
from dllm.errors import MissingExtraError, OptionError, did_you_mean
from dllm.sampling.pieces import TokenPieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dllm.sampling.trace import Trace

SUFFIXES = (".html", ".gif", ".json")
MOST_FRAMES = 240
"""Of a GIF; where a run has more steps, frames are left out evenly. The page has them all."""


class Frame(NamedTuple):
    """One step of a row."""

    step: int
    """Of the run; 0 for the first."""
    commits: list[tuple[int, int, float]]
    """(position, token id, probability); the mask's id where a token was taken back."""
    pieces: list[tuple[int, str | None]]
    """(position, text) of every position whose text changed; None for a mask."""


@dataclass(frozen=True)
class ReplayRow:
    """One row of a run, as texts."""

    title: str
    tokens: list[int]
    """Before the first step."""
    pieces: list[str | None]
    """The text of each token before the first step; None for a mask."""
    frames: list[Frame]
    """The steps that changed the row."""


def check_trace_path(path: Path, rows: int) -> None:
    """Whether a trace of so many rows can be written there; to be asked before the run.

    Raises:
        OptionError: another suffix, several rows for a GIF, or a folder that is not there or cannot be written to.
        MissingExtraError: a GIF without pillow.
    """
    if path.suffix not in SUFFIXES:
        raise OptionError(f"A trace cannot be written to {path}.{did_you_mean(path.suffix or path.name, SUFFIXES)}")
    if not path.parent.is_dir() or path.is_dir():
        raise OptionError(f"A trace cannot be written to {path}: its folder has to exist, and it is a file.")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OptionError(f"A trace cannot be written to {path}: {error.strerror}.") from error
    if path.suffix == ".gif":
        if rows > 1:
            raise OptionError(f"A GIF shows one row, and there are {rows}: give one, or write the trace as .html.")
        if importlib.util.find_spec("PIL") is None:
            raise MissingExtraError("pillow", "plots", "A trace as GIF")


def save_trace(
    trace: Trace,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
) -> Path:
    """Writes a trace in the form that the file's suffix names.

    Args:
        trace: of `generate` or `infilling`, with `trace=True`.
        tokenizer: of the run.
        path: `.html`, a page without any link to elsewhere, with all rows, a slider, and colours by step or by probability;
            `.gif`, the only row (pillow); `.json`, what `Trace.from_json` reads, with the mask's id and the titles.
        titles: what the rows are called; "row 0" and so on by default.
        columns: lay the tokens out as a grid with this many to a line; running text by default.

    Returns:
        The path.

    Raises:
        OptionError: see `check_trace_path`; the disk is full; or as many titles as there are rows were not given.
        MissingExtraError: a GIF without pillow.
    """
    path = Path(path)
    check_trace_path(path, len(trace.start))
    names = [f"row {row}" for row in range(len(trace.start))] if titles is None else list(titles)
    if len(names) != len(trace.start):
        raise OptionError(f"{len(names)} titles were given for {len(trace.start)} rows: give one a row.")
    try:
        with written_beside(path) as unfinished:
            _write_trace(trace, tokenizer, unfinished, names, columns)
    except OSError as error:
        raise OptionError(
            f"The trace cannot be written to {path}: {error.strerror}. Free some space, or name another file."
        ) from error
    return path


def _write_trace(
    trace: Trace, tokenizer: PreTrainedTokenizerBase, path: Path, names: Sequence[str], columns: int | None
) -> None:
    if path.suffix == ".json":
        about = {"mask_token_id": tokenizer.mask_token_id, "titles": list(names)}
        path.write_text(json.dumps(trace.to_json() | about) + "\n", encoding="utf-8")
        return
    trace = trace.stretched()
    if path.suffix == ".html":
        rows = [replay_row(trace, tokenizer, row, title) for row, title in enumerate(names)]
        path.write_text(replay_page(rows, list(tokenizer.all_special_ids), columns), encoding="utf-8")
    else:
        save_gif(replay_row(trace, tokenizer, 0, names[0], skip_special_tokens=True), path, columns)


def replay_row(
    trace: Trace, tokenizer: PreTrainedTokenizerBase, row: int, title: str, *, skip_special_tokens: bool = False
) -> ReplayRow:
    """The texts of a row before the first step, and what each step changed.

    Args:
        trace: of a run.
        tokenizer: of the run.
        row: which.
        title: what it is called.
        skip_special_tokens: end of text and its like have an empty text.
    """
    mask = tokenizer.mask_token_id
    split = TokenPieces(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)))
    start: list[int] = trace.start[row].tolist()
    canvas = [None if token == mask else token for token in start]
    first = now = split(canvas)
    frames = []
    for event in trace.events:
        here = event.row == row
        commits = list(
            zip(
                event.position[here].tolist(),
                event.token[here].tolist(),
                event.confidence[here].tolist(),
                strict=True,
            )
        )
        if not commits:
            continue
        for place, token, _ in commits:
            canvas[place] = None if token == mask else token
        before, now = now, split(canvas)
        changed = [(place, new) for place, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]
        frames.append(Frame(event.step, commits, changed))
    return ReplayRow(title, start, first, frames)


def replay_page(rows: Sequence[ReplayRow], special_ids: Sequence[int] = (), columns: int | None = None) -> str:
    """A page of HTML that holds the rows and all that shows them; it loads nothing.

    Args:
        rows: at least one.
        special_ids: tokens to show small.
        columns: a grid with this many tokens to a line; running text by default.
    """
    title = rows[0].title if len(rows) == 1 else f"{len(rows)} rows"
    told = [{**vars(row), "frames": [frame._asdict() for frame in row.frames]} for row in rows]
    data: dict[str, Any] = {"rows": told, "special": list(special_ids), "columns": columns}
    # inside <script> only "<" can end the element: </script>, or <!-- that changes how its end is found
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = files("dllm.evaluation").joinpath("assets", "replay.html").read_text(encoding="utf-8")
    head, tail = page.split("__DATA__")
    return head.replace("__TITLE__", html.escape(" ".join(title.split())[:100])) + written + tail


INK, PAPER, GIVEN, BLANK, FRESH, FILLED = "#1b1f24", "#ffffff", "#1b1f24", "#b5bcc4", "#ffffff", "#1a7f37"
GREEN = "#2da44e"


def save_gif(row: ReplayRow, path: Path, columns: int | None = None, *, width: int = 760, seconds: float = 8.0) -> None:
    """Draws a row while it is filled in: masks as dots, what a step commits on green.

    Args:
        row: what to draw.
        path: of the GIF.
        columns: a grid with this many tokens to a line; running text by default.
        width: pixels of running text.
        seconds: how long the steps last together; each at least 0.04, and the last one 2 more.

    Raises:
        MissingExtraError: pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingExtraError("pillow", "plots", "A trace as GIF") from error
    font = _font()
    states = list(_states(row))
    every = -(-len(states) // MOST_FRAMES)
    shown = states[:-1][::every] + states[-1:]
    layouts = [_layout(pieces, font, columns, width) for pieces, _ in shown]
    bottom = max((y for layout in layouts for _, _, y, _ in layout), default=0)
    right = width if columns is None else max((x for layout in layouts for _, x, _, _ in layout), default=0) + 34
    images = []
    for (_, fresh), layout in zip(shown, layouts, strict=True):
        image = Image.new("RGB", (right, bottom + 44), PAPER)
        draw = ImageDraw.Draw(image)
        for place, x, y, text in layout:
            given, blank = row.pieces[place] is not None, text is None
            word = "·" if text is None else text
            if place in fresh and not blank:
                draw.rectangle((x - 1, y, x + font.getlength(word), y + 24), fill=GREEN)
            colour = BLANK if blank else GIVEN if given else FRESH if place in fresh else FILLED
            draw.text((x, y), word, fill=colour, font=font)
        images.append(image)
    pause = max(40, round(1000 * seconds / len(images) / 10) * 10)  # milliseconds; GIF counts hundredths of a second
    durations = [pause] * (len(images) - 1) + [pause + 2000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)


def _states(row: ReplayRow) -> Iterator[tuple[list[str | None], set[int]]]:
    """The texts before the first step and after each, and which positions that step filled."""
    pieces = list(row.pieces)
    yield list(pieces), set()
    for frame in row.frames:
        for place, text in frame.pieces:
            pieces[place] = text
        yield list(pieces), {place for place, _, _ in frame.commits}


def _layout(
    pieces: Sequence[str | None], font: Any, columns: int | None, width: int
) -> list[tuple[int, int, int, str | None]]:
    """(position, x, y, text or None for a mask) of every piece, a piece with line breaks as several."""
    line, margin = 26, 14
    placed: list[tuple[int, int, int, str | None]] = []
    x = y = margin
    for place, piece in enumerate(pieces):
        if columns is not None:
            if piece != "":
                placed.append((place, margin + place % columns * 26, margin + place // columns * line, piece))
            continue
        for number, part in enumerate([None] if piece is None else piece.split("\n")):
            if number:
                x, y = margin, y + line
            if part == "":
                continue
            long = round(font.getlength("·" if part is None else part)) + (2 if part is None else 0)
            if x + long > width - margin and x > margin:
                x, y = margin, y + line
                part = part and part.lstrip(" ")
            placed.append((place, x, y, part))
            x += long
    return placed


def _font() -> Any:
    """DejaVu Sans, of the system or of matplotlib, for it has most letters; else what pillow brings."""
    from PIL import ImageFont

    found = importlib.util.find_spec("matplotlib")
    inside = (
        [Path(place) / "mpl-data/fonts/ttf/DejaVuSans.ttf" for place in found.submodule_search_locations or ()]
        if found
        else []
    )
    for name in ("DejaVuSans.ttf", *map(str, inside)):
        try:
            return ImageFont.truetype(name, 18)
        except OSError:
            continue
    return ImageFont.load_default(18)
