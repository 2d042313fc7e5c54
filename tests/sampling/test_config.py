"""The settings: their ranges, their other spellings, their misspellings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from dllm.errors import OptionError
from dllm.sampling.config import ALIASES, SamplingConfig


def test_defaults_are_those_of_the_published_sampler() -> None:
    config = SamplingConfig()
    assert (config.gen_length, config.temperature, config.cfg_scale, config.remasking) == (
        128,
        0.0,
        0.0,
        "low_confidence",
    )
    assert (config.steps, config.block_length) == (None, None)
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
        ({"remasking": None}, "remasking='?None'? does not exist. It can be one of: low_confidence, random"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SamplingConfig(**settings)
    with pytest.raises(OptionError, match=message):
        SamplingConfig.from_options(**settings)


def test_settings_are_frozen_and_keep_their_own_tokens() -> None:
    kept = [3, 4]
    config = SamplingConfig(cfg_keep_tokens=kept)  # type: ignore[arg-type]
    kept.append(5)
    assert config.cfg_keep_tokens == (3, 4)
    assert hash(config) == hash(SamplingConfig(cfg_keep_tokens=(3, 4)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "a", "seed='a': it is a whole number"),
        ("seed", None, "seed=None: it is a whole number"),
        ("suppress_eos", "no", "suppress_eos='no': it is True or False"),
        ("eos_last", 1, "eos_last=1: it is True or False"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SamplingConfig.from_options(**{name: value})


def test_one_token_to_keep_needs_no_list() -> None:
    assert SamplingConfig(cfg_keep_tokens=5).cfg_keep_tokens == (5,)  # type: ignore[arg-type]
