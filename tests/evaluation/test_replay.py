"""Traces to look at: what the page, the GIF and the JSON hold is the run, and the page takes nothing from elsewhere."""

from __future__ import annotations

import errno
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dllm import disk
from dllm.errors import MissingExtraError, OptionError
from dllm.evaluation import replay
from dllm.evaluation.replay import replay_page, replay_row, save_trace
from dllm.pipelines import llada
from dllm.pipelines.llada.tokenizer import MASK, bpe_tokenizer
from dllm.sampling.trace import StepEvent, Trace

HOSTILE = "</script><script>document.title='taken'</script><!-- <script> & \u2028 \U0001f31d [é]\n__DATA__ __TITLE__"
TOKENIZER = bpe_tokenizer(["the sea is grey"], 280)


def event(step: int, *commits: tuple[int, int, int, float]) -> StepEvent:
    """Of (row, position, token, probability)."""
    row, position, token, probability = zip(*commits, strict=True)
    whole = (torch.tensor(numbers) for numbers in (row, position, token))
    return StepEvent(step, *whole, torch.tensor(probability))


def hostile_trace() -> Trace:
    """Row 0 is filled in from its end, one token a step; row 1 is given but for one token, taken back and committed again."""
    ids = TOKENIZER(HOSTILE, add_special_tokens=False)["input_ids"]
    mask = TOKENIZER.mask_token_id
    start = [torch.full((len(ids),), mask), torch.tensor([*ids[:3], mask])]
    events = [event(len(ids) - 1 - place, (0, place, ids[place], 0.5)) for place in reversed(range(len(ids)))]
    events[1] = event(1, (0, len(ids) - 2, ids[-2], 0.25), (1, 3, ids[4], 0.125))
    events[3] = event(3, (0, len(ids) - 4, ids[-4], 0.5), (1, 3, mask, 0.0))
    events[4] = event(4, (0, len(ids) - 5, ids[-5], 0.5), (1, 3, ids[3], 1.0))
    return Trace(start, events)


class Page(HTMLParser):
    """The tags of a page, and the texts of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def data(self) -> Any:
        (place,) = [i for i, (_, attributes) in enumerate(self.tags) if attributes.get("id") == "replay"]
        scripts = [text for tag, text in self.texts if tag == "script"]
        before = [tag for tag, _ in self.tags[:place] if tag == "script"]
        return json.loads(scripts[len(before)])


def replayed(row: dict[str, Any]) -> list[list[str | None]]:
    """The texts before the first step and after each, as the page's script makes them."""
    pieces = list(row["pieces"])
    states = [list(pieces)]
    for frame in row["frames"]:
        for place, text in frame["pieces"]:
            pieces[place] = text
        states.append(list(pieces))
    return states


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "run.html"
    return save_trace(hostile_trace(), TOKENIZER, path, titles=[HOSTILE, "the second"])


def test_the_page_holds_the_run(page: Path) -> None:
    data = Page(page.read_text(encoding="utf-8")).data()
    trace = hostile_trace()
    first, second = data["rows"]
    assert [first["title"], second["title"]] == [HOSTILE, "the second"]
    states = replayed(first)
    assert set(states[0]) == {None}
    assert "".join(states[-1]) == HOSTILE
    assert len(states) == len(trace.start[0]) + 1
    for state, frame in zip(states, trace.frames(0), strict=True):
        assert [text is None for text in state] == (frame == TOKENIZER.mask_token_id).tolist()
    ids = trace.start[0].tolist()
    for frame in first["frames"]:
        for place, token, probability in frame["commits"]:
            ids[place] = token
            assert probability in (0.25, 0.5)
    assert TOKENIZER.decode(ids) == HOSTILE
    assert [(frame["step"], frame["commits"][0][2]) for frame in second["frames"]] == [(1, 0.125), (3, 0.0), (4, 1.0)]
    assert [state[3] is None for state in replayed(second)] == [True, False, True, False]


def test_characters_over_several_tokens_are_whole_as_soon_as_their_tokens_are_there(page: Path) -> None:
    first, _ = Page(page.read_text(encoding="utf-8")).data()["rows"]
    states = replayed(first)
    (moon,) = [place for place, text in enumerate(states[-1]) if text == "\U0001f31d"]
    assert [state[moon] for state in states if state[moon] is not None] == ["\U0001f31d"] * (moon + 1)
    assert states[-1][moon + 1 : moon + 4] == ["", "", ""]
    assert states[-moon - 2][moon : moon + 2] == [None, "\ufffd"]


def test_the_page_loads_nothing_and_no_text_of_the_run_becomes_part_of_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    plain = replay_page([replay_row(Trace([torch.tensor([7])]), TOKENIZER, 0, "plain")])
    found, expected = Page(text), Page(plain)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in expected.tags], "no tag comes from the run"
    assert not re.search(r"https?:|//[a-z]", re.sub(r"(?m)^// .*$", "", plain)), "no address"
    for tag, attributes in found.tags:
        assert tag not in ("img", "iframe", "object", "embed", "form", "a", "base")
        assert not any(name.startswith("on") for name in attributes)
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
    (policy,) = [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none';")
    assert "eval" not in str(policy)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|import\(", plain)
    (title,) = [told for tag, told in found.texts if tag == "title" and told.strip()]
    assert title == "2 rows"
    alone = Page(replay_page([replay_row(Trace([torch.tensor([7])]), TOKENIZER, 0, HOSTILE)]))
    (title,) = [told for tag, told in alone.texts if tag == "title" and told.strip()]
    assert title == " ".join(HOSTILE.split())[:100]


def test_json_is_the_trace(tmp_path: Path) -> None:
    path = save_trace(hostile_trace(), TOKENIZER, tmp_path / "run.json", titles=["a", "b"])
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["mask_token_id"], found["titles"]) == (TOKENIZER.mask_token_id, ["a", "b"])
    again = Trace.from_json(found)
    for row in (0, 1):
        assert [x.tolist() for x in again.frames(row)] == [x.tolist() for x in hostile_trace().frames(row)]


def frames_of(path: Path) -> tuple[list[Image.Image], list[int]]:
    images, durations = [], []
    with Image.open(path) as picture:
        assert picture.format == "GIF"
        assert picture.info["loop"] == 0
        for number in range(picture.n_frames):
            picture.seek(number)
            images.append(picture.convert("RGB"))
            durations.append(picture.info["duration"])
    return images, durations


def test_a_gif_has_a_frame_a_step(tmp_path: Path) -> None:
    text = "the sea is grey"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    start = torch.tensor(ids)
    start[1:] = TOKENIZER.mask_token_id
    events = [event(place - 1, (0, place, ids[place], 0.5)) for place in range(1, len(ids))]
    images, durations = frames_of(save_trace(Trace([start], events), TOKENIZER, tmp_path / "run.gif"))
    assert len(images) == len(ids)
    assert len({image.size for image in images}) == 1
    assert all(a.tobytes() != b.tobytes() for a, b in itertools.pairwise(images))
    assert durations[-1] == durations[0] + 2000
    green = (45, 164, 78)  # what a step commits stands on it

    def near(image: Image.Image) -> bool:
        colours = [colour for _, colour in image.getcolors(10**6) if isinstance(colour, tuple)]
        return any(max(abs(a - b) for a, b in zip(colour, green, strict=True)) < 12 for colour in colours)

    assert [near(image) for image in images] == [False] + [True] * (len(ids) - 1)


def test_a_gif_of_a_grid_has_its_columns_and_of_a_long_run_not_too_many_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, long = 24, 84
    monkeypatch.setattr("dllm.evaluation.replay.MOST_FRAMES", most)
    digit = TOKENIZER("7", add_special_tokens=False)["input_ids"][0]
    trace = Trace(
        [torch.full((long,), TOKENIZER.mask_token_id)], [event(place, (0, place, digit, 0.5)) for place in range(long)]
    )
    images, _ = frames_of(save_trace(trace, TOKENIZER, tmp_path / "grid.gif", columns=4))
    assert most // 2 < len(images) <= most + 1
    wide, high = images[0].size
    print(wide, high)
    assert high > 3 * wide


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("run.htm", 1, r"cannot be written to .*run\.htm\. Did you mean '\.html'\?"),
        ("run", 1, r"It can be one of: \.gif, \.html, \.json"),
        ("nowhere/run.html", 1, "its folder has to exist"),
        ("run.gif", 2, r"A GIF shows one row, and there are 2: give one, or write the trace as \.html"),
    ],
)
def test_where_a_trace_cannot_go(name: str, rows: int, message: str, tmp_path: Path) -> None:
    trace = Trace([torch.tensor([7])] * rows)
    with pytest.raises(OptionError, match=message):
        save_trace(trace, TOKENIZER, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["run.html", "run.json", "run.gif"])
def test_a_full_disk_leaves_what_was_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("before")

    def full(unfinished: Path, place: Path) -> None:
        assert unfinished.exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "put_in_place", full)
    with pytest.raises(OptionError, match=rf"cannot be written to .*{name}: No space left on device\. Free some space"):
        save_trace(Trace([torch.tensor([7])]), TOKENIZER, tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "before")]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_run() -> None:
    with pytest.raises(OptionError, match=r"A trace cannot be written to /proc/run\.html: "):
        replay.check_trace_path(Path("/proc/run.html"), 1)


def test_as_many_titles_as_rows(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="2 titles were given for 1 rows"):
        save_trace(Trace([torch.tensor([7])]), TOKENIZER, tmp_path / "run.html", titles=["a", "b"])


def test_without_pillow_a_gif_says_which_extra_and_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    kept = [folder for folder in sys.path if not (Path(folder) / "PIL").is_dir()]
    monkeypatch.setattr(sys, "path", kept)
    trace = Trace([torch.tensor([7])])
    with pytest.raises(
        MissingExtraError, match=r"A trace as GIF needs the package 'pillow': run  pip install 'dllm\[plots\]'"
    ):
        save_trace(trace, TOKENIZER, tmp_path / "run.gif")
    assert save_trace(trace, TOKENIZER, tmp_path / "run.html").exists()


def test_a_real_run_is_replayed_to_its_result(tmp_path: Path) -> None:
    model, tokenizer = llada.load_model("builtin:sudoku9"), llada.load_tokenizer("builtin:sudoku9")
    grid = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
    result = llada.infill(model, tokenizer, [grid[:60] + MASK * 21 + str(tokenizer.eos_token)], trace=True, steps=7)
    assert result.trace is not None
    path = save_trace(result.trace, tokenizer, tmp_path / "run.html", columns=9)
    data = Page(path.read_text(encoding="utf-8")).data()
    (row,) = data["rows"]
    assert data["columns"] == 9
    assert len(row["frames"]) == 7
    assert "".join(replayed(row)[-1]) == result.texts[0] + str(tokenizer.eos_token)
    probabilities = [p for frame in row["frames"] for _, _, p in frame["commits"]]
    assert all(0 < p <= 1 for p in probabilities)


def test_tokens_that_a_policy_takes_back_are_masks_again_on_the_way() -> None:
    model, tokenizer = llada.load_model("builtin:sudoku9"), llada.load_tokenizer("builtin:sudoku9")
    puzzle = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79".replace(".", MASK)
    result = llada.infill(
        model, tokenizer, [puzzle + str(tokenizer.eos_token)], trace=True, policy="remdm", eta=0.3, steps=20
    )
    assert result.trace is not None
    row = replay_row(result.trace, tokenizer, 0, "puzzle")
    states = replayed({"pieces": row.pieces, "frames": [frame._asdict() for frame in row.frames]})
    assert "".join(map(str, states[-1])) == result.texts[0] + str(tokenizer.eos_token)
    back = [place for a, b in itertools.pairwise(states) for place, text in enumerate(b) if text is None and a[place]]
    assert back


# In a browser ---------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(page: Path, fragment: str, profile: Path) -> str:
    """The page's elements after its script ran for ten seconds of its own time."""
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --virtual-time-budget=10000"
    command = [str(BROWSER), *flags.split(), f"--user-data-dir={profile}", "--dump-dom", f"{page.as_uri()}#{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def cells(dom: str) -> list[tuple[str, str]]:
    """(class, text) of every position."""
    spans = re.findall(r'<span data-place="\d+" class="([^"]*)"[^>]*>([^<]*)</span>', dom)
    unescape = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}
    return [(kind, re.sub("&(?:lt|gt|amp);", lambda m: unescape[m[0]], text)) for kind, text in spans]


@pytest.mark.system
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_in_a_browser_the_page_shows_each_step(page: Path, tmp_path: Path) -> None:
    states = replayed(Page(page.read_text(encoding="utf-8")).data()["rows"][0])
    dom = opened(page, "frame=7", tmp_path)
    assert [text for _, text in cells(dom)] == ["·" if text is None else text for text in states[7]]
    assert f"step 7 of {len(states) - 1}" in dom
    assert [place for place, (kind, _) in enumerate(cells(dom)) if "fresh" in kind] == [len(states) - 1 - 7]
    assert "<title>2 rows</title>" in dom, "no text of the run ran as a script"
    assert "probability 0.5000" in dom
    confident = opened(page, "frame=7&colour=confidence", tmp_path)
    assert {*re.findall(r"--hue: (\d+)", confident)} == {"60", "30"}, "120 degrees for a probability of 1"
    played = opened(page, "row=1", tmp_path)
    assert "step 3 of 3" in played
    assert [text for _, text in cells(played)] == replayed(Page(page.read_text(encoding="utf-8")).data()["rows"][1])[-1]
