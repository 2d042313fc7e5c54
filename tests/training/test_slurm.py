"""What a Slurm allocation is read from, and the command that is made of it; a real cluster runs in tests/system/test_slurm.py."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dllm.errors import OptionError
from dllm.training import slurm
from dllm.training.slurm import (
    PORTS,
    Allocation,
    count_gpus,
    free_port,
    gpus_of,
    main,
    read_allocation,
    srun_environment,
    srun_words,
)
from dllm.training.slurm_options import Order, parse

GIVEN = ["--accelerate_config", "ddp", "--script_path", "f.py"]
WHOLE: dict[str, Any] = dict(job="7", nodes=2, names="n[1-2]", head="10.0.0.1", gpus=8, cpus=64, restarts=0)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").touch()


def order(*options: str) -> Order:
    return parse([*GIVEN, *options])


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, 0),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_JOB_GPUS": "0,1,2,3"}, 4),
        ({"SLURM_JOB_GPUS": "0-3,6"}, 5),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "6"}, 6),
        ({"SLURM_GPUS_PER_NODE": "a100:4,v100:2"}, 6),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2,MIG-3"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2),
    ],
)
def test_gpus_of_a_node(environment: dict[str, str], gpus: int) -> None:
    assert gpus_of(environment) == gpus


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:8(IDX:0-7)", 8),
        ("gres:gpu:a100:4", 4),
        ("gres/gpu=16", 16),
        ("gpu:a100:2(IDX:0,1),gpu:v100:1(IDX:2)", 3),
        ("", 0),
    ],
)
def test_gpus_in_generic_resources(gres: str, gpus: int) -> None:
    assert count_gpus(gres) == gpus


def answers(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """scontrol's words as Slurm 22.05 prints them."""
    detail = "JobId=7 JobName=x\n" + "".join(f"     Nodes={line}\n" for line in lines) + "   TresPerNode=gres:gpu:8\n"
    shown = {"hostnames": "n1\nn2\n", "node": "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1", "job": detail}
    monkeypatch.setattr(slurm, "_scontrol", lambda *words: shown[words[1]])


def test_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, ["n[1-2] CPU_IDs=0-15 Mem=0 GRES=gpu:8(IDX:0-7)"])
    environment = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_ON_NODE": "64",
    }
    assert read_allocation(environment) == Allocation(**WHOLE)
    assert read_allocation({**environment, "SLURM_GPUS_ON_NODE": "4", "SLURM_RESTART_COUNT": "2"}) == Allocation(
        **{**WHOLE, "gpus": 4, "restarts": 2}
    )
    monkeypatch.setattr(slurm, "_scontrol", lambda *words: "")
    assert read_allocation({**environment, "SLURMD_NODENAME": "n1"}) == Allocation(**{**WHOLE, "head": "n1", "gpus": 0})


def test_nodes_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, ["n1 CPU_IDs=0 Mem=0 GRES=gpu:8(IDX:0-7)", "n2 CPU_IDs=0 Mem=0 GRES=gpu:4(IDX:0-3)"])
    with pytest.raises(OptionError, match="different numbers of GPUs, 4 and 8: ask for the same on each"):
        read_allocation({"SLURM_JOB_ID": "7"})


def test_by_hand_there_is_no_allocation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(GIVEN) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("train.slurm.sh: There is no Slurm allocation here: run  sbatch")
    assert shown.out == ""
    assert main([*GIVEN, "--dry_run", "--num_processes_per_node", "4"]) == 0
    shown = capsys.readouterr()
    assert "processes      4 a node (asked for), 4 in all" in shown.out
    assert re.search(r"^command +srun --nodes=1 .* --num_processes 4 .* f\.py$", shown.out, re.MULTILINE)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_one_launcher_a_node_that_finds_its_rank_there() -> None:
    words = srun_words(order("--max_length", "9", "--note", "two words"), Allocation(**WHOLE))
    start = words.index("bash")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(words[:start])
    assert option(words, "--num_machines") == "2"
    assert option(words, "--num_processes") == "16"
    assert option(words, "--main_process_ip") == "10.0.0.1"
    assert int(option(words, "--main_process_port")) in PORTS
    assert option(words, "--rdzv_backend") == "static"
    assert words[-5:] == ["f.py", "--max_length", "9", "--note", "two words"]
    # what a node's shell makes of it: `echo` in place of the interpreter
    place = words.index(sys.executable)
    shell = [*words[start:place], "echo", *words[place + 1 :]]
    shown = subprocess.run(
        shell, env={"SLURM_NODEID": "1", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("-m dllm.training.launch --machine_rank 1 --config_file ")
    assert shown.stdout.endswith("f.py --max_length 9 --note two words\n")


def test_a_restart_goes_on() -> None:
    again = Allocation(**{**WHOLE, "restarts": 1})
    assert srun_words(order("--a", "1"), again)[-4:] == ["--a", "1", "--resume_from_checkpoint", "auto"]
    for given in (["--resume_from_checkpoint", "x"], ["--resume_from_checkpoint=x"]):
        assert srun_words(order(*given), again)[-len(given) :] == given
        assert "auto" not in srun_words(order(*given), again)


def test_what_is_said_wins() -> None:
    said = order("--num_processes_per_node", "2", "--main_process_ip", "ib0", "--main_process_port", "7")
    words = srun_words(said, Allocation(**WHOLE))
    assert [option(words, f"--{name}") for name in ("num_processes", "main_process_ip", "main_process_port")] == [
        "4",
        "ib0",
        "7",
    ]


def test_configurations_that_need_more_and_less(tmp_path: Path) -> None:
    for kind in ("DEEPSPEED", "NO"):
        (tmp_path / f"{kind}.yaml").write_text(f"distributed_type: {kind}\n")
    deep = parse(["--accelerate_config", "DEEPSPEED.yaml", "--script_path", "f.py"])
    assert option(srun_words(deep, Allocation(**WHOLE)), "--deepspeed_multinode_launcher") == "standard"
    one = parse(["--accelerate_config", "NO.yaml", "--script_path", "f.py"])
    with pytest.raises(OptionError, match="--accelerate_config NO runs one process, and this would be 16"):
        srun_words(one, Allocation(**WHOLE))
    assert option(srun_words(one, Allocation(**{**WHOLE, "nodes": 1, "gpus": 1})), "--num_processes") == "1"


def test_threads_and_the_wishes_of_sbatch() -> None:
    environment = {"SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_PER_TASK": "1", "PATH": "/bin"}
    assert srun_environment(order(), Allocation(**WHOLE), environment) == {"PATH": "/bin", "OMP_NUM_THREADS": "8"}
    assert srun_environment(order(), Allocation(**{**WHOLE, "cpus": 1}), {})["OMP_NUM_THREADS"] == "1"
    assert srun_environment(order(), Allocation(**WHOLE), {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_a_port_that_is_taken_is_passed_over() -> None:
    first = free_port("1234")
    assert first == free_port("1234")
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert free_port("1234") != first
    assert free_port("1234_5") in PORTS
