"""Options from a settings dataclass: nothing of it is left out, and nothing is guessed."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.cli.options import Parser, add_settings, attribute_docstrings, given_settings
from dllm.errors import OptionError
from dllm.sampling.config import (
    ALIASES,
    OPTION_TABLES,
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

FIELDS = [field.name for field in dataclasses.fields(SamplingConfig)]
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "gen_length": st.integers(64, 10**6),
    "steps": st.integers(1, 10**6),
    "block_length": st.integers(1, 10**6),
    "temperature": st.floats(0, 10),
    "remasking": st.sampled_from(get_args(Remasking)),
    "policy": st.sampled_from(get_args(PolicyName)),
    "threshold": st.floats(0.5, 1),
    "low_threshold": st.floats(0, 0.5),
    "verify_threshold": st.floats(0, 1),
    "factor": st.floats(0, 10),
    "gamma": st.floats(0, 10),
    "kl_threshold": st.floats(0, 10),
    "kl_steps": st.integers(1, 10),
    "eta": st.floats(0, 1),
    "cache": st.sampled_from(get_args(CacheName)),
    "vicinity": st.integers(1, 100),
    "cache_refresh": st.integers(1, 100),
    "block_policy": st.sampled_from(get_args(BlockPolicy)),
    "delimiters": st.lists(st.integers(0, 10**6), min_size=1, max_size=5).map(tuple),
    "delimiter_threshold": st.floats(0, 1),
    "delimiter_window": st.floats(0, 1),
    "length_policy": st.sampled_from(get_args(LengthPolicy)),
    "initial_length": st.integers(1, 8),
    "expansion_factor": st.integers(2, 100),
    "eos_window": st.integers(1, 100),
    "eos_threshold": st.floats(0, 1),
    "expand_threshold": st.floats(0, 1),
    "expand_eos_threshold": st.floats(0, 1),
    "early_answer": st.sampled_from(get_args(EarlyAnswer)),
    "early_gap": st.floats(0, 10),
    "middle_gap": st.floats(0, 10),
    "late_gap": st.floats(0, 10),
    "early_stop": st.booleans(),
    "cfg_scale": st.floats(0, 10),
    "cfg_keep_tokens": st.lists(st.integers(0, 10**6), min_size=1, max_size=5).map(tuple),
    "suppress_eos": st.booleans(),
    "eos_last": st.booleans(),
    "seed": st.integers(0, 2**31),
}


def belonging(settings: dict[str, Any]) -> dict[str, Any]:
    """Less what does not belong to the policy, the cache and so on among them."""
    config = SamplingConfig(**{name: settings[name] for name in OPTION_TABLES if name in settings})
    own = {option for chooser, table in OPTION_TABLES.items() for option in table[getattr(config, chooser)]}
    strangers = {option for table in OPTION_TABLES.values() for options in table.values() for option in options} - own
    if config.policy not in SCHEDULED or (config.block_policy, config.length_policy) != ("fixed", "fixed"):
        strangers.add("steps")
    if settings.get("remasking") not in POLICY_REMASKING[config.policy]:
        strangers.add("remasking")
    if config.length_policy == "daedal":
        strangers.add("suppress_eos")
    if not settings.get("cfg_scale"):
        strangers.add("cfg_keep_tokens")
    return {name: value for name, value in settings.items() if name not in strangers}


def sampling_parser() -> Parser:
    parser = Parser(prog="this")
    add_settings(parser, SamplingConfig, ALIASES)
    return parser


def words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]


def read(arguments: list[str]) -> dict[str, Any]:
    return given_settings(sampling_parser().parse_args(arguments), SamplingConfig)


def test_every_field_is_an_option_and_its_docstring_the_help() -> None:
    shown = " ".join(sampling_parser().format_help().split())
    docstrings = attribute_docstrings(SamplingConfig)
    assert set(docstrings) == set(FIELDS) == set(VALUES)
    for name in FIELDS:
        assert f"--{name}" in shown
        assert len(docstrings[name]) > 20
        # argparse may break a line after a hyphen
        assert docstrings[name].replace(" ", "").replace("%%", "%") in shown.replace(" ", "")


@given(st.fixed_dictionaries({}, optional=VALUES).map(belonging))
def test_what_is_given_comes_out_and_nothing_else(settings: dict[str, Any]) -> None:
    found = read([word for name, value in settings.items() for word in words(name, value)])
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    assert found == settings
    assert SamplingConfig.from_options(**found) == SamplingConfig(**settings)


@pytest.mark.parametrize(("alias", "field"), list(ALIASES.items()))
def test_other_spellings_set_the_same_field(alias: str, field: str) -> None:
    value = True if typing.get_type_hints(SamplingConfig)[field] is bool else 7
    assert read(words(alias, value)) == read(words(field, value)) == {field: value}


@pytest.mark.parametrize("name", FIELDS)
def test_prefixes_are_not_guessed(name: str) -> None:
    with pytest.raises(OptionError, match=rf"There is no option '--{name[:-1]}'\. Did you mean '--{name}'\?"):
        read([f"--{name[:-1]}", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "many"], r"argument --steps: invalid int value: 'many'\. See  this --help"),
        (["--remasking", "high"], r"--remasking 'high' does not exist\. It can be one of: .*low_confidence"),
        (
            ["--policy", "treshold"],
            r"--policy 'treshold' does not exist\. Did you mean 'threshold'\? It can be fixed, ",
        ),
        (["--cache", "duel"], r"--cache 'duel' does not exist\. Did you mean 'dual'\?"),
        (["--seed", "1", "--seed", "1"], "--seed is given twice: keep one"),
        (["--seed", "1", "--seed=1"], "--seed is given twice: keep one"),
        (["--gen_length", "8", "--max_tokens", "8"], "--gen_length and --max_tokens are one option: keep one"),
        (["--early_stop", "--no-early_stop"], "--early_stop and --no-early_stop are one option: keep one"),
        (["--temperature"], "argument --temperature: expected one argument"),
        (["word"], "Nothing is known of 'word'"),
        (["-q"], "There is no option '-q'"),
        (["--zzzz=red"], "There is no option '--zzzz=red'. It can be one of: .*--temperature"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(arguments)


@dataclass
class Sample:
    """Not the docstring of a field."""

    plain: int = 1
    """Said in
    two lines, 100 %."""
    silent: int = 2
    last: str = "a"
    """The last."""


def test_docstrings_are_read_from_the_source() -> None:
    assert attribute_docstrings(Sample) == {"plain": "Said in two lines, 100 %%.", "last": "The last."}
