"""Slow, obvious twins of dllm/layers, in fp64: one head, one pair, one position at a time.

Shapes: B batch, L positions, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv:1910.07467, eq. 4)."""
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]):
        mean_square = sum(float(value) ** 2 for value in row) / len(row)
        rows.append(row / math.sqrt(mean_square + eps) * weight.double())
    return torch.stack(rows).view(x.shape)


def rotated(x_BHLK: Tensor, positions_BL: Tensor, theta: float) -> Tensor:
    """The pair (x[i], x[i + K/2]) as a complex number, times e^(i p theta^(-2i/K)) (arXiv:2104.09864, eq. 34)."""
    B, H, L, K = x_BHLK.shape
    out = torch.empty(x_BHLK.shape, dtype=torch.float64)
    for b in range(B):
        for place in range(L):
            for i in range(K // 2):
                turn = cmath.exp(1j * int(positions_BL[b, place]) * theta ** (-2 * i / K))
                for h in range(H):
                    pair = complex(x_BHLK[b, h, place, i], x_BHLK[b, h, place, i + K // 2]) * turn
                    out[b, h, place, i], out[b, h, place, i + K // 2] = pair.real, pair.imag
    return out


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, seen_BLL: Tensor) -> Tensor:
    """softmax(QK^T * scaling) V over the keys that may be seen; head h reads key head h // (H / G). [B, L, H, K].

    Every query must see a key.
    """
    B, H, L, K = query.shape
    group = H // key.shape[1]
    out = torch.zeros(B, L, H, K, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            keys, values = key[b, h // group].double(), value[b, h // group].double()
            for place in range(L):
                visible = [other for other in range(L) if seen_BLL[b, place, other]]
                scores = [float(query[b, h, place].double() @ keys[other]) * scaling for other in visible]
                powers = [math.exp(score - max(scores)) for score in scores]
                for power, other in zip(powers, visible, strict=True):
                    out[b, place, h] += power / sum(powers) * values[other]
    return out
