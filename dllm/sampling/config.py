"""The settings of the denoising loop, and the other spellings in which users bring them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dllm.errors import OptionError, did_you_mean

Remasking = Literal["low_confidence", "random", "margin", "entropy"]
PolicyName = Literal[
    "fixed", "threshold", "factor", "entropy_bound", "klass", "wino", "hierarchical", "remdm"
]  # in the order of dllm/sampling/policies.py, which says what each does
CacheName = Literal["none", "prefix", "dual", "vicinity", "delayed"]

ALIASES = {
    "max_new_tokens": "gen_length",
    "max_tokens": "gen_length",
    "block_size": "block_length",
    "logits_eos_inf": "suppress_eos",
    "confidence_eos_eot_inf": "eos_last",
}
"""Other names of the settings, accepted wherever settings come in."""

POLICY_OPTIONS: dict[PolicyName, dict[str, float | int]] = {
    "fixed": {},
    "threshold": {"threshold": 0.9},
    "factor": {"factor": 1.0},
    "entropy_bound": {"gamma": 0.1},
    "klass": {"threshold": 0.6, "kl_threshold": 0.015, "kl_steps": 2},
    "wino": {"threshold": 0.7, "verify_threshold": 0.9},
    "hierarchical": {"threshold": 0.92, "low_threshold": 0.5},
    # the paper's eta is 0.01 to 0.05 of a whole text of 1024 tokens; of a block of 32 that would be no token at all
    "remdm": {"eta": 0.1},
}
"""The options of each policy, and their defaults."""

SCHEDULED: tuple[PolicyName, ...] = ("fixed", "remdm")
"""The policies that commit a number of tokens given by `steps`; the others decide by themselves."""

POLICY_REMASKING: dict[PolicyName, tuple[Remasking, ...]] = {
    **dict.fromkeys(get_args(PolicyName), ("low_confidence", "margin")),
    "fixed": get_args(Remasking),
    "entropy_bound": ("low_confidence",),
}
"""The measures of confidence that a policy can use: thresholds want one between 0 and 1, and the entropy bound its own."""

CACHE_OPTIONS: dict[CacheName, dict[str, int | None]] = {
    "none": {},
    "prefix": {"cache_refresh": None},
    "dual": {"cache_refresh": None},
    "vicinity": {"vicinity": 16, "cache_refresh": None},
    "delayed": {"cache_refresh": 8},
}
"""The options of each cache, and their defaults; a `cache_refresh` of None is a refresh at the start of each block alone."""

_COUNT = (1, math.inf, "a whole number, at least 1")
_FRACTION = (0, 1, "a number from 0 to 1")
_RANGES: dict[str, tuple[float, float, str]] = {
    "gen_length": _COUNT,
    "steps": _COUNT,
    "block_length": _COUNT,
    "kl_steps": _COUNT,
    "vicinity": _COUNT,
    "cache_refresh": _COUNT,
    "seed": (-math.inf, math.inf, "a whole number"),
    # an infinite temperature would make NaN of suppressed tokens, an infinite guidance of equal logits
    "temperature": (0, math.inf, "0 or more, a finite number"),
    "cfg_scale": (0, math.inf, "0 (off) or more, a finite number"),
    "threshold": _FRACTION,
    "low_threshold": _FRACTION,
    "verify_threshold": _FRACTION,
    "eta": _FRACTION,
    "factor": (0, math.inf, "0 or more, a finite number"),
    "gamma": (0, math.inf, "0 or more, a finite number of nats"),
    "kl_threshold": (0, math.inf, "0 or more, a finite number of nats"),
}
"""Lowest and highest value, and both in words; whole numbers are those whose words say so."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How masks are filled in. Defaults are those of the published sampler.

    Raises:
        OptionError: a value out of range, a name that does not exist, or an option that does not belong to the chosen
            policy or cache.
    """

    gen_length: int = 128
    """Tokens to write after each prompt (not used by infilling, whose masks say where to write)."""
    steps: int | None = None
    """Denoising steps for the whole answer, shared evenly over its blocks; by default one per token, the best quality.
    Goes with policy fixed and remdm: the others take as many steps as they need."""
    block_length: int | None = None
    """Masks are filled block by block, this many to a block, from left to right; by default all in one block."""
    temperature: float = 0.0
    """0 takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature)."""
    remasking: Remasking = "low_confidence"
    """How sure a candidate is, the surest being committed first: its probability (low_confidence), that less the second
    best's (margin), minus the entropy in nats (entropy), or a number drawn by lot (random). Policy fixed takes them all,
    entropy_bound the first, the others the first two."""
    policy: PolicyName = "fixed"
    """How many candidates a step commits: a number set beforehand (fixed; the only one that is the published sampler),
    all that are sure enough (threshold, factor, entropy_bound, klass, hierarchical), or so and with second thoughts
    (wino; remdm with a number set beforehand)."""
    threshold: float | None = None
    """The confidence from which on candidates are committed: policy threshold (default 0.9; chosen where a threshold is given
    and no policy is), klass (0.6), wino (0.7), hierarchical (0.92)."""
    factor: float | None = None
    """Policy factor commits the n surest with (n + 1) (1 - the least of their confidences) below this (default 1)."""
    gamma: float | None = None
    """Policy entropy_bound commits those of least entropy whose sum, the largest left out, is at most this many nats
    (default 0.1)."""
    kl_threshold: float | None = None
    """Policy klass: the change of a prediction from step to step, KL in nats, below which it is stable (default 0.015)."""
    kl_steps: int | None = None
    """Policy klass: how many steps in succession a prediction has to be stable (default 2)."""
    verify_threshold: float | None = None
    """Policy wino: a committed token becomes a mask again if, hidden, it has a probability below this (default 0.9)."""
    low_threshold: float | None = None
    """Policy hierarchical: the confidence above which the surest of each run of masks is committed (default 0.5)."""
    eta: float | None = None
    """Policy remdm: the fraction of a block's committed tokens that become masks again at each step (default 0.1)."""
    cache: CacheName = "none"
    """What a step takes over from earlier ones: nothing (none; exact), or, as an approximation, keys and values before the
    block (prefix), outside it (dual), outside it and its surroundings (vicinity), or of tokens committed earlier
    (delayed)."""
    vicinity: int | None = None
    """Cache vicinity: positions on either side of the block that are computed anew at each step (default 16)."""
    cache_refresh: int | None = None
    """Steps after which a cache computes everything anew, besides at a block's start (cache delayed: default 8; prefix,
    dual and vicinity: by default never)."""
    early_stop: bool = True
    """A row is done when everything up to its first end-of-text token is committed."""
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
        for name, names in (("remasking", Remasking), ("policy", PolicyName), ("cache", CacheName)):
            if getattr(self, name) not in get_args(names):
                given = getattr(self, name)
                raise OptionError(f"{name}={given!r} does not exist.{did_you_mean(str(given), get_args(names))}")
        self._check_values()
        self._check_belongings("policy", POLICY_OPTIONS)
        self._check_belongings("cache", CACHE_OPTIONS)
        if self.steps is not None and self.policy not in SCHEDULED:
            raise OptionError(
                f"steps={self.steps} does not belong to policy={self.policy!r}, which decides by itself how many tokens a step "
                f"commits: leave out steps, or choose one of the policies {', '.join(SCHEDULED)}."
            )
        if self.remasking not in POLICY_REMASKING[self.policy]:
            raise OptionError(
                f"remasking={self.remasking!r} does not belong to policy={self.policy!r}, which takes "
                f"{' or '.join(POLICY_REMASKING[self.policy])}; policy='fixed' takes them all."
            )
        if self.policy == "hierarchical":
            low, high = self.policy_options["low_threshold"], self.policy_options["threshold"]
            if low > high:
                raise OptionError(f"low_threshold={low} is above threshold={high}: it is the lower of the two.")
        kept = (self.cfg_keep_tokens,) if isinstance(self.cfg_keep_tokens, int) else self.cfg_keep_tokens
        object.__setattr__(self, "cfg_keep_tokens", tuple(kept))

    def _check_values(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise OptionError(f"{field.name}={value!r}: it is True or False")
            if field.name not in _RANGES or (value is None and field.default is None):
                continue
            lowest, highest, words = _RANGES[field.name]
            kind = int if "whole" in words else int | float
            number = isinstance(value, kind) and not isinstance(value, bool) and value != math.inf
            if not number or not lowest <= value <= highest:
                raise OptionError(f"{field.name}={value!r}: it is {words}")

    def _check_belongings(self, chooser: str, table: Mapping[Any, Mapping[str, Any]]) -> None:
        """Refuses a given option that is none of the chosen policy's or cache's."""
        chosen = getattr(self, chooser)
        for name in dict.fromkeys(option for options in table.values() for option in options):
            if getattr(self, name) is not None and name not in table[chosen]:
                takers = [taker for taker, options in table.items() if name in options]
                raise OptionError(
                    f"{name}={getattr(self, name)!r} does not belong to {chooser}={chosen!r}: it goes with {chooser} "
                    f"{', '.join(takers)}. Leave out {name}, or choose {'that' if len(takers) == 1 else 'one of those'}."
                )

    @property
    def policy_options(self) -> dict[str, float | int]:
        """The options of the chosen policy, defaults filled in: keyword arguments of its function."""
        return self._filled_in(POLICY_OPTIONS[self.policy])

    @property
    def cache_options(self) -> dict[str, int | None]:
        """The options of the chosen cache, defaults filled in."""
        return self._filled_in(CACHE_OPTIONS[self.cache])

    def _filled_in(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in defaults}
        return {name: default if given[name] is None else given[name] for name, default in defaults.items()}

    @classmethod
    def from_options(cls, **options: Any) -> SamplingConfig:
        """A configuration from keyword options in any of their spellings; a threshold alone chooses policy threshold.

        Raises:
            OptionError: an option that does not exist (the message names the nearest), one given twice under two
                spellings, a value out of range, or an option of another policy or cache than the chosen one.
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
        if settings.get("threshold") is not None:
            settings.setdefault("policy", "threshold")
        return cls(**settings)
