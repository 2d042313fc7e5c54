"""Sources mixed by weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import datasets
import numpy as np

from dllm.data.sources import joined


def mix(parts: Sequence[datasets.Dataset], weights: Sequence[float]) -> datasets.Dataset:
    """Rows of several sources in given shares.

    An epoch is over when every source has been seen whole: the one that is longest for its weight is seen once, and the
    others are gone through again from their beginning as often as their share asks. The rows come source after source;
    training shuffles them.

    Args:
        parts: rows of the same columns.
        weights: the sources' shares in any unit, each above 0.
    """
    counts = mixed_counts([len(part) for part in parts], weights)
    starts = np.cumsum([0, *(len(part) for part in parts)])
    picks = [start + np.arange(n) % len(part) for part, start, n in zip(parts, starts, counts, strict=False)]
    return joined(list(parts)).select(np.concatenate(picks))


def mixed_counts(lengths: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows of each source an epoch has; see `mix`."""
    total = max(length / weight for length, weight in zip(lengths, weights, strict=True))
    return [max(length, round(total * weight)) for length, weight in zip(lengths, weights, strict=True)]


def tell(say: Callable[[str], None], names: Sequence[str], lengths: Sequence[int], weights: Sequence[float]) -> None:
    """Says what an epoch of a mixture is made of."""
    counts = mixed_counts(lengths, weights)
    parts = [
        f"{name} {count:,} ({count / sum(counts):.1%}, each {count / length:.3g} times)"
        for name, count, length in zip(names, counts, lengths, strict=True)
    ]
    say(f"mixture: an epoch is {sum(counts):,} rows: {', '.join(parts)}")
