"""What several tests of sampling need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class RefusesReads(TorchDispatchMode):
    """Refuses what waits for the device: numbers read from a tensor, and shapes that depend on its values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item", "is_nonzero", "_to_copy")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func.__name__.split(".")[0]
        boolean_index = operator.startswith(("index", "_index", "_unsafe_index")) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for argument in args
            if isinstance(argument, list | tuple)
            for index in argument
        )
        if operator == "_to_copy" and (kwargs or {}).get("device") is None:
            return func(*args, **(kwargs or {}))  # of dtype alone
        if boolean_index or operator.startswith(self.WAITS):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def refuses_reads() -> type[RefusesReads]:
    """`with refuses_reads():` fails where something waits for the device."""
    return RefusesReads
