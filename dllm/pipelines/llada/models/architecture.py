"""What a config.json may ask for: a value that names an architecture that is not here is an error at load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm.errors import CheckpointError


def refuse_unknown_architecture(config: Any, implemented: Mapping[str, tuple[Any, ...]]) -> None:
    """Compares a configuration with what is implemented.

    Args:
        config: has the keys, or lacks them.
        implemented: key -> the values that the code has; the first is what an absent key means.

    Raises:
        CheckpointError: names key and value.
    """
    for key, values in implemented.items():
        value = getattr(config, key, values[0])
        if value not in values:
            known = " or ".join(repr(v) for v in values if v is not None or len(values) == 1)
            raise CheckpointError(
                f"config.json says {key}={value!r}, an architecture that dllm does not implement (it has {known}). "
                f"This is not one of the public LLaDA shapes: check that the folder holds a LLaDA checkpoint."
            )


def check_multiples(config: Any, *pairs: tuple[str, str]) -> None:
    """Each pair names a size and one that it must be a multiple of.

    Raises:
        CheckpointError: names both and their values.
    """
    for whole, part in pairs:
        if getattr(config, part) < 1 or getattr(config, whole) % getattr(config, part):
            raise CheckpointError(
                f"config.json says {whole}={getattr(config, whole)} and {part}={getattr(config, part)}: "
                f"the first must be a multiple of the second."
            )
