"""The slow twin of `dllm.diffusion.noise`: one number at a time, in Python's integers and floats."""

from __future__ import annotations

import math

WORD = (1 << 64) - 1


def mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 16), on 64 unsigned bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def bits(*key: int) -> int:
    """64 random bits as an unsigned number."""
    gamma = 0x9E3779B97F4A7C15
    state = 0
    for part in key:
        state = mix(((state + gamma) & WORD) ^ mix((part + gamma) & WORD))
    return state


def uniform(*key: int) -> float:
    return ((bits(*key) >> 12) + 0.5) / 2**52


def gumbel(*key: int) -> float:
    return -math.log(-math.log(uniform(*key)))
