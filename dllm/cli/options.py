"""Command-line options from a settings dataclass: its fields are the options, their docstrings the help."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from dllm.errors import OptionError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse whose unknown options name the nearest right one, and which never guesses from a prefix."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}. See  {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name, choices = (
                "/".join(action.option_strings[:1]) or action.dest,
                [str(choice) for choice in action.choices],
            )
            near = did_you_mean(str(value), choices)
            others = f" It can be {', '.join(choices)}." if "mean" in near else ""
            raise OptionError(f"{name} {value!r} does not exist.{near}{others}")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._refuse_twice(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("-"):
                known = [name for action in self._actions for name in action.option_strings]
                raise OptionError(f"There is no option {word!r}.{did_you_mean(word.split('=')[0], known)}")
        if unknown:
            raise OptionError(f"Nothing is known of {unknown[0]!r}. See  {self.prog} --help")
        return parsed

    def _refuse_twice(self, words: Sequence[str]) -> None:
        """An option that is given again would silently take the place of the first."""
        seen: dict[str, str] = {}
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            action = self._option_string_actions.get(name)
            if action is None or not name.startswith("--"):
                continue
            if action.dest in seen:
                other = seen[action.dest]
                both = f"{name} is given twice" if other == name else f"{other} and {name} are one option"
                raise OptionError(f"{both}: keep one.")
            seen[action.dest] = name


def add_settings(parser: argparse.ArgumentParser, settings: type, aliases: Mapping[str, str]) -> None:
    """Adds an option for every field; what the user leaves out is left out of the namespace.

    Args:
        parser: receives a group of options.
        settings: a dataclass with attribute docstrings.
        aliases: other spelling -> field.
    """
    group = parser.add_argument_group("sampling")
    helps, types = attribute_docstrings(settings), typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        names = [f"--{field.name}", *(f"--{other}" for other, target in aliases.items() if target == field.name)]
        kind = types[field.name]
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": helps[field.name]}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": "ID"}
        else:
            inner = [part for part in typing.get_args(kind) or (kind,) if part is not type(None)]
            options |= {"type": inner[0], "metavar": "N" if inner[0] is int else "X"}
        group.add_argument(*names, **options)


def given_settings(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The settings that the user gave, as keyword arguments."""
    return {f.name: getattr(arguments, f.name) for f in dataclasses.fields(settings) if hasattr(arguments, f.name)}


def attribute_docstrings(cls: type) -> dict[str, str]:
    """The string literal that follows each annotated field in a class's source, on one line."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    found = {}
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[typing.cast(ast.Name, field.target).id] = " ".join(str(after.value.value).split()).replace("%", "%%")
    return found
