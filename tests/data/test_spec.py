"""The grammar of --dataset_args: what is written is what is read, and what cannot be read is named."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.data.spec import SourceSpec, parse_dataset_args
from dllm.errors import DataError

# anything but brackets, and no " + " or blank end that would be another source
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="[]|", categories=["L", "N", "P", "S"]), min_size=1
).filter(lambda name: name != "+")
WORDS = st.none() | st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="-_./:"), min_size=1)
COUNTS = st.none() | st.integers(0, 10**12)
SPECS = st.builds(
    SourceSpec,
    name=NAMES,
    train=st.none() | st.integers(1, 10**12),
    test=COUNTS,
    config=WORDS,
    split=WORDS,
    test_split=WORDS,
    revision=WORDS,
    streaming=st.booleans(),
)
WEIGHTS = st.floats(1e-6, 1e6)


def written(spec: SourceSpec, underscores: bool, blank: str) -> str:
    keys = {"train": spec.train, "test": spec.test, "name": spec.config, "split": spec.split}
    keys |= {"test_split": spec.test_split, "revision": spec.revision, "weight": spec.weight}
    keys |= {"streaming": "true" if spec.streaming else None}
    items = [
        f"{key}:{blank}{value:_}" if underscores and isinstance(value, int) else f"{key}:{blank}{value}"
        for key, value in keys.items()
        if value is not None
    ]
    return spec.name + (f"{blank}[{blank}{f',{blank}'.join(items)}{blank}]" if items else "")


@given(
    st.lists(SPECS, min_size=1, max_size=4),
    st.none() | st.lists(WEIGHTS, min_size=4, max_size=4),
    st.booleans(),
    st.sampled_from(["", " "]),
    st.sampled_from([" + ", " | ", "|"]),
)
def test_what_is_written_is_what_is_read(
    specs: list[SourceSpec], weights: list[float] | None, underscores: bool, blank: str, joint: str
) -> None:
    if weights is not None:
        specs = [replace(spec, weight=float(f"{w:.6f}")) for spec, w in zip(specs, weights, strict=False)]
    assert parse_dataset_args("  " + joint.join(written(spec, underscores, blank) for spec in specs) + " ") == specs


def test_limits_come_in_either_order() -> None:
    assert parse_dataset_args("a/b-1.0[test:10_000,train:10_000_000]") == [
        SourceSpec(name="a/b-1.0", train=10_000_000, test=10_000)
    ]


def test_every_key_and_both_joints() -> None:
    text = "a/b[name:cfg,split:train_sft,test_split:test_sft,revision:v1.0,weight:3] + c.csv[weight:.5]|d[weight:1e-3]"
    assert parse_dataset_args(text) == [
        SourceSpec(name="a/b", config="cfg", split="train_sft", test_split="test_sft", revision="v1.0", weight=3.0),
        SourceSpec(name="c.csv", weight=0.5),
        SourceSpec(name="d", weight=0.001),
    ]
    assert parse_dataset_args("a[train:1]+b") == parse_dataset_args("a[train:1] | b")


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
        ("a[tain:5]", "dataset_args 'a[tain:5]': there is no key 'tain'. Did you mean 'train'?"),
        ("a[validation:5]", "there is no key 'validation'. It can be one of: name, revision, split, streaming, t"),
        ("a[train]", "'train' gives no whole number of rows: write it as  name[train:10000,test:1000]."),
        ("a[train:]", "'train:' gives no whole number"),
        ("a[train:-1]", "'train:-1' gives no whole number"),
        ("a[train:1.5]", "'train:1.5' gives no whole number"),
        ("a[train:1e6]", "'train:1e6' gives no whole number"),
        ("a[train:1__0]", "'train:1__0' gives no whole number"),
        ("a[train:10_]", "'train:10_' gives no whole number"),
        ("a[train:٣]", "'train:٣' gives no whole number"),
        ("a[train:5,train:6]", "dataset_args 'a[train:5,train:6]': train is given twice."),
        ("a[wieght:1]", "there is no key 'wieght'. Did you mean 'weight'?"),
        ("a[weight:0]", "'weight:0' gives no number above 0, such as weight:0.3."),
        ("a[weight:-1]", "'weight:-1' gives no number above 0"),
        ("a[weight:nan]", "'weight:nan' gives no number above 0"),
        (
            "a[weight:1] | b",
            "dataset_args 'a[weight:1] | b': b has no weight, and others have. Give all sources one, or",
        ),
        ("a[streaming:yes]", "'streaming:yes': write streaming:true or streaming:false."),
        ("a[name:]", "'name:' says no name: write  name:NAME."),
        ("a[name]", "'name' says no name: write  name:NAME."),
        ("a || b", "dataset_args '' cannot be read"),
        ("a[train:0]", "dataset_args 'a[train:0]' asks for no row to train on: raise train:0."),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        parse_dataset_args(text)


@given(st.text(alphabet="a[]:,|+_. 0159trainesxwghm", max_size=30))
def test_any_text_is_read_or_refused_with_our_error(text: str) -> None:
    with contextlib.suppress(DataError):
        assert all(spec.name and spec.train != 0 for spec in parse_dataset_args(text))
