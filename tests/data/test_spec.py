"""The grammar of --dataset_args: what is written is what is read, and what cannot be read is named."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.data.spec import SourceSpec, parse_dataset_args
from dllm.errors import DataError

# anything but brackets, and no " + " or blank end that would be another source
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="[]", categories=["L", "N", "P", "S"]), min_size=1
).filter(lambda name: name != "+")
SPECS = st.builds(
    SourceSpec,
    name=NAMES,
    train=st.none() | st.integers(1, 10**12),
    test=st.none() | st.integers(0, 10**12),
)


def written(spec: SourceSpec, underscores: bool, blank: str) -> str:
    counts = {"train": spec.train, "test": spec.test}
    limits = [f"{name}:{blank}{n:_}" if underscores else f"{name}:{n}" for name, n in counts.items() if n is not None]
    return spec.name + (f"{blank}[{blank}{f',{blank}'.join(limits)}{blank}]" if limits else "")


@given(st.lists(SPECS, min_size=1, max_size=4), st.booleans(), st.sampled_from(["", " "]))
def test_what_is_written_is_what_is_read(specs: list[SourceSpec], underscores: bool, blank: str) -> None:
    assert parse_dataset_args("  " + " + ".join(written(spec, underscores, blank) for spec in specs) + " ") == specs


def test_limits_come_in_either_order() -> None:
    assert parse_dataset_args("a/b-1.0[test:10_000,train:10_000_000]") == [
        SourceSpec(name="a/b-1.0", train=10_000_000, test=10_000)
    ]


def test_a_plus_without_blanks_belongs_to_a_name() -> None:
    assert [spec.name for spec in parse_dataset_args("c++.jsonl + d+e.txt[train:1]")] == ["c++.jsonl", "d+e.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "dataset_args '' cannot be read: write it as  name[train:10000,test:1000]."),
        ("[train:5]", "dataset_args '[train:5]' cannot be read"),
        ("a[train:5", "dataset_args 'a[train:5' cannot be read"),
        ("a[train:5]b", "dataset_args 'a[train:5]b' cannot be read"),
        ("a[train:5][test:5]", "dataset_args 'a[train:5][test:5]' cannot be read"),
        ("a + ", "dataset_args '' cannot be read"),
        ("+ a", "dataset_args '' cannot be read"),
        ("a +  + b", "dataset_args '' cannot be read"),
        ("a[tain:5]", "dataset_args 'a[tain:5]': there is no split 'tain'. Did you mean 'train'?"),
        ("a[validation:5]", "there is no split 'validation'. It can be one of: test, train."),
        ("a[train]", "'train' gives no whole number of rows: write it as  name[train:10000,test:1000]."),
        ("a[train:]", "'train:' gives no whole number"),
        ("a[train:-1]", "'train:-1' gives no whole number"),
        ("a[train:1.5]", "'train:1.5' gives no whole number"),
        ("a[train:1e6]", "'train:1e6' gives no whole number"),
        ("a[train:1__0]", "'train:1__0' gives no whole number"),
        ("a[train:10_]", "'train:10_' gives no whole number"),
        ("a[train:٣]", "'train:٣' gives no whole number"),
        ("a[train:5,train:6]", "dataset_args 'a[train:5,train:6]': train is given twice."),
        ("a[train:0]", "dataset_args 'a[train:0]' asks for no row to train on: raise train:0."),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        parse_dataset_args(text)


@given(st.text(alphabet="a[]:,+_ 0159trainesx", max_size=30))
def test_any_text_is_read_or_refused_with_our_error(text: str) -> None:
    with contextlib.suppress(DataError):
        assert all(spec.name and spec.train != 0 for spec in parse_dataset_args(text))
