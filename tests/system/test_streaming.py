"""A streamed run is one run: on one process and on two, with workers, killed and gone on with, also by another number."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from system.workshop import environment, make_workshop, save_tiny_model, several, several_command, trained_here

from dllm.training.callbacks import read_log
from dllm.training.checkpoints import last_whole

pytestmark = pytest.mark.system

STEPS = 12
COMMON = (
    f"--model_name_or_path base --max_steps {STEPS} --logging_steps 1 --bf16 false --learning_rate 3e-3 --save_steps 3 "
    "--shuffle_buffer 64 --report_to none --lr_scheduler_type constant --resume_from_checkpoint auto"
)
TASKS = {
    "pt": ("pretrain", '--dataset_args "texts.jsonl[test:20,streaming:true]" --max_length 37 --random_length 0.5'),
    "sft": ("sft", '--dataset_args "talks[test:20]" --streaming --max_length 64 --turns all --truncation left'),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workshop(tmp_path_factory.mktemp("streaming"))
    save_tiny_model(folder / "base")
    texts = [{"text": f"{n} and {n + 1} make {2 * n + 1}. " * (1 + n % 5)} for n in range(1200)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "talks").mkdir()
    for part in range(3):
        long = [1 + 20 * (n % 7 == 0) for n in range(400)]  # times the answer stands there: some are cut
        rows = [{"prompt": f"{n}+{part}=", "completion": f"{n + part}" * long[n]} for n in range(400)]
        (folder / f"talks/train-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(task: str, *, batch: int, accumulated: int = 1, more: str = "") -> list[str]:
    shape = f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulated}"
    return [TASKS[task][0], *shlex.split(f"{COMMON} {TASKS[task][1]} {shape} {more}")]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(folder / "log.jsonl") if "loss" in row]


def last_loss(folder: Path) -> float:
    return [float(row["eval_loss"]) for row in read_log(folder / "log.jsonl") if "eval_loss" in row][-1]


def told(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if "as read so far" in line]


def agree(one: list[tuple[int, float, float]], other: list[tuple[int, float, float]]) -> None:
    assert [row[0] for row in one] == [row[0] for row in other] == list(range(1, STEPS + 1))
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


@pytest.fixture(scope="module")
def whole(shop: Path) -> dict[str, Path]:
    """The runs of one process that nobody stopped."""
    for task in TASKS:
        name = f"{task}-whole"
        (shop / f"{name}.out").write_text(trained_here(shop, {name: options(task, batch=8)}))
    return {task: shop / f"{task}-whole" for task in TASKS}


@pytest.fixture(scope="module")
def killed(shop: Path) -> Path:
    """A run that was killed, after two others of its process."""
    more = "--dataset_args texts.jsonl[streaming:true] --max_steps 2 --sample_every 2 --sample_length 4"
    spawned = f"{more} --dataloader_num_workers 1 --dataloader_multiprocessing_context spawn"
    runs = {
        "workers": options("pt", batch=4, accumulated=2, more="--dataloader_num_workers 2"),
        "spawned": options("pt", batch=8, more=spawned),
        "killed": options("pt", batch=8),
    }
    out = shop / "killed"
    with (shop / "killed.out").open("w") as shown:
        words = several_command(shop, None, 1, runs)
        process = subprocess.Popen(words, cwd=shop, env=environment(), stdout=shown, stderr=subprocess.STDOUT)
    while process.poll() is None and (not out.is_dir() or last_whole(out) is None):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (shop / "killed.out").read_text()
    return out


@pytest.fixture(scope="module")
def two(shop: Path) -> dict[str, Path]:
    """What two processes began."""
    runs = {f"{task}-two": options(task, batch=4, more="--max_steps 6") for task in TASKS}
    several(shop, "cpu", 2, runs)
    return {task: shop / f"{task}-two" for task in TASKS}


def test_accumulation_and_workers_change_nothing(whole: dict[str, Path], killed: Path, shop: Path) -> None:
    agree(losses(shop / "workers"), losses(whole["pt"]))


def test_spawned_workers_get_a_stream_that_a_prompt_was_read_from(killed: Path, shop: Path) -> None:
    """Without test rows a sample goes on from the first training row."""
    (sample,) = (shop / "spawned/samples.jsonl").read_text().splitlines()
    assert json.loads(sample)["step"] == 2


def test_a_run_that_is_killed_goes_on_bit_by_bit(whole: dict[str, Path], killed: Path, shop: Path) -> None:
    stopped = last_whole(killed)
    assert stopped is not None
    state: dict[str, Any] = json.loads((stopped / "stream-0.json").read_text())
    assert state["cursors"]
    trained_here(shop, {killed.name: options("pt", batch=8)})
    assert losses(killed) == losses(whole["pt"])
    assert last_loss(killed) == last_loss(whole["pt"])


@pytest.mark.parametrize("task", list(TASKS))
def test_two_processes_begin_and_one_takes_over(
    task: str, whole: dict[str, Path], two: dict[str, Path], shop: Path
) -> None:
    out = two[task]
    assert {path.name for path in (out / "checkpoint-6").glob("stream-*.json")} == {"stream-0.json", "stream-1.json"}
    assert [row[0] for row in losses(out)] == list(range(1, 7))
    shown = trained_here(shop, {out.name: options(task, batch=8)})
    agree(losses(out), losses(whole[task]))
    expected = told((shop / f"{task}-whole.out").read_text())
    assert told(shown) == expected
    assert len(expected) == (task == "sft")
    assert all("turns, with --truncation left to 64 tokens, the beginning of" in line for line in expected)
    assert last_loss(out) == pytest.approx(last_loss(whole[task]), rel=2e-4)
