"""What every test run gets: no network, one set of threads, a data set cache of its own, stable property tests."""

from __future__ import annotations

import os

# Before anything imports torch, transformers or datasets: they read these once. Subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread a process: small tensors gain nothing from more, and results do not depend on the number of cores.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

# derandomised, so a hundred examples, the default, would show no more on one day than on another
hypothesis.settings.register_profile("dllm", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("dllm")


def pytest_configure(config: pytest.Config) -> None:
    # here and not in the fixture below: `datasets` fixes its cache when it is imported, which collection may do
    folder = tempfile.TemporaryDirectory(prefix="dllm-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["HF_DATASETS_CACHE"] = folder.name


@pytest.fixture(scope="session")
def datasets_cache() -> Path:
    """The folder where `datasets` caches during this run; it starts empty and is removed afterwards."""
    return Path(os.environ["HF_DATASETS_CACHE"])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (
        "torch" in sys.modules
    ):  # models of random weights are the same in any order of the tests, on any number of processes
        sys.modules["torch"].manual_seed(0)
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
