"""Runs a script with FSDP on processes of a CPU: accelerate would quietly take DDP there.

    accelerate launch --config_file scripts/accelerate_configs/fsdp.yaml tests/system/fsdp_on_cpu.py SCRIPT OPTIONS ...

Only the choice of the backend is replaced: what FSDP itself does over gloo is what it does over NCCL.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def _backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    if not torch.distributed.is_initialized():  # accelerate leaves that out where the arguments say use_cpu
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


def _device(self: PartialState) -> None:
    self.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState._prepare_backend = _backend
    PartialState.set_device = _device
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
