"""Training on the nodes of a Slurm allocation: what scripts/train.slurm.sh does once Python is there.

It reads the allocation, starts one launcher a node by srun, passes the scheduler's warning (SIGUSR1) on to all processes, and
requeues a job that was stopped with its work unfinished.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from dllm.errors import DllmError, OptionError
from dllm.training.launch import REQUEUE, exit_status, read_setting
from dllm.training.slurm_options import Order, check_known, parse

USER_ERROR = 2
"""Exit status of what the user has to put right: starting it again would not help."""
PORTS = range(20_000, 30_000)
"""Below the ports that Linux gives to clients."""
RESUME = "--resume_from_checkpoint"
# a shell expands what it must on each node; the words themselves it takes as they are
ON_NODE = 'exec "$0" -m dllm.training.launch --machine_rank "$SLURM_NODEID" "$@"'


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What Slurm gave."""

    job: str
    nodes: int
    names: str
    head: str
    """The address of the first node."""
    gpus: int
    """Of each node; 0 where there are none."""
    cpus: int
    """Of this node."""
    restarts: int


def _scontrol(*words: str) -> str:
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """The allocation that this process runs in.

    Raises:
        OptionError: there is none, or its nodes have different numbers of GPUs.
    """
    if "SLURM_JOB_ID" not in environment:
        raise OptionError(
            "There is no Slurm allocation here: run  sbatch --nodes=N --gres=gpu:8 scripts/train.slurm.sh ...  or, on one "
            "machine,  dllm sft  or  accelerate launch. With --dry_run this script shows what it would run."
        )
    job, names = environment["SLURM_JOB_ID"], environment.get("SLURM_JOB_NODELIST", "")
    first = (_scontrol("show", "hostnames", names).split() or [environment.get("SLURMD_NODENAME", names)])[0]
    address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first, "--oneliner"))
    detail = _scontrol("show", "job", job, "--details")
    by_node = {count_gpus(found) for found in re.findall(r"(?m)^ +Nodes=.*?GRES=(\S*)", detail)}
    if len(by_node) > 1:
        raise OptionError(
            f"The nodes of job {job} have different numbers of GPUs, {' and '.join(map(str, sorted(by_node)))}: ask for the same "
            f"on each, with sbatch --gres=gpu:N."
        )
    return Allocation(
        job=job,
        nodes=int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1),
        names=names,
        head=address[1] if address else first,
        gpus=gpus_of(environment) or next(iter(by_node), 0),
        cpus=int(environment.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1),
        restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
    )


def count_gpus(gres: str) -> int:
    """The GPUs in what Slurm calls generic resources, such as gpu:8(IDX:0-7), gres:gpu:a100:4 or gpu:a100:2,gpu:v100:2."""
    return sum(
        int(number) for number in re.findall(r"gpu(?:[:=][A-Za-z][\w.-]*)?[:=](\d+)", re.sub(r"\(.*?\)", "", gres))
    )


def gpus_of(environment: Mapping[str, str]) -> int:
    """The GPUs of a node, as the environment of a batch script says it; 0 where it does not."""
    if environment.get("SLURM_GPUS_ON_NODE", "").isdigit():
        return int(environment["SLURM_GPUS_ON_NODE"])
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        if environment.get(name):
            ends = [part.split("-") for part in environment[name].split(",")]
            return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    asked = environment.get("SLURM_GPUS_PER_NODE", "")
    if asked:
        return sum(int(part.rpartition(":")[2]) for part in asked.split(","))
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return len([part for part in visible.split(",") if part.strip() not in ("", "-1", "NoDevFiles")])


def free_port(job: str) -> int:
    """A port that nobody listens at on this node, which a job's number gives, so that jobs that share a node keep apart."""
    digits = re.sub(r"\D", "", job)
    for attempt in range(100):
        port = PORTS[(int(digits or 0) + 127 * attempt) % len(PORTS)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OptionError("A hundred ports of this node are taken: name a free one with --main_process_port.")


def srun_words(order: Order, allocation: Allocation) -> list[str]:
    """The command that starts one launcher on each node.

    Raises:
        OptionError: the configuration is for one process, and there are more.
    """
    each = order.processes_per_node or allocation.gpus or 1
    total = each * allocation.nodes
    kind = read_setting(order.config, "distributed_type")
    if kind == "NO" and total > 1:
        raise OptionError(
            f"--accelerate_config {order.config.stem} runs one process, and this would be {total}: name another one, such as ddp."
        )
    words = list(order.words)
    if allocation.restarts and not any(word.split("=")[0] == RESUME for word in words):
        words += [RESUME, "auto"]
    launcher = [
        "--config_file",
        str(order.config),
        "--num_machines",
        str(allocation.nodes),
        "--num_processes",
        str(total),
    ]
    launcher += ["--main_process_ip", order.address or allocation.head]
    launcher += ["--main_process_port", str(order.port or free_port(allocation.job))]
    launcher += ["--rdzv_backend", "static", "--same_network"]
    if kind == "DEEPSPEED" and allocation.nodes > 1:
        launcher += ["--deepspeed_multinode_launcher", "standard"]
    srun = ["srun", f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}", "--ntasks-per-node=1"]
    # one task has all of a node: not one processor, which is what one task is bound to otherwise
    srun += ["--cpu-bind=none", "--kill-on-bad-exit=1", "--export=ALL"]
    return [*srun, "bash", "-c", ON_NODE, sys.executable, *launcher, str(order.script), *words]


def srun_environment(order: Order, allocation: Allocation, environment: Mapping[str, str]) -> dict[str, str]:
    """What srun sees: no wishes that sbatch was given for tasks of another number, and the threads of a process."""
    each = order.processes_per_node or allocation.gpus or 1
    spoiling = ("CPUS_PER_TASK", "GPUS_PER_TASK", "TRES_PER_TASK", "NTASKS_PER_GPU", "GPU_BIND", "EXPORT_ENV")
    kept = {name: value for name, value in environment.items() if name not in {f"SLURM_{word}" for word in spoiling}}
    kept.setdefault("OMP_NUM_THREADS", str(max(1, allocation.cpus // each)))
    return kept


class Supervisor:
    """Runs srun to its end, and says whether the job should be queued again."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.warned = False
        """Whether the scheduler, or the user, asked for a stop that is to be gone on from."""
        self.process: subprocess.Popen[bytes] | None = None
        signal.signal(signal.SIGUSR1, self._warn)
        signal.signal(signal.SIGTERM, self._stop)

    def _warn(self, number: int, frame: FrameType | None) -> None:
        self.warned = True
        print("SIGUSR1: all processes save a checkpoint and stop; then the job is queued again.", flush=True)
        if self.process is not None:
            self.process.send_signal(number)  # srun passes it on to every process of the step

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # scancel signals the step too, and srun would give it seconds only: it is left to Slurm how long that takes
        if self.process is None:
            raise SystemExit(exit_status(number))
        subprocess.run(["scancel", "--quiet", "--signal=TERM", self.job], capture_output=True, check=False)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """srun's exit status: the highest of its tasks."""
        if self.warned:
            return REQUEUE
        self.process = subprocess.Popen(command, env=environment)
        if self.warned:  # between the two lines above
            self.process.send_signal(signal.SIGUSR1)
        code = self.process.wait()
        return code if code >= 0 else exit_status(-code)

    def wants_requeue(self, status: int) -> bool:
        """Whether a job whose step ended so should run again: it was stopped from outside, and not by scancel."""
        if status in (0, USER_ERROR):
            return False
        found = dict(re.findall(r"(\w+)=(\S+)", _scontrol("show", "job", self.job, "--oneliner")))
        preempted = found.get("PreemptTime", "None") not in ("None", "N/A")
        return found.get("JobState") == "RUNNING" and (self.warned or status == REQUEUE or preempted)


def main(argv: Sequence[str]) -> int:
    """Runs scripts/train.slurm.sh's command line; returns the exit status."""
    try:
        return _run(argv)
    except DllmError as error:
        print(f"train.slurm.sh: {error}", file=sys.stderr)
        return USER_ERROR


def _run(argv: Sequence[str]) -> int:
    order = parse(argv)
    outside = "SLURM_JOB_ID" not in os.environ
    if order.dry_run and outside:
        gpus = gpus_of(os.environ)
        allocation = Allocation(
            job="0", nodes=1, names="none", head="127.0.0.1", gpus=gpus, cpus=os.cpu_count() or 1, restarts=0
        )
    else:
        allocation = read_allocation(os.environ)
    supervisor = None if order.dry_run else Supervisor(allocation.job)
    command = srun_words(order, allocation)
    environment = srun_environment(order, allocation, os.environ)
    if not allocation.restarts:
        check_known(order)
    describe(order, allocation, command, environment)
    if supervisor is None:
        return 0
    status = supervisor.run(command, environment)
    if not (order.requeue and supervisor.wants_requeue(status)):
        return status
    print(f"Job {allocation.job} is queued again; it goes on with {RESUME} auto.", flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which the old run of the job is ended
    done = subprocess.run(["scontrol", "requeue", allocation.job], check=False)
    if done.returncode:
        print(f"Slurm does not queue it again: give the same sbatch command with {RESUME} auto.", file=sys.stderr)
    return status


def describe(order: Order, allocation: Allocation, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Prints what runs where."""
    each = order.processes_per_node or allocation.gpus or 1
    why = (
        "asked for"
        if order.processes_per_node
        else f"{allocation.gpus} GPUs"
        if allocation.gpus
        else "no GPUs allocated"
    )
    again = f", start {allocation.restarts + 1}" if allocation.restarts else ""
    lines = [
        f"job            {allocation.job}{again}: {allocation.nodes} node{'s' * (allocation.nodes > 1)} ({allocation.names})",
        f"processes      {each} a node ({why}), {each * allocation.nodes} in all, {environment['OMP_NUM_THREADS']} threads each",
        f"configuration  {order.config}",
        f"command        {shlex.join(command)}",
    ]
    print("\n".join(lines), flush=True)
    if allocation.cpus < each and allocation.gpus:
        print(
            f"Slurm gave {allocation.cpus} processors a node for {each} processes: sbatch --cpus-per-gpu=N gives more.",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
