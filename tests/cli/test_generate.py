"""`dllm generate`: puzzles with the model inside, text with a named one."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from system.workshop import save_tiny_model
from torch._dynamo.utils import counters

from dllm.cli import batches, display, line
from dllm.cli.main import main
from dllm.data.sudoku import is_solution, puzzles
from dllm.pipelines.llada import generate as write
from dllm.pipelines.llada import load_model, load_tokenizer
from dllm.sampling.trace import Trace

EASY = "534678912672195348198342567859761423426853791713924856961537284287419635.4528617."
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
TEXTS = ["the sea is grey and the sky is wide", "In the beginning there was a word.", "why is the sky blue?"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", texts=TEXTS))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure: what is wrong has to be said before."""

    def load(arguments: Namespace) -> tuple[Any, Any]:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(batches, "load", load)


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["generate", *arguments]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def records(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The answers, without how long they took."""
    rows = [json.loads(line) for line in out(capsys, *arguments, "--json").splitlines()]
    for row in rows:
        assert row.pop("seconds") >= 0
    return rows


# What only a trained model can do ------------------------------------------------------------------------------------


def test_the_model_inside_solves_an_unseen_puzzle(capsys: pytest.CaptureFixture[str]) -> None:
    assert ": solved\n" in out(capsys, "--seed", "1")


def test_the_model_inside_solves_most_puzzles(capsys: pytest.CaptureFixture[str]) -> None:
    unseen = [puzzle for puzzle, _ in puzzles(9, "test", 8, clues=(40, 45), seed=1)]
    rows = records(capsys, *unseen, "--steps", "20")
    assert [row["prompt"] for row in rows] == unseen
    assert sum(row["solved"] for row in rows) >= 7


# Puzzles --------------------------------------------------------------------------------------------------------------


def cells(shown: str) -> str:
    return re.sub(r"\D", "", shown[shown.index("┌") : shown.rindex("┘")])


def test_a_puzzle_is_filled_and_what_was_given_stays(capsys: pytest.CaptureFixture[str]) -> None:
    shown = out(capsys, PUZZLE)
    verdict, grid = shown.splitlines()[-2:]
    assert len(shown.splitlines()) == 15
    assert re.fullmatch(r"\d{81}", grid)
    assert cells(shown) == grid
    assert all(given in (".", cell) for given, cell in zip(PUZZLE, grid, strict=True))
    solved = is_solution(PUZZLE, grid)
    assert verdict == "51 blanks, 51 forwards: " + ("solved" if solved else "NOT solved: the model erred")


@pytest.mark.parametrize("blank", ["0", "_"])
def test_blanks_may_be_written_in_three_ways(blank: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert records(capsys, EASY.replace(".", blank)) == records(capsys, EASY)


def test_json_has_one_object_a_puzzle(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = records(capsys, PUZZLE, EASY, "--steps", "7")
    assert (first["prompt"], first["nfe"], first["new_tokens"]) == (PUZZLE, 7, 51)
    assert (second["prompt"], second["nfe"], second["new_tokens"]) == (EASY, 2, 2)
    keys = {"row", "prompt", "text", "solved", "steps", "nfe", "new_tokens", "tokens_per_forward", "exact"}
    for number, row in enumerate((first, second)):
        assert set(row) == keys
        assert row["row"] == number
        assert row["tokens_per_forward"] == pytest.approx(row["new_tokens"] / row["nfe"], abs=1e-4)
        assert row["solved"] == is_solution(row["prompt"], row["text"])


def test_puzzles_in_a_batch_are_solved_as_each_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run = [PUZZLE, EASY, PUZZLE, "--steps", "4", "--temperature", "50"]
    one, two, all_three = (records(capsys, *run, "--batch_size", size) for size in ("1", "2", "100"))
    assert one == two == all_three
    first, _, third = (row["text"] for row in one)
    assert first != third, "each prompt has noise of its own"


def test_guidance_counts_two_forwards_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["nfe"] for row in records(capsys, PUZZLE, EASY, "--steps", "3", "--cfg_scale", "1")] == [6, 4]


def test_a_seed_names_the_puzzle_and_no_seed_draws_one(capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(*arguments: str) -> str:
        return str(records(capsys, "--steps", "1", *arguments)[0]["prompt"])

    assert drawn("--seed", "3") == drawn("--seed", "3")
    assert drawn("--seed", "3") != drawn("--seed", "4")
    assert len({drawn() for _ in range(3)}) > 1


def test_a_full_grid_needs_no_forward(capsys: pytest.CaptureFixture[str]) -> None:
    (solution,) = (s for _, s in puzzles(9, "test", 1, clues=(40, 40)))
    (row,) = records(capsys, solution)
    assert (row["text"], row["solved"]) == (solution, True)
    assert (row["steps"], row["nfe"], row["new_tokens"], row["tokens_per_forward"]) == (0, 0, 0, 0.0)


def test_on_a_terminal_the_grid_fills_step_by_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    paused: list[float] = []
    monkeypatch.setattr(display.time, "sleep", paused.append)
    grid = records(capsys, PUZZLE, "--steps", "5")[0]["text"]
    shown = CONTROL.sub("", out(capsys, PUZZLE, "--steps", "5"))
    assert [step for step in range(9) if f"step {step} of 5" in shown] == [0, 1, 2, 3, 4, 5]
    assert sum(paused) == pytest.approx(6)
    frames = [frame.split("┘")[0] for frame in shown.split("┌")[1:]]
    assert frames[0].count("·") == 51
    assert re.sub(r"\D", "", frames[-1]) == grid
    assert shown.splitlines()[-1] == grid
    paused.clear()
    assert "step" not in CONTROL.sub("", out(capsys, PUZZLE, "--steps", "5", "--quiet"))
    assert not paused


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [""],
            r"'' has 0 characters: .* solves 9x9 sudoku, 81 characters .* name another model with --model_name_or_path",
        ),
        ([PUZZLE[:-1]], "has 80 characters"),
        (["Why is the sky blue?"], "'Why is the sky blue\\?' has 20 characters"),
        ([PUZZLE.replace("5", "x")], "'x'"),
        (["5" + PUZZLE[1:9].replace("3", "5") + PUZZLE[9:]], "5"),
        (["12345678." + "." * 8 + "9" + "." * 63], "has no solution"),
        ([EASY, PUZZLE + "1"], "has 82 characters"),
        ([PUZZLE, "--gen_length", "9"], "--gen_length has no meaning for puzzles and texts with blanks"),
        ([PUZZLE, "--max_new_tokens", "9"], "--gen_length has no meaning for puzzles and texts with blanks"),
        ([PUZZLE, "--temperature", "-1"], "temperature=-1.0: it is 0 or more"),
        ([PUZZLE, "--steps", "0"], "steps=0: it is a whole number, at least 1"),
        ([PUZZLE, "--batch_size", "0"], "--batch_size 0: it is at least 1"),
        ([PUZZLE, "--memory_gb", "-1"], "--memory_gb -1.0: it is a number above 0"),
        (["--prompts_file", "absent.txt"], "--prompts_file absent.txt cannot be read: .*No such file"),
        (["--prompts_file", "empty.txt"], "--prompts_file empty.txt holds no prompt"),
        (["--prompts_file", "."], "--prompts_file . cannot be read: .*directory"),
        (["--prompts_file", "-"], "--prompts_file - holds no prompt"),
        (["--model_name_or_path", "here"], "Give a prompt, or --prompts_file FILE"),
        (
            ["--model_name_or_path", "here", "hello", "--block_length", "64", "--gen_length", "32"],
            "block_length=64 exceeds gen_length=32",
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["generate", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(message, shown.err)
    assert shown.err.count("\n") == 1


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name_or_path", "./nowhere"], "There is no model folder './nowhere'"),
        (
            ["--model_name_or_path", "builtin:sudoku8"],
            r"No model 'builtin:sudoku8' ships with dllm\. Did you mean 'sudoku9'",
        ),
        (["--dtype", "float23"], r"dtype 'float23' does not exist\. Did you mean 'float32'"),
        (["--device", "gpu"], "--device gpu is not there: say cuda, mps or cpu"),
        (["--device", "mps:3"], "--device mps:3 is not there"),
        (["--gen_length", "1000"], "need 1003 positions, and the model's context is 512"),
    ],
)
def test_what_a_model_cannot_do_is_said(
    arguments: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [] if "--model_name_or_path" in arguments else ["--model_name_or_path", model]
    assert main(["generate", "--raw", "word", *named, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(message, shown.err), shown.err


NOISY = ["--temperature", "1", "--remasking", "random", "--gen_length", "6", "--raw"]


def test_the_size_of_a_batch_changes_nothing(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [text[:length] for length in (4, 11, 30) for text in TEXTS]
    run = ["--model_name_or_path", model, *NOISY, *prompts, "--batch_size"]
    expected = records(capsys, *run, "1")
    assert len({row["text"] for row in expected}) > 3
    for size in ("2", "4", "100"):
        assert records(capsys, *run, size) == expected


def test_prompts_come_from_words_files_and_standard_input(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--model_name_or_path", model, *NOISY]
    expected = records(capsys, *run, *TEXTS)
    assert [row["prompt"] for row in expected] == TEXTS
    (tmp_path / "prompts.txt").write_text("\n" + "\n\n".join(TEXTS[1:]) + "\n")
    assert records(capsys, *run, TEXTS[0], "--prompts_file", str(tmp_path / "prompts.txt")) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS)))
    assert records(capsys, *run, "--prompts_file", "-") == expected


def test_the_options_reach_the_sampler(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"steps": 6, "gen_length": 12, "block_length": 4, "temperature": 0.7, "cfg_scale": 0.5, "seed": 5}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    given = ["--model_name_or_path", model, "--raw", "--suppress_eos", "--cfg_keep_tokens", "7", "8"]
    expected = write(
        load_model(model), load_tokenizer(model), TEXTS, suppress_eos=True, cfg_keep_tokens=(7, 8), **options
    )
    rows = records(capsys, *given, *words, *TEXTS)
    assert [row["text"] for row in rows] == expected.texts
    assert [(row["steps"], row["new_tokens"]) for row in rows] == [(6, 12)] * len(TEXTS)


def test_a_chat_model_is_asked_in_its_template_unless_raw(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    run = ["--model_name_or_path", model, "--gen_length", "8", "--temperature", "1", TEXTS[2]]
    options: dict[str, Any] = {"gen_length": 8, "temperature": 1.0}
    chat = write(loaded, tokenizer, [[{"role": "user", "content": TEXTS[2]}]], **options).texts
    plain = write(loaded, tokenizer, [TEXTS[2]], **options).texts
    assert chat != plain
    assert [row["text"] for row in records(capsys, *run)] == chat
    assert [row["text"] for row in records(capsys, *run, "--raw")] == plain


def test_without_json_prompts_and_answers_stand_below_each_other(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--model_name_or_path", model, *NOISY, "[bold]why", *TEXTS[:1]]
    rows = records(capsys, *run)
    assert out(capsys, *run) == "".join(f"> {row['prompt']}\n{row['text']}\n\n" for row in rows)


def test_on_a_terminal_one_answer_is_shown_as_it_is_written(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    run = ["--model_name_or_path", model, *NOISY, "--suppress_eos", TEXTS[0]]
    (row,) = records(capsys, *run)
    shown = CONTROL.sub("", out(capsys, *run))
    assert [step for step in range(9) if f"step {step} of 6" in shown] == [0, 1, 2, 3, 4, 5, 6]
    assert "".join(display.visible(row["text"]).split()) in "".join(shown.rsplit("step 5 of 6", 1)[1].split())


def test_the_embedded_model_may_also_be_named_as_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then it writes text: a grid from its first cells."""
    folder = Path(load_model("builtin:sudoku9").config.name_or_path)
    shutil.copytree(folder, tmp_path / "copy")
    (row,) = records(capsys, "--model_name_or_path", str(tmp_path / "copy"), "--raw", "12345", "--gen_length", "4")
    assert re.fullmatch(r"[1-9]{4}", row["text"])


# Files ----------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TURNS = [{"role": "user", "content": TEXTS[2]}]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Three good prompts among three bad ones."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": TEXTS[0], "id": "a"},
        {"prompt": "word " * 600},
        {"messages": TURNS, "score": 0.5},
        {"prmpt": "misspelt"},
        {"messages": [{"role": "user"}]},
        {"prompt": TEXTS[1], "id": "b"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_of(model: str, prompts: Path, *more: str) -> list[str]:
    noisy = ["--temperature", "1", "--gen_length", "6"]
    return ["generate", "--model_name_or_path", model, "--prompts_file", str(prompts), *noisy, *more]


def test_a_bad_prompt_of_a_file_fails_alone(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert main(run_of(model, prompts, "--output", str(output))) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{output}: 6 rows, 3 of them with an error\n", "")
    rows = lines(output)
    assert [row["row"] for row in rows] == list(range(6))
    assert ["error" in row for row in rows] == [False, True, False, True, True, False]
    assert [row.get("id") for row in rows] == ["a", None, None, None, None, "b"]
    assert (rows[2]["messages"], rows[2]["score"]) == (TURNS, 0.5)
    assert "and the model's context is 512" in rows[1]["error"]
    assert "Did you mean 'prompt'?" in rows[3]["error"]
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    asked = [[{"role": "user", "content": TEXTS[0]}], TURNS, [{"role": "user", "content": TEXTS[1]}]]
    expected = write(loaded, tokenizer, asked, requests=[0, 2, 5], gen_length=6, temperature=1.0)
    good = [row for row in rows if "error" not in row]
    assert [row["text"] for row in good] == expected.texts
    for row in good:
        assert (row["steps"], row["nfe"], row["new_tokens"], row["tokens_per_forward"]) == (6, 6, 6, 1.0)
        assert row["seconds"] > 0


def test_settings_that_fit_one_row_of_a_file_and_not_another_fail_that_one_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "puzzles.txt").write_text(f"{EASY}\n{PUZZLE}\n", encoding="utf-8")
    asked = ["--prompts_file", str(tmp_path / "puzzles.txt"), "--steps", "3", "--block_length", "10", "--json"]
    assert main(["generate", *asked]) == 1
    easy, hard = map(json.loads, capsys.readouterr().out.splitlines())
    assert easy["solved"]
    assert "steps=3 is fewer than the 6 blocks of block_length=10" in hard["error"]


def test_logits_that_are_no_numbers_fail_their_row_of_a_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    damaged, tokenizer = load_model(model), load_tokenizer(model)
    with torch.no_grad():
        damaged.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(tokenizer.tokenize("w"))[0]] = torch.nan
    monkeypatch.setattr(batches, "load", lambda arguments: (damaged, tokenizer))
    (tmp_path / "prompts.txt").write_text("s\nw\ns\n", encoding="utf-8")
    asked = [
        "--model_name_or_path",
        model,
        "--prompts_file",
        str(tmp_path / "prompts.txt"),
        "--raw",
        "--gen_length",
        "4",
    ]
    assert main(["generate", *asked, "--json"]) == 1
    one, bad, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert "logits are not numbers" in bad["error"]
    assert one["text"] and other["text"]  # noqa: PT018


def test_what_only_the_model_finds_fails_alone_whoever_gave_it(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)

    def full(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        if int(kwargs["position_ids"].max()) >= 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    loaded.register_forward_pre_hook(full, with_kwargs=True)
    monkeypatch.setattr(batches, "load", lambda arguments: (loaded, tokenizer))
    run = ["--model_name_or_path", model, "--raw", "--gen_length", "4"]
    expected = records(capsys, *run, *TEXTS[:2])
    assert main(["generate", *run, TEXTS[0], "word " * 50, TEXTS[1], "--json"]) == 1
    one, failed, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert failed["error"] == "CUDA out of memory."
    assert [one["text"], other["text"]] == [row["text"] for row in expected]


def test_a_prompt_that_is_done_makes_room_for_the_next(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at a time, one of 9 steps among eight of one: as many forwards as the long one takes, and answers in order."""
    loaded, tokenizer, forwards = load_model(model), load_tokenizer(model), list[int]()
    loaded.register_forward_pre_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(batches, "load", lambda arguments: (loaded, tokenizer))
    counts = [1, 9, 1, 1, 1, 1, 1, 1, 1]
    (tmp_path / "t.txt").write_text("".join(f"the [MASK:{count}] sky\n" for count in counts))
    run = ["infill", "--model_name_or_path", model, "--prompts_file", str(tmp_path / "t.txt"), "--batch_size", "2"]
    assert main([*run, "--output", str(tmp_path / "a.jsonl")]) == 0
    rows = lines(tmp_path / "a.jsonl")
    assert [row["row"] for row in rows] == list(range(9))
    assert [row["steps"] for row in rows] == counts
    assert len(forwards) == 9
    capsys.readouterr()
    assert main([*run, "--json", "--memory_gb", "1e-9"]) == 1
    assert all(
        "there are 0.00 MiB for all rows: shorten" in json.loads(row)["error"]
        for row in capsys.readouterr().out.splitlines()
    )


def test_a_bar_tells_of_tokens_while_rows_are_written_and_of_rows_when_they_are(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    monkeypatch.setattr(line.Bar, "filled", lambda bar, masks: told.append(bar.before + masks))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (tmp_path / "t.txt").write_text("".join(f"the [MASK:{count}] sky\n" for count in (2, 4, 1)))
    run = ["infill", "--model_name_or_path", model, "--prompts_file", str(tmp_path / "t.txt"), "--batch_size", "2"]
    assert main([*run, "--json"]) == 0
    assert told == [2, 4, 6, 7]
    assert "3/3 rows" in CONTROL.sub("", capsys.readouterr().err)


def test_on_standard_output_and_for_people_a_bad_prompt_is_told_too(
    model: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_of(model, prompts, "--json")) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in row for row in rows] == [False, True, False, True, True, False]
    assert main(run_of(model, prompts)) == 1
    shown = capsys.readouterr()
    assert shown.out == "".join(
        f"> {title}\n{rows[place]['text']}\n\n" for title, place in ((TEXTS[0], 0), (TEXTS[2], 2), (TEXTS[1], 5))
    )
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["row 1", "row 3", "row 4"]


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_the_same_command_goes_on_where_it_was_cut(kept: int, model: str, prompts: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for output in (whole, cut):
        main(run_of(model, prompts, "--output", str(output), "--batch_size", "2"))
    content = cut.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(content[:kept]) + (content[kept][:20] if kept < 6 else b""))
    assert main(run_of(model, prompts, "--output", str(cut), "--batch_size", "3")) == 1

    def without_seconds(path: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in lines(path)]

    assert without_seconds(cut) == without_seconds(whole)
    assert cut.read_bytes().startswith(b"".join(content[:kept]))


def test_where_all_is_answered_no_model_is_loaded(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("the sky\n\nwhy?\n")
    run = run_of(model, tmp_path / "p.txt", "--output", str(tmp_path / "a.jsonl"))
    assert main(run) == 0
    before = (tmp_path / "a.jsonl").read_bytes()
    monkeypatch.setattr(batches, "load", lambda arguments: pytest.fail("the model was loaded"))
    assert main(run) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_what_had_no_memory_is_tried_again_with_more(model: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("the sky\nwhy?\n")
    run = run_of(model, tmp_path / "p.txt", "--output", str(tmp_path / "a.jsonl"))
    assert main([*run, "--memory_gb", "1e-9"]) == 1
    assert all("allow more with memory_gb" in row["error"] for row in lines(tmp_path / "a.jsonl"))
    assert main(run) == 0
    assert [(row["row"], "error" in row) for row in lines(tmp_path / "a.jsonl")] == [(0, False), (1, False)]


def test_other_settings_do_not_go_into_the_same_file(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(model, prompts, "--output", str(tmp_path / "answers.jsonl"))
    main(run)
    before = (tmp_path / "answers.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*run, "--seed", "3"]) == 2
    assert "holds answers of seed=0, and now it is 3: give the same, or name another file" in capsys.readouterr().err
    assert main([*run, "--raw"]) == 2
    assert "raw=False, and now it is True" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_conversations_are_not_raw(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": TURNS}))
    assert main(run_of(model, tmp_path / "p.jsonl", "--raw", "--json")) == 1
    assert "--raw takes prompts as plain text" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", ["a.txt", "answers", "a.json"])
def test_answers_are_json_lines(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", EASY, "--output", str(tmp_path / name)]) == 2
    assert f"{name}: a line is a JSON object; name a file that ends in .jsonl" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["generate", "infill"])
def test_a_puzzle_that_is_drawn_goes_into_a_file_if_it_is_the_same_each_time(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [command, "--steps", "1", "--output", str(tmp_path / "a.jsonl")]
    assert main(run) == 2
    assert "another puzzle is drawn each time" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        assert main([*run, "--seed", "1"]) == 0
    assert [row["row"] for row in lines(tmp_path / "a.jsonl")] == [0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_compiled_model_gives_the_same_answers(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    counters.clear()
    run = [PUZZLE, EASY, "--threshold", "0.9"]
    assert records(capsys, *run) == records(capsys, *run, "--compile")
    assert counters["stats"]["unique_graphs"] >= 1


def test_json_or_a_file_but_not_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", EASY, "--json", "--output", str(tmp_path / "a.jsonl")]) == 2
    assert "--output writes into a file what --json prints: keep one" in capsys.readouterr().err


# Traces ---------------------------------------------------------------------------------------------------------------


def test_a_trace_holds_all_rows_whatever_the_size_of_a_batch(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--model_name_or_path", model, *NOISY, "--suppress_eos", *TEXTS]
    rows = records(capsys, *run)
    for size in ("1", "2", "9"):
        assert records(capsys, *run, "--batch_size", size, "--trace", str(tmp_path / f"{size}.json")) == rows
        found = json.loads((tmp_path / f"{size}.json").read_text())
        assert found["titles"] == TEXTS
        trace, tokenizer = Trace.from_json(found), load_tokenizer(model)
        for place, row in enumerate(rows):
            *_, last = trace.frames(place)
            assert tokenizer.decode(last.tolist(), skip_special_tokens=True) == TEXTS[place] + row["text"]
            assert len(list(trace.frames(place))) == 1 + row["steps"]


@pytest.mark.parametrize("suffix", [".html", ".gif"])
def test_a_puzzle_is_traced_as_a_grid(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"run{suffix}"
    (row,) = records(capsys, EASY, "--trace", str(path))
    if suffix == ".gif":
        with Image.open(path) as picture:
            assert picture.n_frames == 1 + row["steps"]
    else:
        assert '"columns":9' in path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([EASY, "--trace", "run.htlm"], r"cannot be written to run\.htlm\. Did you mean '\.html'"),
        ([EASY, EASY, "--trace", "run.gif"], "A GIF shows one row, and there are 2"),
        ([EASY, "--trace", "nowhere/run.html"], "its folder has to exist"),
        ([EASY, "--trace", "a.html", "--trace", "b.gif"], "--trace is given twice: keep one"),
    ],
)
def test_a_trace_that_cannot_be_written_is_told_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_bad_one_of_several_prompts_is_told_by_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", EASY, "bad"]) == 2
    assert "dllm generate: Prompt 2 of 2: 'bad' has 3 characters" in capsys.readouterr().err


def test_a_trace_of_what_is_answered_already_is_not_written_and_that_is_said(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("the sky\n")
    run = run_of(model, tmp_path / "p.txt", "--output", str(tmp_path / "a.jsonl"), "--trace", str(tmp_path / "t.html"))
    assert main(run) == 0
    (tmp_path / "t.html").unlink()
    assert main(run) == 0
    assert "t.html: no row was run, so there is nothing to show" in capsys.readouterr().err
    assert not (tmp_path / "t.html").exists()
