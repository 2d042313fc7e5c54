"""Settings of the rules of lengths at which random networks do something: they are seldom as sure as the defaults ask."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from dllm.sampling.config import OPTION_TABLES

RULES = {"block_policy": "adablock", "length_policy": "daedal", "early_answer": "prophet"}
LEVELS: dict[str, list[Any]] = {
    "delimiters": [()],
    "delimiter_threshold": [0.05, 0.3, 0.6],
    "delimiter_window": [0.0, 0.3, 1.0],
    "initial_length": [1, 3, 8],
    "expansion_factor": [2, 3, 5],
    "eos_window": [1, 3, 40],
    "eos_threshold": [0.05, 0.15, 0.4],
    "expand_threshold": [0.2, 0.5, 1.0],
    "expand_eos_threshold": [0.2, 0.5, 1.0],
    "early_gap": [1.0, 2.0, 3.0],
    "middle_gap": [1.0, 2.0],
    "late_gap": [0.5, 1.0],
}


@st.composite
def length_options(draw: Any, choosers: Any = None) -> dict[str, Any]:
    """The named rules, or some of them, with their options and a `gen_length` that fits them."""
    if choosers is None:
        choosers = draw(st.lists(st.sampled_from(list(RULES)), min_size=1, max_size=3, unique=True))
    options: dict[str, Any] = {"gen_length": draw(st.integers(8, 14))}
    for chooser in choosers:
        options[chooser] = RULES[chooser]
        for name in OPTION_TABLES[chooser][RULES[chooser]]:
            options[name] = draw(st.sampled_from(LEVELS[name]))
    return options
