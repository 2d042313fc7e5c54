"""Rotary position embedding in the half-split ("NeoX") pairing, angles and rotation in fp32.

Shapes: B batch, L positions, H heads, K head width.
Source: Su et al., RoFormer, arXiv:2104.09864, eq. 34; LLaDA's `rope_full_precision: true` asks for fp32 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles.

    Args:
        positions_BL: integer positions [B, L].
        head_dim: K, even.
        theta: the base of the geometric series of wavelengths.

    Returns:
        (cos, sin), each fp32 [B, 1, L, K/2]: the angles of the pairs, ready to broadcast over heads.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BL.device) / head_dim
    angles = positions_BL[:, None, :, None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BHLK: Tensor, cos_B1Lk: Tensor, sin_B1Lk: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + K/2]) by its position's angle; computed in fp32, returned in the dtype of `x`."""
    first, second = x_BHLK.float().chunk(2, dim=-1)
    turned = (first * cos_B1Lk - second * sin_B1Lk, second * cos_B1Lk + first * sin_B1Lk)
    return torch.cat(turned, dim=-1).to(x_BHLK.dtype)
