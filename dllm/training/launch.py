"""`accelerate launch` with statuses, errors and signals that a scheduler can rely on.

torch's launcher takes signals for itself: it kills its processes 30 seconds after a SIGTERM, dies of a SIGUSR1, and ends with 1
whatever they ended with. Here it runs in a thread, where it cannot take them; the main thread passes them on and waits, as
long as a checkpoint takes.

    python -m dllm.training.launch --config_file deepspeed_zero2 --num_processes 8 examples/llada/sft.py ...

takes the options of `accelerate launch`, and shipped configurations by name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from dllm.errors import DllmError, OptionError, did_you_mean

CONFIGS = Path(__file__).parent / "accelerate_configs"
"""The shipped configurations; in a checkout a link to scripts/accelerate_configs."""
LAUNCHED = "DLLM_LAUNCHED"
"""Environment variable that this launcher sets for its processes."""
REQUEUE = 85
"""Exit status of a run that saved and stopped for SIGUSR1: start the same job again (ERESTART of Linux)."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

OPTIONS = {
    "--accelerate_config": "Run through accelerate: a shipped configuration by name, or a yaml file of your own.",
    "--num_processes": "Processes on this machine. By default one on each GPU; without GPUs what the configuration says.",
}
"""What `dllm sft` and `dllm pretrain` take beside the options of training, and its help."""


def options_help() -> str:
    """What `--help` says about running in several processes."""
    told = " ".join(f"{name}: {text}" for name, text in OPTIONS.items())
    return (
        f"dllm sft and dllm pretrain also start several processes on this machine. {told} Shipped: {', '.join(config_names())}. "
        f"With neither option: one process on one GPU or a processor, and data parallel (ddp) where there are several GPUs."
    )


def no_such_option(word: str, command: str, names: Iterable[str]) -> str:
    """What to say of an option that training does not know.

    Args:
        word: the option as it was given.
        command: "dllm pretrain" or "dllm sft".
        names: the options of training.
    """
    option = word.split("=")[0]
    if option in OPTIONS:
        return f"{option} is for {command}: with a script write  accelerate launch --config_file FILE --num_processes N SCRIPT"
    return f"There is no option {word!r}.{did_you_mean(option, {*names, *OPTIONS})}"


def config_names() -> list[str]:
    """The names of the shipped configurations."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_config(name: str) -> Path:
    """The yaml file of a configuration.

    Args:
        name: a file, or a shipped one's name; `zero2` is short for `deepspeed_zero2`.

    Raises:
        OptionError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    for stem in (name, f"deepspeed_{name}"):
        if (CONFIGS / f"{stem}.yaml").is_file() and Path(stem).name == stem:
            return CONFIGS / f"{stem}.yaml"
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        raise OptionError(f"There is no file {name}: name one, or one of those shipped: {', '.join(config_names())}.")
    raise OptionError(f"There is no accelerate configuration {name!r}.{did_you_mean(name, config_names())}")


def read_setting(config: Path, key: str) -> str | None:
    """A setting of a configuration's first level, as it is written."""
    found = re.search(rf"(?m)^{key}:[ \t]*['\"]?([^'\"\s#]+)", config.read_text(encoding="utf-8"))
    return found[1] if found else None


def exit_status(number: int) -> int:
    """The exit status of a process that a signal stopped, or killed."""
    return REQUEUE if number == signal.SIGUSR1 else 128 + number


def tell_launcher(error: DllmError) -> bool:
    """Leaves an error to the launcher, which shows once what all its processes found; whether there is such a launcher."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if LAUNCHED not in os.environ or not path:
        return False
    told = {"message": {"message": str(error), "extraInfo": {"timestamp": str(int(time.time())), "dllm": True}}}
    Path(path).write_text(json.dumps(told), encoding="utf-8")
    return True


def launch(words: Sequence[str], name: str) -> int:
    """Runs `accelerate launch` in this process and passes signals on to the processes that it starts.

    This process is meant to end with the status that it returns: from here on signals do nothing else.

    Args:
        words: the command line after `accelerate launch`.
        name: whom the errors name.

    Returns:
        The exit status: that of the process that failed first, 0 where none did.
    """
    import psutil

    outcome = _Outcome()

    def pass_on(number: int, frame: FrameType | None) -> None:
        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        if not children and outcome.status is None:  # nothing has begun
            raise SystemExit(exit_status(number))

    os.environ[LAUNCHED] = "1"
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    # a daemon, so that a signal before there are processes can end this one
    thread = threading.Thread(target=outcome.run, args=(words, name), name="accelerate launch", daemon=True)
    thread.start()
    thread.join()
    del os.environ[LAUNCHED]
    if outcome.error is not None:
        raise outcome.error
    return outcome.status or 0


class _Outcome:
    """What came of a launch in a thread."""

    status: int | None = None
    error: BaseException | None = None

    def run(self, words: Sequence[str], name: str) -> None:
        try:
            self.status = _accelerate(words, name)
        except BaseException as error:  # noqa: BLE001 - raised again where the thread is waited for
            self.error = error


def _accelerate(words: Sequence[str], name: str) -> int:
    import torch.distributed.run  # noqa: F401 - its loggers are there from here on
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for logger in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # what they say of failures is said below
    try:
        launch_command(launch_command_parser().parse_args(list(words)))
    except ChildFailedError as error:
        return _report(error, name)
    except subprocess.CalledProcessError as error:  # one process, which has said what there was to say
        return exit_status(-error.returncode) if error.returncode < 0 else error.returncode
    except (ValueError, ConnectionError, ImportError) as error:
        raise OptionError(f"accelerate: {error}") from error
    return 0


def _report(error: Any, name: str) -> int:
    """The status of the processes that failed; what went wrong is printed once."""
    told = [failure for failure in error.failures.values() if _is_told(failure)]
    if told:
        print(f"{name}: {told[0].error_file_data['message']['message']}", file=sys.stderr)
        return int(told[0].exitcode)
    # the launcher ends the others with SIGTERM, and times of failures are whole seconds
    rank, failure = error.get_first_failure()
    for other_rank, other in error.failures.items():
        if failure.exitcode == -signal.SIGTERM != other.exitcode:
            rank, failure = other_rank, other
    status = int(failure.exitcode)
    if status < 0:
        print(f"{name}: process {rank} was ended by {failure.signal_name()}.", file=sys.stderr)
        return exit_status(-status)
    if status not in (
        REQUEUE,
        *map(exit_status, (signal.SIGINT, signal.SIGTERM)),
    ):  # those have stopped as they were told
        print(f"{name}: process {rank} ended with status {status}; what it said stands above.", file=sys.stderr)
    return status


def _is_told(failure: Any) -> bool:
    message = failure.error_file_data.get("message")
    return isinstance(message, dict) and "dllm" in message.get("extraInfo", {})


class Launching(NamedTuple):
    """How many processes to run a command in, and through what."""

    config: Path
    processes: int


def choose(config: str | None, processes: int | None, gpus: int) -> Launching | None:
    """What the options of a command mean on a machine with so many GPUs; None: in this process.

    Raises:
        OptionError: the configuration does not exist, or runs another number of processes.
    """
    if processes is not None and processes < 1:
        raise OptionError(f"--num_processes {processes}: it is 1 or more.")
    if processes is not None and 0 < gpus < processes:
        raise OptionError(f"--num_processes {processes}: this machine has {gpus} GPU{'s' * (gpus > 1)}.")
    if config is None:
        wanted = processes or gpus
        return Launching(find_config("ddp" if gpus else "cpu"), wanted) if wanted > 1 else None
    path = find_config(config)
    if read_setting(path, "distributed_type") == "NO":
        if (processes or 1) > 1:
            raise OptionError(f"--accelerate_config {config} runs one process: leave --num_processes {processes} out.")
        return Launching(path, 1)
    return Launching(path, processes or gpus or int(read_setting(path, "num_processes") or 1))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}. See  {self.prog} --help")


def run_command(command: str, argv: Sequence[str], here: Callable[[Sequence[str]], Any]) -> None:
    """Runs `dllm COMMAND` in this process, or in several on this machine.

    Args:
        command: "pretrain" or "sft".
        argv: its command line.
        here: runs it in this process.

    Raises:
        OptionError: see `choose`.
        SystemExit: the processes did not end with 0.
    """
    parser = _Parser(prog=f"dllm {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes", type=int)
    options, rest = parser.parse_known_args(list(argv))
    one = options.accelerate_config is None and options.num_processes == 1
    if one:  # transformers would spread one process over all GPUs that it sees
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    if one or LAUNCHED in os.environ or "RANK" in os.environ or {"-h", "--help"} & set(rest):
        here(rest)
        return
    import torch

    chosen = choose(options.accelerate_config, options.num_processes, torch.cuda.device_count())
    if chosen is None:
        here(rest)
        return
    config, processes = chosen
    print(
        f"dllm {command}: {processes} process{'es' * (processes > 1)} through accelerate's {config.stem} (--accelerate_config, "
        f"--num_processes)",
        flush=True,
    )
    words = ["--config_file", str(config), "--num_processes", str(processes), "--main_process_port", "0"]
    status = launch([*words, "--module", "dllm.cli.main", command, *rest], f"dllm {command}")
    if status:
        raise SystemExit(status)


def main(argv: Sequence[str]) -> int:
    """`accelerate launch`, with configurations by name; returns the exit status."""
    words = list(argv)
    try:
        if "--config_file" in words[:-1]:
            place = words.index("--config_file") + 1
            words[place] = str(find_config(words[place]))
        return launch(words, "launch")
    except DllmError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
