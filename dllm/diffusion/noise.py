"""Counter-based random numbers: a number depends on what it is for, never on when or where it is drawn.

A key is a tuple of integers such as (seed, request, step); each tensor element adds its own integers. The same key gives
the same number in any batch, on any rank and on any day, which is what makes batches of any mix, resumed runs and any
number of processes agree.

The mixer is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied once per integer of the key.
"""

from __future__ import annotations

from enum import IntEnum, unique

import torch
from torch import Tensor


@unique
class Purpose(IntEnum):
    """What a random number is for: the second integer of every key, after the seed. A new purpose takes a new number."""

    TIME = 1
    """The common offset of a step's times, or one sample's time."""
    TIME_ORDER = 2
    """Which sample of a step takes which time."""
    MASK = 3
    """Whether a token is masked."""
    TOKEN = 4
    """Gumbel noise of a candidate."""
    RANK = 5
    """The order in which random remasking commits."""
    DATA_ORDER = 6
    """The shuffle of an epoch."""
    CUT = 7
    """Whether a step's rows are cut."""
    CUT_LENGTH = 8
    """To which length."""
    TURN = 9
    """Which answer of a conversation is learnt."""
    TAIL = 10
    """How many ends of text follow a packed answer."""
    STEP_ORDER = 11
    """The shuffle of steps whose rows are alike in length."""
    STREAM = 20
    """The shuffle of the documents of a stream."""
    STREAM_FILES = 21
    """The order of its files."""
    SOURCE = 22
    """From which source of a mixture a sample comes."""


_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit: torch has no unsigned arithmetic
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keyed_bits(*key: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """64 random bits for every element of the broadcast key.

    Args:
        *key: Python integers and int64 tensors that broadcast against each other; their order matters.
        device: where to compute; that of the tensors by default.

    Returns:
        int64 tensor of the broadcast shape.
    """
    if device is None:
        device = next((part.device for part in key if isinstance(part, Tensor)), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for part in key:
        if not isinstance(part, Tensor):
            part = torch.tensor((part + (1 << 63)) % (1 << 64) - (1 << 63), dtype=torch.int64, device=device)
        state = _mix((state + _GAMMA) ^ _mix(part.to(device=device, dtype=torch.int64) + _GAMMA))
    return state


def keyed_uniform(*key: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Uniform numbers in the open interval (0, 1), one for every element of the broadcast key.

    Returns:
        fp64 with 52 random bits (fp32 with 23 on devices that have no fp64): (k + 1/2) / 2^bits, so that neither 0 nor 1
        can occur and its logarithm is finite.
    """
    bits = keyed_bits(*key, device=device)
    if bits.device.type == "mps":
        return (_shift_right(bits, 41).float() + 0.5) * 2.0**-23
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def keyed_gumbel(*key: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), one number for every element of the broadcast key.

    argmax(logits / temperature + gumbel) is a draw from softmax(logits / temperature). It is computed in fp64 where there
    is one: with fp32's uniform numbers the largest values are cut off, which lowers the effective temperature.
    Source: Zheng et al., Masked Diffusion Models are Secretly Time-Agnostic Masked Models, arXiv:2409.02908.
    """
    return -torch.log(-torch.log(keyed_uniform(*key, device=device)))


def keyed_permutation(n: int, *key: int) -> Tensor:
    """A permutation of 0 .. n - 1 that depends on the key alone; int64 [n] on the CPU."""
    return torch.argsort(keyed_bits(*key, torch.arange(n)), stable=True)
