"""A real Slurm on this machine: two nodes of eight GPUs that are links to /dev/null, one queue, and one that preempts it.

Debian and Ubuntu have it: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from system.workshop import environment

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
MpiDefault=none
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=16 Gres=gpu:8
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def free_ports() -> tuple[int, int, int]:
    """Three ports in a row that nobody listens at, below those that the system gives to clients."""
    for first in range(17_000 + os.getpid() % 1000, 20_000, 3):
        ports = (first, first + 1, first + 2)
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return ports
    raise AssertionError("no free ports")


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


class Cluster:
    """Commands of Slurm, run in a folder."""

    def __init__(self, configuration: Path, folder: Path) -> None:
        self.folder = folder
        self.environment = {**environment(), "SLURM_CONF": str(configuration)}
        # as a login shell has it
        for name in ("VIRTUAL_ENV", "CONDA_DEFAULT_ENV", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
            self.environment.pop(name, None)

    def run(self, *words: str, extra: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**self.environment, **(extra or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, command: str) -> str:
        """Runs an sbatch command as it would be typed; the job's number."""
        shown = self.run("bash", "-euc", command)
        return re.search(r"Submitted batch job (\d+)", shown)[1]  # type: ignore[index]

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", number, "--oneliner")))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def log(self, number: str) -> str:
        path = self.folder / f"dllm-train-{number}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, number: str, *states: str, seconds: float = 240) -> None:
        """Until a job is in one of the states; one that ended in another is a failure."""

        def there() -> bool:
            state = self.state(number)
            assert state in states or state not in ENDED, f"job {number} is {state}\n{self.log(number)}"
            return state in states

        try:
            wait_until(there, seconds, f"job {number}: {' or '.join(states)}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(number)}") from error


@contextmanager
def slurm(work: Path) -> Iterator[Cluster]:
    """Starts the daemons, all of whose files are in a temporary folder, and stops them."""
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    assert not missing, (
        f"{', '.join(missing)} not found: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
    )
    root = os.getuid() == 0
    folder = Path(tempfile.mkdtemp(prefix="dllm-slurm-"))
    folder.chmod(0o755)  # munge refuses to be root, and has to reach its own folder
    for name in ("state", "n1", "n2", "munge"):
        (folder / name).mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    if root:
        shutil.chown(folder / "munge", "munge")
        shutil.chown(key, "munge")
    for number in range(8):
        (folder / f"nvidia{number}").symlink_to(os.devnull)
    configuration = folder / "slurm.conf"
    host, ports = socket.gethostname().split(".")[0], free_ports()
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=ports, user=user))
    gres = f"AutoDetect=off\nNodeName=n[1-2] Name=gpu File={folder}/nvidia[0-7]\n"
    (folder / "gres.conf").write_text(gres)

    cluster = Cluster(configuration, work)
    cluster.environment["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    munged = ["munged", "--num-threads=2", f"--key-file={key}"]
    munged += [f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    as_munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"] if root else []
    try:
        cluster.run(*as_munge, *munged)
        cluster.run("slurmctld")
        for node in ("n1", "n2"):
            cluster.run("slurmd", "-N", node)
        wait_until(lambda: cluster.run("sinfo", "-hN", "-o%T").split() == ["idle"] * 4, 30, "two nodes in two queues")
        yield cluster
    finally:
        cluster.run("bash", "-c", "scancel --quiet --user=$(id -un); true")
        pids = [folder / "n1.pid", folder / "n2.pid", folder / "slurmctld.pid", folder / "munge" / "pid-file"]
        running = [int(path.read_text()) for path in pids if path.exists()]
        for pid in running:
            os.kill(pid, 15)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running), 60, "the daemons have ended")
        shutil.rmtree(folder, ignore_errors=True)
