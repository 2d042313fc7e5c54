"""The settings of the denoising loop, and the other spellings in which users bring them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dllm.errors import OptionError, did_you_mean

Remasking = Literal["low_confidence", "random"]

ALIASES = {
    "max_new_tokens": "gen_length",
    "max_tokens": "gen_length",
    "block_size": "block_length",
    "logits_eos_inf": "suppress_eos",
    "confidence_eos_eot_inf": "eos_last",
}
"""Other names of the settings, accepted wherever settings come in."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How masks are filled in. Defaults are those of the published sampler."""

    gen_length: int = 128
    """Tokens to write after each prompt (not used by infilling, whose masks say where to write)."""
    steps: int | None = None
    """Denoising steps for the whole answer, shared evenly over its blocks; by default one per token, the best quality."""
    block_length: int | None = None
    """Masks are filled block by block, this many to a block, from left to right; by default all in one block."""
    temperature: float = 0.0
    """0 takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature)."""
    remasking: Remasking = "low_confidence"
    """Which candidates to commit: the likeliest first (low_confidence), or any (random)."""
    cfg_scale: float = 0.0
    """Classifier-free guidance: logits are un + (cfg_scale + 1) (cond - un); 0 is off. Doubles the work of a step."""
    cfg_keep_tokens: tuple[int, ...] = ()
    """Given tokens with these ids stay visible in guidance's unconditional branch."""
    suppress_eos: bool = False
    """The end-of-text token is never a candidate."""
    eos_last: bool = False
    """End-of-text and end-of-turn candidates are committed last, however sure the model is of them."""
    seed: int = 0
    """Seed of the noise (temperature above 0, random remasking). The noise of a row depends on (seed, request) alone."""

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise OptionError(f"{name}={getattr(self, name)!r}: {allowed}")

        for name in ("gen_length", "steps", "block_length"):
            value = getattr(self, name)
            if value is None and name != "gen_length":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                refuse(name, "it is a whole number, at least 1")
        for name, allowed in (("temperature", "0 or more"), ("cfg_scale", "0 (off) or more")):
            value = getattr(self, name)
            # an infinite one would make NaN of suppressed tokens, or of equal logits
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                refuse(name, f"it is {allowed}, a finite number")
        if self.remasking not in get_args(Remasking):
            raise OptionError(
                f"remasking={self.remasking!r} does not exist.{did_you_mean(str(self.remasking), get_args(Remasking))}"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            refuse("seed", "it is a whole number")
        for name in ("suppress_eos", "eos_last"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "it is True or False")
        kept = (self.cfg_keep_tokens,) if isinstance(self.cfg_keep_tokens, int) else self.cfg_keep_tokens
        object.__setattr__(self, "cfg_keep_tokens", tuple(kept))

    @classmethod
    def from_options(cls, **options: Any) -> SamplingConfig:
        """A configuration from keyword options in any of their spellings.

        Raises:
            OptionError: an option that does not exist (the message names the nearest), one given twice under two
                spellings, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        settings: dict[str, Any] = {}
        for name, value in options.items():
            target = ALIASES.get(name, name)
            if target not in known:
                raise OptionError(f"There is no sampling option {name!r}.{did_you_mean(name, known | set(ALIASES))}")
            if target in settings:
                raise OptionError(f"{name!r} and another spelling of {target!r} are both given: keep one")
            settings[target] = value
        return cls(**settings)
