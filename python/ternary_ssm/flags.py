"""Command-line flags from configuration dataclasses, so that the two cannot drift apart."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """A flag for each field of a configuration, and of those in it; help comes from the docstring."""
    hints, doc = get_type_hints(config), inspect.cleandoc(config.__doc__ or "")
    for field in fields(config):
        if is_dataclass(hints[field.name]):
            add_flags(parser, hints[field.name])
            continue
        # "name: text" or "name, other: text", and the lines that are indented below
        found = re.search(rf"^(?:\w+, )*{field.name}(?:, \w+)*: (.*(?:\n +.*)*)", doc, re.M)
        words = [" ".join(found[1].split()).replace("%", "%%")] if found else []
        required = field.default is MISSING
        flag = "--" + field.name.replace("_", "-")
        if hints[field.name] is bool:
            yes_or_no = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=yes_or_no, default=argparse.SUPPRESS, help=" ".join(words))
            continue
        parser.add_argument(
            flag,
            type=_reader(hints[field.name], field.type),
            required=required,
            default=argparse.SUPPRESS,  # absent, the class's own default holds
            metavar=field.name.rpartition("_")[2].upper(),
            help=" ".join(words if required else [*words, f"(default: {field.default})"]),
        )


def from_flags(config: type, args: argparse.Namespace) -> Any:
    """The configuration that the flags of `add_flags` give."""
    values = {}
    for name, hint in get_type_hints(config).items():
        if is_dataclass(hint):
            values[name] = from_flags(hint, args)
        elif hasattr(args, name):
            values[name] = getattr(args, name)
    return config(**values)


def _reader(hint: Any, described: Any) -> Callable[[str], Any]:
    """Text -> a value of the annotated type: of the first kind of a union that fits; tuples by commas."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)

    def read(text: str) -> Any:
        for kind in kinds:
            try:
                if kind in (int, float, str):
                    return kind(text)
                if get_origin(kind) is tuple:
                    return tuple(get_args(kind)[0](part) for part in text.split(",") if part)
            except ValueError:
                continue
            if get_origin(kind) is Literal and text in get_args(kind):
                return text
        raise argparse.ArgumentTypeError(f"{text!r} is not {described}")

    return read
