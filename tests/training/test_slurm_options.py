"""The command line of scripts/train.slurm.sh."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dllm.errors import OptionError
from dllm.training.launch import find_config
from dllm.training.slurm_options import check_known, make_parser, parse, split_text

SCRIPT = """
import argparse, sys
parser = argparse.ArgumentParser()
for name in ("--max_length", "--output_dir", "--save-steps"):
    parser.add_argument(name)
parser.parse_args()
"""
# a README's form, with the slip of a blank after a backslash
TEXT = """
    --model_name_or_path "GSAI-ML/LLaDA-8B-Base" \\
    --dataset_args "x[train:10,test:5]" \\
    --max_length 1024 \\ \t
    --note 'a "quoted" $(word)' \\
    --num_train_epochs 4
    """
WORDS = (
    *("--model_name_or_path", "GSAI-ML/LLaDA-8B-Base", "--dataset_args", "x[train:10,test:5]"),
    *("--max_length", "1024", "--note", 'a "quoted" $(word)', "--num_train_epochs", "4"),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(SCRIPT)


def test_a_text_is_split_as_a_shell_would_and_nothing_in_it_is_run() -> None:
    assert tuple(split_text(TEXT)) == WORDS
    assert split_text("--a `date` $HOME *.py # no comment") == ["--a", "`date`", "$HOME", "*.py", "#", "no", "comment"]
    assert split_text("--a 1 \\ ") == ["--a", "1"]
    assert split_text("--a 1 \\\r\n --b\r\n") == ["--a", "1", "--b"]
    assert split_text(" ") == []


@pytest.mark.parametrize(
    "argv",
    [
        ["--accelerate_config", "ddp", "--script_path", "f.py", "--script_args", TEXT],
        [f"--script_args={TEXT}", "--script_path=f.py", "--accelerate_config=ddp"],
        ["--script_args", TEXT, "--accelerate_config=ddp", "--script_path", "f.py"],
        ["--accelerate_config", "ddp", "--script_path", "f.py", *WORDS],
        [*WORDS[:4], "--script_path", "f.py", *WORDS[4:], "--accelerate_config=ddp"],
        ["--accelerate_config", "ddp", "--script_path", "f.py", "--", *WORDS],
        ["--accelerate_config", "ddp", *WORDS[:2], "--script_path", "f.py", "--", *WORDS[2:]],
    ],
)
def test_every_way_to_give_the_options_of_a_script(argv: list[str]) -> None:
    order = parse(argv)
    assert order.words == WORDS
    assert (order.config, order.script) == (find_config("ddp"), Path("f.py"))
    assert (order.requeue, order.dry_run, order.processes_per_node) == (True, False, None)


def test_options_of_its_own() -> None:
    own = "--num_processes_per_node 2 --main_process_ip h --main_process_port=7 --no_requeue --dry_run --project_dir ."
    order = parse(["--script_path", "f.py", *own.split(), "--accelerate_config", "ddp"])
    assert (order.processes_per_node, order.address, order.port) == (2, "h", 7)
    assert (order.requeue, order.dry_run, order.words) == (False, True, ())


GIVEN = ["--accelerate_config", "ddp", "--script_path", "f.py"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Give --accelerate_config. See  bash scripts/train.slurm.sh --help"),
        (["--acelerate_config", "ddp", "--script_path", "f.py"], "Give --accelerate_config. --acelerate_config is no"),
        (["--accelerate_config", "ddp"], "Give --script_path."),
        (["--accelerate_config", "dpp", "--script_path", "f.py"], "configuration 'dpp'. Did you mean 'ddp'?"),
        (["--accelerate_config", "ddp", "--script_path", "g.py"], "--script_path g.py: there is no such file in "),
        ([*GIVEN, "--script_args", "--a 1", "--b", "2"], "'--b' stands beside --script_args"),
        (
            [*GIVEN, "--script_args", "--a 1", "--dryrun"],
            "'--dryrun' stands beside --script_args: with it the options of",
        ),
        ([*GIVEN, "--script_args", "--a 1", "--dryrun"], "Did you mean '--dry_run'?"),
        ([*GIVEN, "--script_args", "--a 1", "--", "--b"], "'--' stands beside --script_args"),
        ([*GIVEN, "--script_args", "--a 'x"], "--script_args: no closing quotation."),
        ([*GIVEN, "--script_args"], "argument --script_args: expected one argument. See  bash"),
        ([*GIVEN, "--max_length", "9", " "], "a line of the command ends in a backslash and a blank"),
        ([*GIVEN, "--dry-run"], "There is no option '--dry-run'. Did you mean '--dry_run'?"),
        ([*GIVEN, "--num_processes", "4"], "--num_processes: the allocation says it; --num_processes_per_node changes"),
        ([*GIVEN, "--partition=big"], "--partition: it is sbatch's: write it before the script's name"),
        ([*GIVEN, "word"], "Nothing is known of 'word': it follows no option."),
        ([*GIVEN, "--num_processes_per_node", "0"], "--num_processes_per_node 0: it is 1 or more."),
        ([*GIVEN, "--num_processes_per_node", "two"], "invalid int value: 'two'"),
    ],
)
def test_what_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse(argv)


def test_the_script_is_asked_for_its_options() -> None:
    check_known(parse([*GIVEN, "--max_length", "9", "--save-steps=-1"]))
    with pytest.raises(OptionError, match=r"f\.py has no option '--max_lenght'\. Did you mean '--max_length'\?"):
        check_known(parse([*GIVEN, "--max_lenght", "9"]))
    with pytest.raises(OptionError, match=r"'--num_process_per_node'\. Did you mean '--num_processes_per_node'\?"):
        check_known(parse([*GIVEN, "--num_process_per_node", "9"]))
    check_known(parse([*GIVEN, "--max_length", "9", "--", "--max_lenght"]))


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "print('no options')"])
def test_a_script_that_does_not_answer_is_believed(text: str) -> None:
    Path("f.py").write_text(text)
    check_known(parse([*GIVEN, "--anything"]))


def test_help_says_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert "What stands after -- is FILE's as well" in shown
    for action in make_parser()._actions:
        assert action.help
        assert action.option_strings[-1] in shown
