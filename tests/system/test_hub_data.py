"""Data sets of the hub, by the clients that users have, against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from system.hub import hub

from dllm.training.callbacks import read_log

pytestmark = pytest.mark.system

TEXTS = [f"row {i} of the hub" for i in range(60)]
READ = """
import json, sys
from dllm.data.sources import load_splits
from dllm.errors import DataError

for args in sys.argv[1:]:
    try:
        train, test = load_splits(args, column="text")
        found = {"train": train["text"][:], "test": test and test["text"][:], "files": len(train.cache_files)}
    except DataError as error:
        found = {"error": str(error)}
    print(json.dumps(found))
"""


class Place:
    """A folder of data sets, the environment of who uses them, and what was asked for."""

    def __init__(self, folder: Path, address: str, asked: list[str]) -> None:
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        kept = {k: v for k, v in os.environ.items() if k != "HF_DATASETS_CACHE"}
        self.environment = {**kept, **online, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.folder, self.asked = folder, asked

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *words], cwd=self.folder, env=self.environment, capture_output=True, text=True,
            check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hub")
    rows = folder / "served" / "some" / "rows"  # not where the commands run: there it would be a folder of theirs
    (rows / "data").mkdir(parents=True)
    for part in range(3):
        texts = TEXTS[20 * part : 20 * part + 20]
        datasets.Dataset.from_dict({"text": texts, "id": list(range(20))}).to_parquet(rows / f"data/{part}.parquet")
    datasets.Dataset.from_dict({"text": ["held out"]}).to_parquet(rows / "held.parquet")
    (rows / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  data_files: data/*.parquet\n- config_name: both\n  data_files:\n"
        "  - split: train\n    path: data/0.parquet\n  - split: test\n    path: held.parquet\n---\n"
    )
    with hub(folder / "served") as (address, asked):
        yield Place(folder, address, asked)


def test_ids_are_read_with_configurations_splits_and_limits(place: Place) -> None:
    cases: dict[str, dict[str, Any]] = {
        "some/rows[name:plain,train:12,test:3]": {"train": TEXTS[3:15], "test": TEXTS[:3], "files": 1},
        "some/rows[name:plain]": {"train": TEXTS, "test": None, "files": 1},
        "some/rows[name:both,revision:main]": {"train": TEXTS[:20], "test": ["held out"], "files": 1},
        "some/rows": {"error": "some/rows has several configurations. It can be one of: both, plain."},
        "some/rows[name:plaim]": {"error": "some/rows has no configuration 'plaim'. Did you mean 'plain'?"},
        "some/none": {"error": "'some/none' is no file or folder here, and loading it from the hub failed: Dataset"},
    }
    shown = place.run("-c", READ, *cases)
    for line, (args, expected) in zip(shown.splitlines(), cases.items(), strict=True):
        found = json.loads(line)
        if "error" in expected:
            assert found["error"].startswith(expected["error"]), args
        else:
            assert found == expected, args


def test_a_limit_fetches_the_files_that_it_needs(place: Place) -> None:
    before = len(place.asked)
    place.run("-c", READ, "some/rows[name:plain,train:7]")
    fetched = {
        asked.rsplit("/", 1)[1]
        for asked in place.asked[before:]
        if asked.startswith("GET") and asked.endswith("parquet")
    }
    assert fetched in ({"0.parquet"}, {"0.parquet", "1.parquet"})  # the client opens the next one early


def test_a_stream_from_the_hub_is_trained_on(place: Place) -> None:
    options = (
        "--model_name_or_path tiny --config_overrides n_layers=1,d_model=16,n_heads=2,mlp_hidden_size=24 --max_length 12 "
        "--max_steps 4 --bf16 False --report_to none --logging_steps 1 --save_strategy no --output_dir run"
    )
    data = "some/rows[name:plain,test:4,streaming:true]"
    place.run("-m", "dllm.cli.main", "pretrain", *options.split(), "--dataset_args", data)
    rows = read_log(place.folder / "run" / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert any("eval_loss" in row for row in rows)
