"""The command line of scripts/train.slurm.sh: what is the script's own, and what belongs to the program that it starts."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dllm.errors import OptionError, did_you_mean
from dllm.training.launch import config_names, find_config

_OF_SBATCH = ("nodes", "gres", "gpus", "gpus-per-node", "partition", "account", "qos", "time", "exclusive", "mem")
ELSEWHERE = {
    "--num_processes": "the allocation says it; --num_processes_per_node changes it",
    "--num_machines": "the allocation says it: sbatch --nodes=N",
    "--machine_rank": "each node finds its own",
    "--config_file": "write --accelerate_config",
    **dict.fromkeys((f"--{name}" for name in _OF_SBATCH), "it is sbatch's: write it before the script's name"),
}
"""Options of others that are looked for here, and where they belong."""

DESCRIPTION = """\
Trains on the nodes of a Slurm allocation:

  sbatch --nodes=2 --gres=gpu:8 scripts/train.slurm.sh \\
      --accelerate_config NAME --script_path FILE [options of FILE, or --script_args 'options of FILE']

The options below may stand in any order, as --option value or --option=value. With --script_args there may be no
others. Without it all others are FILE's, and FILE is asked (FILE --help) whether it knows them before anything starts.
What stands after -- is FILE's as well, and is not looked at.
"""
EPILOG = """\
Two minutes before the time limit (sbatch --signal=B:USR1@SECONDS) the batch script gets SIGUSR1: all processes save a
checkpoint and stop, and the job is requeued. A preempted one is requeued too, one that scancel ends is not. A requeued
job gets --resume_from_checkpoint auto where it is not given.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}. See  bash scripts/train.slurm.sh --help")


def make_parser() -> argparse.ArgumentParser:
    """The options of scripts/train.slurm.sh."""
    parser = _Parser(
        prog="train.slurm.sh",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--accelerate_config", metavar="NAME", help=f"{', '.join(config_names())}, or a yaml file")
    parser.add_argument("--script_path", metavar="FILE", help="what to run, such as examples/llada/sft.py")
    parser.add_argument(
        "--script_args", metavar="TEXT", help="its options in one text; quotes as in a shell, no expansion"
    )
    parser.add_argument("--num_processes_per_node", type=int, metavar="N", help="by default one on each GPU of a node")
    parser.add_argument(
        "--main_process_ip", metavar="ADDRESS", help="of the first node; by default what Slurm calls it by"
    )
    parser.add_argument(
        "--main_process_port", type=int, metavar="N", help="by default a free one, from the job's number"
    )
    parser.add_argument(
        "--project_dir", metavar="DIR", help="where paths begin and .venv is; by default where sbatch ran"
    )
    parser.add_argument("--no_requeue", action="store_true", help="a stopped job is not queued again")
    parser.add_argument("--dry_run", action="store_true", help="print what would run, and stop")
    return parser


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the command line asks for."""

    config: Path
    script: Path
    words: tuple[str, ...]
    """The options of the script."""
    asked_for: frozenset[str]
    """Those of them that the script must know."""
    processes_per_node: int | None
    address: str | None
    port: int | None
    requeue: bool
    dry_run: bool


def parse(argv: Sequence[str]) -> Order:
    """Reads the command line.

    Raises:
        OptionError: an option is missing, misspelt or another program's, or a file does not exist.
        SystemExit: --help.
    """
    parser = make_parser()
    own, mark, after = list(argv), False, []
    if "--" in own:
        place = own.index("--")
        own, mark, after = own[:place], True, own[place + 1 :]
    # in --option=value the value may begin with a dash, and so may the value of --script_args
    own = [word for pair in _joined(own) for word in pair]
    options, others = parser.parse_known_args(own)
    for name in ("accelerate_config", "script_path"):
        if getattr(options, name) is None:
            misspelt = f" {others[0]} is no option of this script." if others else ""
            raise OptionError(f"Give --{name}.{misspelt} See  bash scripts/train.slurm.sh --help")
    known = [name for action in parser._actions for name in action.option_strings]
    if options.script_args is not None:
        if others or mark:
            wrong = (others or ["--"])[0]
            raise OptionError(
                f"{wrong!r} stands beside --script_args: with it the options of the script stand in its text alone."
                f"{did_you_mean(wrong.split('=')[0], known) if wrong.startswith('--') and wrong != '--' else ''}"
            )
        others = split_text(options.script_args)
    for word in (*others, *after):
        if word and not word.strip():
            raise OptionError(
                "A word is a blank: a line of the command ends in a backslash and a blank. Remove that blank; the shell took the "
                "lines after it for other commands."
            )
    if others and not others[0].startswith("-"):
        raise OptionError(f"Nothing is known of {others[0]!r}: it follows no option.")
    for word in others:
        option = word.split("=")[0]
        if option in ELSEWHERE and options.script_args is None:
            raise OptionError(f"{option}: {ELSEWHERE[option]}.")
        if option.startswith("--") and option.replace("-", "_") in {name.replace("-", "_") for name in known}:
            raise OptionError(f"There is no option {option!r}.{did_you_mean(option, known)}")
    script = Path(options.script_path)
    if not script.is_file():
        raise OptionError(f"--script_path {script}: there is no such file in {Path.cwd()}.")
    if options.num_processes_per_node is not None and options.num_processes_per_node < 1:
        raise OptionError(f"--num_processes_per_node {options.num_processes_per_node}: it is 1 or more.")
    return Order(
        config=find_config(options.accelerate_config),
        script=script,
        words=(*others, *after),
        asked_for=frozenset(word.split("=")[0] for word in others if re.match(r"--[A-Za-z]", word)),
        processes_per_node=options.num_processes_per_node,
        address=options.main_process_ip,
        port=options.main_process_port,
        requeue=not options.no_requeue,
        dry_run=options.dry_run,
    )


def _joined(words: list[str]) -> list[list[str]]:
    """--script_args TEXT as one word, for its text begins with a dash, which argparse would take for an option."""
    pairs, rest = [], iter(words)
    for word in rest:
        following = next(rest, None) if word == "--script_args" else None
        pairs.append([word] if following is None else [f"{word}={following}"])
    return pairs


def split_text(text: str) -> list[str]:
    """The words of a text with quotes and continued lines; nothing in it is expanded or run.

    A backslash may have blanks between it and the end of its line: that is a slip which joins words in a shell, and never meant.

    Raises:
        OptionError: a quote is not closed.
    """
    try:
        return shlex.split(re.sub(r"\\[ \t\r]*(\n|$)", "\n", text.rstrip() + "\n"))
    except ValueError as error:
        raise OptionError(f"--script_args: {str(error)[0].lower()}{str(error)[1:]}.") from error


def check_known(order: Order) -> None:
    """Asks the script (`--help`) whether it knows its options; one that does not answer is believed.

    Raises:
        OptionError: it does not know one.
    """
    if not order.asked_for:
        return
    done = subprocess.run(
        [sys.executable, str(order.script), "--help"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    known = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", done.stdout))
    if done.returncode or not known:
        return
    own = {name for action in make_parser()._actions for name in action.option_strings}
    for option in sorted(order.asked_for - known):
        raise OptionError(f"{order.script} has no option {option!r}.{did_you_mean(option, known | own)}")
