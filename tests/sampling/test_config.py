"""The settings: their ranges, their other spellings, their misspellings."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, get_args

import pytest

from dllm.errors import OptionError
from dllm.sampling.config import (
    ALIASES,
    BLOCK_OPTIONS,
    CACHE_OPTIONS,
    EARLY_ANSWER_OPTIONS,
    LENGTH_OPTIONS,
    OPTION_TABLES,
    POLICY_OPTIONS,
    POLICY_REMASKING,
    SCHEDULED,
    BlockPolicy,
    CacheName,
    EarlyAnswer,
    LengthPolicy,
    PolicyName,
    Remasking,
    SamplingConfig,
)


def test_defaults_are_those_of_the_published_sampler() -> None:
    config = SamplingConfig()
    assert (config.gen_length, config.temperature, config.cfg_scale, config.remasking) == (
        128,
        0.0,
        0.0,
        "low_confidence",
    )
    assert (config.steps, config.block_length) == (None, None)
    assert (config.policy, config.cache) == ("fixed", "none")
    assert not config.suppress_eos
    assert not config.eos_last


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_other_spellings_mean_the_same(alias: str, name: str) -> None:
    value = 7 if name in ("gen_length", "block_length") else True
    config = SamplingConfig.from_options(**{alias: value})
    assert config == SamplingConfig.from_options(**{name: value}) == SamplingConfig(**{name: value})
    assert config != SamplingConfig()


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_two_spellings_at_once_are_refused(alias: str, name: str) -> None:
    with pytest.raises(OptionError, match=f"'{name}' and another spelling of '{name}' are both given: keep one"):
        SamplingConfig.from_options(**{alias: 4, name: 4})


def test_every_field_is_an_option() -> None:
    for field in dataclasses.fields(SamplingConfig):
        assert SamplingConfig.from_options(**{field.name: field.default}) == SamplingConfig()
    assert set(ALIASES.values()) <= {field.name for field in dataclasses.fields(SamplingConfig)}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temperatur", "temperature"),
        ("block_lenght", "block_length"),
        ("max_new_token", "max_new_tokens"),
        ("cfg", "cfg_scale"),
        ("remask", "remasking"),
        ("step", "steps"),
    ],
)
def test_a_misspelt_option_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(OptionError, match=f"There is no sampling option '{wrong}'. (Did you mean '{right}'|.*{right})"):
        SamplingConfig.from_options(**{wrong: 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 0}, "gen_length=0: it is a whole number, at least 1"),
        ({"gen_length": None}, "gen_length=None: it is a whole number, at least 1"),
        ({"gen_length": 12.0}, "gen_length=12.0: it is a whole number"),
        ({"gen_length": True}, "gen_length=True: it is a whole number"),
        ({"steps": 0}, "steps=0: it is a whole number, at least 1"),
        ({"steps": "8"}, "steps='8': it is a whole number"),
        ({"block_length": -4}, "block_length=-4: it is a whole number, at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1: it is 0 or more, a finite number"),
        ({"temperature": math.nan}, "temperature=nan: it is 0 or more"),
        ({"temperature": math.inf}, "temperature=inf: it is 0 or more, a finite number"),
        ({"temperature": "0.5"}, "temperature='0.5': it is 0 or more, a finite number"),
        ({"temperature": None}, "temperature=None: it is 0 or more"),
        ({"cfg_scale": -1.0}, r"cfg_scale=-1.0: it is 0 \(off\) or more, a finite number"),
        ({"cfg_scale": math.inf}, r"cfg_scale=inf: it is 0 \(off\) or more"),
        ({"remasking": "low_confidance"}, "remasking='low_confidance' does not exist. Did you mean 'low_confidence'"),
        (
            {"remasking": None},
            "remasking=None does not exist. It can be one of: entropy, low_confidence, margin, random",
        ),
        ({"policy": "treshold"}, "policy='treshold' does not exist. Did you mean 'threshold'?"),
        ({"policy": "zzz"}, "policy='zzz' does not exist. It can be one of: entropy_bound, factor, fixed, .*wino"),
        ({"policy": []}, r"policy=\[\] does not exist"),
        (
            {"cache": "duel"},
            "cache='duel' does not exist. Did you mean 'dual'.* It can be none, prefix, dual, vicinity, delayed",
        ),
        ({"cache": None}, "cache=None does not exist. Did you mean 'none'?"),
        ({"policy": "threshold", "threshold": 1.1}, "threshold=1.1: it is a number from 0 to 1"),
        ({"policy": "threshold", "threshold": True}, "threshold=True: it is a number from 0 to 1"),
        ({"policy": "wino", "verify_threshold": -0.1}, "verify_threshold=-0.1: it is a number from 0 to 1"),
        ({"policy": "hierarchical", "low_threshold": "a"}, "low_threshold='a': it is a number from 0 to 1"),
        ({"policy": "remdm", "eta": 2}, "eta=2: it is a number from 0 to 1"),
        ({"policy": "factor", "factor": math.nan}, "factor=nan: it is 0 or more, a finite number"),
        ({"policy": "entropy_bound", "gamma": -1}, "gamma=-1: it is 0 or more, a finite number of nats"),
        ({"policy": "klass", "kl_threshold": math.inf}, "kl_threshold=inf: it is 0 or more, a finite number of nats"),
        ({"policy": "klass", "kl_steps": 1.5}, "kl_steps=1.5: it is a whole number, at least 1"),
        ({"cache": "vicinity", "vicinity": 0}, "vicinity=0: it is a whole number, at least 1"),
        ({"block_policy": "adablok"}, "block_policy='adablok' does not exist. Did you mean 'adablock'?"),
        ({"length_policy": "deadal"}, "length_policy='deadal' does not exist. Did you mean 'daedal'?"),
        ({"early_answer": "prophecy"}, "early_answer='prophecy' does not exist. Did you mean 'prophet'?"),
        ({"block_policy": "adablock", "delimiter_window": 2}, "delimiter_window=2: it is a number from 0 to 1"),
        ({"length_policy": "daedal", "expansion_factor": 1}, "expansion_factor=1: it is a whole number, at least 2"),
        ({"early_answer": "prophet", "late_gap": -1}, "late_gap=-1: it is 0 or more, a finite number of logits"),
        ({"cache": "dual", "cache_refresh": 0}, "cache_refresh=0: it is a whole number, at least 1"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SamplingConfig(**settings)
    with pytest.raises(OptionError, match=message):
        SamplingConfig.from_options(**settings)


def test_settings_are_frozen_and_keep_their_own_tokens() -> None:
    kept = [3, 4]
    config = SamplingConfig(cfg_scale=1.0, cfg_keep_tokens=kept)  # type: ignore[arg-type]
    kept.append(5)
    assert config.cfg_keep_tokens == (3, 4)
    assert hash(config) == hash(SamplingConfig(cfg_scale=1.0, cfg_keep_tokens=(3, 4)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "a", "seed='a': it is a whole number"),
        ("seed", None, "seed=None: it is a whole number"),
        ("suppress_eos", "no", "suppress_eos='no': it is True or False"),
        ("eos_last", 1, "eos_last=1: it is True or False"),
        ("early_stop", None, "early_stop=None: it is True or False"),
        ("cfg_keep_tokens", "ab", "cfg_keep_tokens='ab': it is token ids"),
        ("cfg_keep_tokens", (3, -7), r"cfg_keep_tokens=\(3, -7\): it is token ids, whole numbers from 0 on"),
        ("cfg_keep_tokens", 3, r"cfg_keep_tokens=\(3,\) belongs to guidance, which is off: give a cfg_scale above 0"),
        ("delimiters", ("\n",), "delimiters=.* it is token ids"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SamplingConfig.from_options(**{name: value})


def test_one_token_to_keep_needs_no_list() -> None:
    assert SamplingConfig(cfg_scale=1.0, cfg_keep_tokens=5).cfg_keep_tokens == (5,)  # type: ignore[arg-type]


# --- what belongs to which policy and cache

EXAMPLES: dict[str, Any] = {
    "threshold": 0.96,
    "factor": 2.0,
    "gamma": 0.5,
    "kl_threshold": 0.01,
    "kl_steps": 3,
    "verify_threshold": 0.8,
    "low_threshold": 0.4,
    "eta": 0.2,
    "vicinity": 4,
    "cache_refresh": 2,
    "delimiters": (13, 198),
    "delimiter_threshold": 0.4,
    "delimiter_window": 0.5,
    "initial_length": 32,
    "expansion_factor": 4,
    "eos_window": 16,
    "eos_threshold": 0.6,
    "expand_threshold": 0.2,
    "expand_eos_threshold": 0.8,
    "early_gap": 8.0,
    "middle_gap": 4.0,
    "late_gap": 2.0,
}
FILLED_IN = {
    "policy": "policy_options",
    "cache": "cache_options",
    "block_policy": "block_options",
    "length_policy": "length_options",
    "early_answer": "early_answer_options",
}
PAIRS = [
    (chooser, chosen, name)
    for chooser, table in OPTION_TABLES.items()
    for chosen in table
    for name in EXAMPLES
    if any(name in options for options in table.values())
]


def test_the_tables_name_what_there_is() -> None:
    assert tuple(POLICY_OPTIONS) == tuple(POLICY_REMASKING) == get_args(PolicyName)
    assert tuple(CACHE_OPTIONS) == get_args(CacheName)
    assert {name for table in OPTION_TABLES.values() for options in table.values() for name in options} == set(EXAMPLES)
    fields = {field.name: field.default for field in dataclasses.fields(SamplingConfig)}
    assert {fields[name] for name in EXAMPLES} == {None, ()}
    names = {"block_policy": BlockPolicy, "length_policy": LengthPolicy, "early_answer": EarlyAnswer}
    assert {chooser: tuple(OPTION_TABLES[chooser]) for chooser in names} == {k: get_args(v) for k, v in names.items()}
    assert (BLOCK_OPTIONS["fixed"], LENGTH_OPTIONS["fixed"], EARLY_ANSWER_OPTIONS["none"]) == ({}, {}, {})


@pytest.mark.parametrize(("chooser", "chosen", "name"), PAIRS)
def test_an_option_goes_with_its_policy_or_cache_alone(chooser: str, chosen: str, name: str) -> None:
    table, settings = OPTION_TABLES[chooser], {chooser: chosen, name: EXAMPLES[name]}
    if name in table[chosen]:
        config = SamplingConfig(**settings)
        filled_in = getattr(config, FILLED_IN[chooser])
        assert filled_in == {**table[chosen], name: EXAMPLES[name]}
        assert SamplingConfig.from_options(**settings) == config
        return
    takers = ", ".join(taker for taker, options in table.items() if name in options)
    given = re.escape(f"{name}={EXAMPLES[name]}")
    message = f"{given} does not belong to {chooser}='{chosen}': it goes with {chooser} {takers}. Leave"
    with pytest.raises(OptionError, match=message):
        SamplingConfig(**settings)
    with pytest.raises(OptionError, match=message):
        SamplingConfig.from_options(**settings)


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_defaults_of_a_policy_are_within_the_allowed_values(policy: Any) -> None:
    defaults = SamplingConfig(policy=policy).policy_options
    assert defaults == POLICY_OPTIONS[policy]
    assert SamplingConfig(policy=policy, **defaults).policy_options == defaults


def test_a_threshold_alone_chooses_the_policy() -> None:
    assert SamplingConfig.from_options(threshold=0.8) == SamplingConfig(policy="threshold", threshold=0.8)
    assert SamplingConfig.from_options(threshold=None) == SamplingConfig()
    assert SamplingConfig.from_options(policy="wino", threshold=0.8).policy == "wino"
    with pytest.raises(OptionError, match=r"threshold=0\.8 does not belong to policy='fixed'"):
        SamplingConfig.from_options(policy="fixed", threshold=0.8)


def test_a_threshold_of_zero_is_not_a_missing_one() -> None:
    assert SamplingConfig.from_options(threshold=0).policy_options == {"threshold": 0}


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_steps_go_with_a_schedule(policy: Any) -> None:
    if policy in SCHEDULED:
        assert SamplingConfig(policy=policy, steps=4).steps == 4
        return
    message = (
        f"steps=4 does not belong to policy='{policy}', which decides by itself .*one of the policies fixed, remdm"
    )
    with pytest.raises(OptionError, match=message):
        SamplingConfig(policy=policy, steps=4)


@pytest.mark.parametrize("policy", get_args(PolicyName))
@pytest.mark.parametrize("remasking", get_args(Remasking))
def test_a_policy_takes_the_measures_of_confidence_that_it_can_use(policy: Any, remasking: Any) -> None:
    if remasking in POLICY_REMASKING[policy]:
        assert SamplingConfig(policy=policy, remasking=remasking).remasking == remasking
        return
    message = f"remasking='{remasking}' does not belong to policy='{policy}', which takes low_confidence"
    with pytest.raises(OptionError, match=message):
        SamplingConfig(policy=policy, remasking=remasking)


def test_the_lower_threshold_is_the_lower_one() -> None:
    assert SamplingConfig(policy="hierarchical", low_threshold=0.92)
    for settings in ({"low_threshold": 0.95}, {"threshold": 0.4}, {"low_threshold": 0.8, "threshold": 0.7}):
        with pytest.raises(
            OptionError, match=r"low_threshold=0\.\d+ is above threshold=0\.\d+: it is the lower of the two"
        ):
            SamplingConfig(policy="hierarchical", **settings)


def test_a_changed_copy_is_checked_again() -> None:
    config = SamplingConfig(policy="wino", threshold=0.5)
    assert dataclasses.replace(config, verify_threshold=0.6).policy_options == {
        "threshold": 0.5,
        "verify_threshold": 0.6,
    }
    with pytest.raises(OptionError, match=r"threshold=0\.5 does not belong to policy='factor'"):
        dataclasses.replace(config, policy="factor")


@pytest.mark.parametrize("settings", [{"block_policy": "adablock"}, {"length_policy": "daedal"}])
def test_steps_are_shared_among_what_is_known_beforehand(settings: dict[str, Any]) -> None:
    assert SamplingConfig(**settings).steps is None
    ((name, chosen),) = settings.items()
    with pytest.raises(OptionError, match=f"steps=4 does not belong to {name}='{chosen}': how many masks .* Leave out"):
        SamplingConfig(steps=4, **settings)


def test_an_answer_begins_shorter_than_it_may_become() -> None:
    assert SamplingConfig(length_policy="daedal", gen_length=64).length_options["initial_length"] == 64
    with pytest.raises(
        OptionError, match=r"initial_length=64 exceeds gen_length=63, .* lower the one or raise the other"
    ):
        SamplingConfig(length_policy="daedal", gen_length=63, initial_length=64)
    assert SamplingConfig(length_policy="daedal", gen_length=63).length_options["initial_length"] == 63


def test_an_answer_that_waits_for_its_end_may_propose_it() -> None:
    with pytest.raises(
        OptionError, match="suppress_eos=True does not belong to length_policy='daedal', which asks how sure"
    ):
        SamplingConfig(length_policy="daedal", suppress_eos=True)


def test_delimiters_may_be_one() -> None:
    config = SamplingConfig(block_policy="adablock", delimiters=198)  # type: ignore[arg-type]
    assert config.block_options["delimiters"] == (198,)
