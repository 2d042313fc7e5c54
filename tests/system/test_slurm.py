"""scripts/train.slurm.sh on a real Slurm: two nodes, sixteen ranks, a finished checkpoint, requeueing."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from system.cluster import Cluster, slurm, wait_until
from system.workshop import make_workshop, save_tiny_model, write_jsonl

from dllm.data.builtin import builtin_rows
from dllm.pipelines.llada import load_model, load_tokenizer
from dllm.training.callbacks import read_log
from dllm.training.checkpoints import fault

pytestmark = pytest.mark.system

STEPS = 400
PRETRAIN = (
    "sbatch --nodes=2 --gres=gpu:8 scripts/train.slurm.sh --accelerate_config cpu --num_processes_per_node 1 "
    "--script_path examples/llada/pt.py --model_name_or_path tiny --config_overrides n_layers=1,d_model=32,mlp_hidden_size=64 "
    f'--dataset_args "builtin:sudoku6[train:160,test:8]" --max_length 37 --max_steps {STEPS} --logging_steps 1 --output_dir '
)
RANKS = """
import os
names = "RANK WORLD_SIZE LOCAL_RANK GROUP_RANK SLURM_NODEID MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
open(f"ranks/{os.environ['RANK']}", "w").write(" ".join(os.environ[name] for name in names))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    work = make_workshop(tmp_path_factory.mktemp("slurm"))
    with slurm(work) as running:
        yield running


def wait_for_step(cluster: Cluster, job: str, out: str, step: int) -> None:
    log = cluster.folder / out / "log.jsonl"

    def there() -> bool:
        state = cluster.state(job)
        assert state in ("PENDING", "CONFIGURING", "RUNNING"), f"job {job} is {state}\n{cluster.log(job)}"
        return log.exists() and any(row["step"] >= step for row in read_log(log))

    wait_until(there, 120, f"step {step}")


def start_soon(cluster: Cluster, job: str) -> None:
    """A requeued job waits two minutes; not less than a second, in which its old run's permission to start ends."""
    cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now+2seconds")


def the_checkpoint(cluster: Cluster, out: str) -> Path:
    (folder,) = (cluster.folder / out).glob("checkpoint-*")
    assert fault(folder) is None
    return folder


def test_sixteen_ranks_on_two_nodes(cluster: Cluster) -> None:
    (cluster.folder / "ranks").mkdir()
    (cluster.folder / "ranks.py").write_text(RANKS)
    job = cluster.submit(
        "sbatch --nodes=2 --gres=gpu:8 --cpus-per-gpu=2 scripts/train.slurm.sh --accelerate_config ddp --script_path ranks.py"
    )
    cluster.wait(job, "COMPLETED")
    ranks = [(cluster.folder / f"ranks/{rank}").read_text().split() for rank in range(16)]
    (port,) = {rank[6] for rank in ranks}
    for rank, found in enumerate(ranks):
        node = str(rank // 8)
        assert found == [str(rank), "16", str(rank % 8), node, node, "127.0.0.1", port, "2"]
    shown = cluster.log(job)
    assert f"job            {job}: 2 nodes (n[1-2])\n" in shown
    assert "processes      8 a node (8 GPUs), 16 in all, 2 threads each\n" in shown
    assert re.search(r"^configuration  \S+/ddp\.yaml$", shown, re.MULTILINE)
    assert re.search(r"^command        srun --nodes=2 .* --num_processes 16 .* ranks\.py$", shown, re.MULTILINE)


def test_the_readme_command_ends_with_a_checkpoint(cluster: Cluster) -> None:
    save_tiny_model(cluster.folder / "base")
    write_jsonl(cluster.folder / "data.jsonl", builtin_rows("addition", "train", 24, column="messages"))
    out = "models/base-SFT/data.jsonl[train:16,test:4]"
    # 16 ranks of gloo on two cores take minutes: one a node
    job = cluster.submit(f"""
sbatch --nodes=2 --gres=gpu:8 scripts/train.slurm.sh \\
    --accelerate_config "deepspeed_zero2" \\
    --script_path "examples/llada/sft.py" \\
    --num_processes_per_node 1 \\
    --script_args '
    --model_name_or_path "base" \\
    --dataset_args "data.jsonl[train:16,test:4]" \\
    --output_dir "{out}" \\
    --max_length 64 \\ 
    --num_train_epochs 2 \\
    --per_device_train_batch_size 4 \\
    --logging_steps 1
    '
""")  # noqa: W291 - the blank after a backslash is the slip that is forgiven
    cluster.wait(job, "COMPLETED")
    shown = cluster.log(job)
    assert "a step is 2 processes x 4 samples x 1 accumulated; DEEPSPEED" in shown
    made = cluster.folder / out
    assert [row["step"] for row in read_log(made / "log.jsonl") if "loss" in row] == [1, 2, 3, 4]
    final = str(made / "checkpoint-final")
    assert load_model(final).config.mask_token_id == load_tokenizer(final).mask_token_id


def test_a_warned_job_and_a_preempted_one_go_on_by_themselves(cluster: Cluster) -> None:
    job = cluster.submit(PRETRAIN + "again")
    wait_for_step(cluster, job, "again", 3)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # as Slurm does before the time limit
    cluster.wait(job, "PENDING")
    first = int(the_checkpoint(cluster, "again").name.split("-")[1])
    assert 3 <= first < STEPS

    start_soon(cluster, job)
    wait_for_step(cluster, job, "again", first + 3)
    other = cluster.submit('sbatch --partition=urgent --nodes=2 --gres=gpu:8 --output=/dev/null --wrap "true"')
    cluster.wait(other, "COMPLETED")
    cluster.wait(job, "PENDING")
    assert cluster.job(job)["Restarts"] == "2"

    start_soon(cluster, job)
    cluster.wait(job, "COMPLETED")
    shown = cluster.log(job)
    assert shown.count("Stopped at step") == 2
    assert shown.count(f"Job {job} is queued again; it goes on with --resume_from_checkpoint auto.") == 2
    assert [row["step"] for row in read_log(cluster.folder / "again/log.jsonl") if "loss" in row] == list(
        range(1, STEPS + 1)
    )
    assert (cluster.folder / "again/checkpoint-final").exists()
    assert "Traceback" not in shown


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster: Cluster) -> None:
    job = cluster.submit(PRETRAIN.replace(f"--max_steps {STEPS}", "--max_steps 100000") + "cancelled")
    wait_for_step(cluster, job, "cancelled", 3)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED")
    wait_until(lambda: "Stopped at step" in cluster.log(job), 30, "the checkpoint")
    step = int(the_checkpoint(cluster, "cancelled").name.split("-")[1])
    assert f"Stopped at step {step}." in cluster.log(job)
    assert cluster.job(job)["Restarts"] == "0"
    assert "queued again" not in cluster.log(job)


def test_a_job_that_fails_is_not_queued_again_and_says_why_once(cluster: Cluster) -> None:
    jobs = {
        cluster.submit(PRETRAIN.replace("--max_length", "--max_lenght") + "x"): (
            "train.slurm.sh: examples/llada/pt.py has no option '--max_lenght'. Did you mean '--max_length'?\n"
        ),
        cluster.submit(PRETRAIN.replace("config cpu", "config cpus") + "x"): "Did you mean 'cpu'?\n",
    }
    for job, message in jobs.items():
        cluster.wait(job, "FAILED")
        assert cluster.log(job).count(message) == 1
        assert len(cluster.log(job).splitlines()) == 1
        assert cluster.job(job)["ExitCode"] == "2:0"
    assert not (cluster.folder / "x").exists()


def test_what_ranks_find_wrong_is_said_once_a_node(cluster: Cluster) -> None:
    (cluster.folder / "wrong.py").write_text(
        "import sys\nfrom dllm.pipelines.llada import pretrain\nif '--help' not in sys.argv: pretrain(['--max_steps', 'few'])\n"
    )
    job = cluster.submit(
        "sbatch --nodes=1 --gres=gpu:2 scripts/train.slurm.sh --accelerate_config ddp --script_path wrong.py"
    )
    cluster.wait(job, "FAILED")
    assert re.findall(r"(?m)^.*invalid int value.*$", cluster.log(job)) == [
        "launch: argument --max_steps/--max-steps: invalid int value: 'few'. See  dllm pretrain --help"
    ]
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert signal.SIGTERM.name not in cluster.log(job)
