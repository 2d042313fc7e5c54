"""What the processor at hand computes fast."""

from __future__ import annotations

import torch


def bf16_is_fast(cpu: bool) -> bool:
    """Whether the processor multiplies bf16 matrices faster than fp32 ones."""
    if not cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(probe()) for probe in probes if probe is not None)
