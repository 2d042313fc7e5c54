"""Names of configurations, what the options of a command mean, and whom an error is left to."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from dllm.errors import OptionError
from dllm.training.launch import (
    CONFIGS,
    Launching,
    choose,
    config_names,
    exit_status,
    find_config,
    main,
    no_such_option,
    options_help,
    read_setting,
    tell_launcher,
)

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_configurations_are_those_of_scripts() -> None:
    assert CONFIGS.resolve() == ROOT / "scripts" / "accelerate_configs"
    assert {"cpu", "ddp"} <= set(config_names())
    assert config_names() == sorted(path.stem for path in CONFIGS.resolve().glob("*.yaml"))


def test_a_configuration_is_a_name_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_config("ddp") == CONFIGS / "ddp.yaml"
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: 'NO'  # one\nnum_processes: 3\n")
    assert find_config(str(own)) == own
    assert (read_setting(own, "distributed_type"), read_setting(own, "num_processes")) == ("NO", "3")
    assert read_setting(own, "main_process_ip") is None
    monkeypatch.setattr("dllm.training.launch.CONFIGS", tmp_path)
    (tmp_path / "deepspeed_zero2.yaml").touch()
    assert find_config("zero2") == find_config("deepspeed_zero2") == tmp_path / "deepspeed_zero2.yaml"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpp", "no accelerate configuration 'dpp'. Did you mean 'ddp'?"),
        ("x/none.yaml", "There is no file x/none.yaml: name one, or one of those shipped: cpu, ddp"),
        ("../accelerate_configs/ddp", "There is no file ../accelerate_configs/ddp"),
    ],
)
def test_a_configuration_that_does_not_exist(name: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        find_config(name)


def test_the_launcher_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config_file", "dpp", "script.py"]) == 2
    assert capsys.readouterr().err.startswith("launch: There is no accelerate configuration 'dpp'.")


@pytest.mark.parametrize(
    ("config", "processes", "gpus", "chosen"),
    [
        (None, None, 0, None),
        (None, None, 1, None),
        (None, None, 4, ("ddp", 4)),
        (None, 1, 0, None),
        (None, 2, 0, ("cpu", 2)),
        (None, 2, 4, ("ddp", 2)),
        ("ddp", None, 4, ("ddp", 4)),
        ("ddp", None, 0, ("ddp", 8)),
        ("cpu", None, 0, ("cpu", 2)),
        ("cpu", 3, 0, ("cpu", 3)),
        ("ddp", 1, 4, ("ddp", 1)),
    ],
)
def test_where_a_command_runs(
    config: str | None, processes: int | None, gpus: int, chosen: tuple[str, int] | None
) -> None:
    expected = None if chosen is None else Launching(CONFIGS / f"{chosen[0]}.yaml", chosen[1])
    assert choose(config, processes, gpus) == expected


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--num_processes 0: it is 1 or more"):
        choose(None, 0, 0)
    with pytest.raises(OptionError, match="--num_processes 3: this machine has 2 GPUs"):
        choose(None, 3, 2)
    one = tmp_path / "one.yaml"
    one.write_text("distributed_type: 'NO'\n")
    assert choose(str(one), None, 4) == Launching(one, 1)
    with pytest.raises(OptionError, match=r"one\.yaml runs one process: leave --num_processes 2 out"):
        choose(str(one), 2, 4)


def test_statuses_of_stopped_processes() -> None:
    assert [exit_status(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)] == [130, 143, 137]
    assert exit_status(signal.SIGUSR1) == 85


def test_options_of_the_command_are_known_to_its_help_and_its_errors() -> None:
    assert "--accelerate_config" in options_help()
    assert no_such_option("--num_proces", "dllm sft", ["--max_steps"]).endswith("Did you mean '--num_processes'?")
    assert "with a script write  accelerate launch --config_file" in no_such_option("--num_processes=2", "dllm sft", [])


def test_an_error_is_left_to_our_launcher_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.delenv("DLLM_LAUNCHED", raising=False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert not tell_launcher(OptionError("wrong"))
    assert not file.exists()
    monkeypatch.setenv("DLLM_LAUNCHED", "1")
    assert tell_launcher(OptionError("wrong"))
    assert json.loads(file.read_text())["message"]["message"] == "wrong"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert not tell_launcher(OptionError("wrong"))
