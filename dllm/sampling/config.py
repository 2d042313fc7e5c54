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
BlockPolicy = Literal["fixed", "adablock"]
LengthPolicy = Literal["fixed", "daedal"]
EarlyAnswer = Literal["none", "prophet"]

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

BLOCK_OPTIONS: dict[BlockPolicy, dict[str, Any]] = {
    "fixed": {},
    "adablock": {"delimiters": (), "delimiter_threshold": 0.3, "delimiter_window": 0.25},
}
"""The options of each rule of where a block ends, and their defaults; no delimiters are the tokenizer's line break."""

LENGTH_OPTIONS: dict[LengthPolicy, dict[str, float | int]] = {
    "fixed": {},
    "daedal": {
        "initial_length": 64,
        "expansion_factor": 8,
        "eos_window": 32,
        "eos_threshold": 0.5,
        "expand_threshold": 0.1,
        "expand_eos_threshold": 0.9,
    },
}
"""The options of each rule of how long an answer is, and their defaults."""

EARLY_ANSWER_OPTIONS: dict[EarlyAnswer, dict[str, float]] = {
    "none": {},
    "prophet": {"early_gap": 7.5, "middle_gap": 5.0, "late_gap": 2.5},
}
"""The options of each rule of when a whole answer is committed, and their defaults."""

_COUNT = (1, math.inf, "a whole number, at least 1")
_FRACTION = (0, 1, "a number from 0 to 1")
_NAMES: dict[str, Any] = {
    "remasking": Remasking,
    "policy": PolicyName,
    "cache": CacheName,
    "block_policy": BlockPolicy,
    "length_policy": LengthPolicy,
    "early_answer": EarlyAnswer,
}
OPTION_TABLES: dict[str, Mapping[Any, Mapping[str, Any]]] = {
    "policy": POLICY_OPTIONS,
    "cache": CACHE_OPTIONS,
    "block_policy": BLOCK_OPTIONS,
    "length_policy": LENGTH_OPTIONS,
    "early_answer": EARLY_ANSWER_OPTIONS,
}
"""Which setting chooses among which options."""

_GAP = (0, math.inf, "0 or more, a finite number of logits")
_RANGES: dict[str, tuple[float, float, str]] = {
    "gen_length": _COUNT,
    "steps": _COUNT,
    "block_length": _COUNT,
    "kl_steps": _COUNT,
    "vicinity": _COUNT,
    "cache_refresh": _COUNT,
    "initial_length": _COUNT,
    "expansion_factor": (2, math.inf, "a whole number, at least 2"),
    "eos_window": _COUNT,
    "seed": (-math.inf, math.inf, "a whole number"),
    # an infinite temperature would make NaN of suppressed tokens, an infinite guidance of equal logits
    "temperature": (0, math.inf, "0 or more, a finite number"),
    "cfg_scale": (0, math.inf, "0 (off) or more, a finite number"),
    "threshold": _FRACTION,
    "low_threshold": _FRACTION,
    "verify_threshold": _FRACTION,
    "eta": _FRACTION,
    "delimiter_threshold": _FRACTION,
    "delimiter_window": _FRACTION,
    "eos_threshold": _FRACTION,
    "expand_threshold": _FRACTION,
    "expand_eos_threshold": _FRACTION,
    "early_gap": _GAP,
    "middle_gap": _GAP,
    "late_gap": _GAP,
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
    block_policy: BlockPolicy = "fixed"
    """Where a block ends: after block_length masks (fixed), or after the surest delimiter of those ahead (adablock)."""
    delimiters: tuple[int, ...] = ()
    """Block policy adablock: ids of the tokens that may end a block; by default the tokenizer's line break."""
    delimiter_threshold: float | None = None
    """Block policy adablock: how sure a delimiter has to be (default 0.3); if none is, a block has block_length masks."""
    delimiter_window: float | None = None
    """Block policy adablock: how far it looks ahead, as a fraction of gen_length (default 0.25)."""
    length_policy: LengthPolicy = "fixed"
    """How long an answer is: gen_length (fixed), or as long as it turns out to be, up to gen_length (daedal)."""
    initial_length: int | None = None
    """Length policy daedal: masks to begin with (default 64)."""
    expansion_factor: int | None = None
    """Length policy daedal: masks that are added at the end at a time, and that an unsure mask becomes (default 8)."""
    eos_window: int | None = None
    """Length policy daedal: how many of the last places say whether the text has ended (default 32)."""
    eos_threshold: float | None = None
    """Length policy daedal: before the first step masks are added until their mean probability of end-of-text is this
    (default 0.5)."""
    expand_threshold: float | None = None
    """Length policy daedal: the least sure mask becomes several if its confidence is below this (default 0.1)."""
    expand_eos_threshold: float | None = None
    """Length policy daedal: no mask becomes several once the mean probability of end-of-text is this (default 0.9)."""
    early_answer: EarlyAnswer = "none"
    """Whether a whole answer is committed at once when it is known: never (none), or when the best logits are far above the
    second best (prophet)."""
    early_gap: float | None = None
    """Early answer prophet: how far, on the mean, while less than a third of the masks is committed (default 7.5)."""
    middle_gap: float | None = None
    """Early answer prophet: how far while less than two thirds are (default 5)."""
    late_gap: float | None = None
    """Early answer prophet: how far from then on (default 2.5)."""
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

    @property
    def exact(self) -> bool:
        """Whether every step computes everything; a cache is an approximation, unless it is refreshed at every step."""
        return self.cache == "none" or self.cache_options["cache_refresh"] == 1

    def __post_init__(self) -> None:
        for name in ("cfg_keep_tokens", "delimiters"):
            tokens = getattr(self, name)
            tokens = (tokens,) if isinstance(tokens, int) else tokens
            if isinstance(tokens, str) or not all(isinstance(token, int) and token >= 0 for token in tokens or ()):
                raise OptionError(f"{name}={tokens!r}: it is token ids, whole numbers from 0 on")
            object.__setattr__(self, name, tuple(tokens or ()))
        for name, names in _NAMES.items():
            if getattr(self, name) not in get_args(names):
                given = getattr(self, name)
                nearest = did_you_mean(str(given), get_args(names))
                others = f" It can be {', '.join(get_args(names))}." if "mean" in nearest else ""
                raise OptionError(f"{name}={given!r} does not exist.{nearest}{others}")
        self._check_values()
        for chooser, table in OPTION_TABLES.items():
            self._check_belongings(chooser, table)
        if self.steps is not None and (self.block_policy, self.length_policy) != ("fixed", "fixed"):
            chooser = "length_policy" if self.block_policy == "fixed" else "block_policy"
            raise OptionError(
                f"steps={self.steps} does not belong to {chooser}={getattr(self, chooser)!r}: how many masks the steps would "
                f"be shared among is not known beforehand. Leave out steps, or {chooser}."
            )
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
        if self.length_policy == "daedal" and self.length_options["initial_length"] > self.gen_length:
            raise OptionError(
                f"initial_length={self.length_options['initial_length']} exceeds gen_length={self.gen_length}, which is the "
                f"longest that length_policy='daedal' lets an answer grow: lower the one or raise the other."
            )
        if self.length_policy == "daedal" and self.suppress_eos:
            raise OptionError(
                "suppress_eos=True does not belong to length_policy='daedal', which asks how sure the model is of "
                "end-of-text: leave out one of the two."
            )
        if self.cfg_keep_tokens and not self.cfg_scale:
            raise OptionError(
                f"cfg_keep_tokens={self.cfg_keep_tokens} belongs to guidance, which is off: give a cfg_scale above 0, or leave "
                f"it out."
            )
        if self.policy == "hierarchical":
            low, high = self.policy_options["low_threshold"], self.policy_options["threshold"]
            if low > high:
                raise OptionError(f"low_threshold={low} is above threshold={high}: it is the lower of the two.")

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
            if getattr(self, name) not in (None, ()) and name not in table[chosen]:
                takers = [taker for taker, options in table.items() if name in options]
                raise OptionError(
                    f"{name}={getattr(self, name)!r} does not belong to {chooser}={chosen!r}: it goes with {chooser} "
                    f"{', '.join(takers)}. Leave out {name}, or choose {'that' if len(takers) == 1 else 'one of those'}."
                )

    @property
    def branches(self) -> int:
        """Rows that a request takes in a forward, and forwards that its step counts: 2 with guidance."""
        return 2 if self.cfg_scale > 0 else 1

    @property
    def policy_options(self) -> dict[str, float | int]:
        """The options of the chosen policy, defaults filled in: keyword arguments of its function."""
        return self._filled_in(POLICY_OPTIONS[self.policy])

    @property
    def cache_options(self) -> dict[str, int | None]:
        """The options of the chosen cache, defaults filled in."""
        return self._filled_in(CACHE_OPTIONS[self.cache])

    @property
    def block_options(self) -> dict[str, Any]:
        """The options of the chosen block policy, defaults filled in."""
        return self._filled_in(BLOCK_OPTIONS[self.block_policy])

    @property
    def length_options(self) -> dict[str, float | int]:
        """The options of the chosen length policy, defaults filled in."""
        filled = self._filled_in(LENGTH_OPTIONS[self.length_policy])
        if self.initial_length is None and "initial_length" in filled:  # a short answer begins whole
            filled["initial_length"] = min(filled["initial_length"], self.gen_length)
        return filled

    @property
    def early_answer_options(self) -> dict[str, float]:
        """The options of the chosen rule of early answers, defaults filled in."""
        return self._filled_in(EARLY_ANSWER_OPTIONS[self.early_answer])

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
