"""What a result says of the machine that it was measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """What the processor calls itself, and the instructions that bf16 depends on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = (line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name"))
    fast = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in info]
    return " with ".join([next(names, platform.machine()), *fast])
