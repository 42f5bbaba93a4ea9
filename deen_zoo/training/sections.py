"""Typed groups of settings: declared once as dataclass fields, checked by their types."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError

__all__ = ["Section", "Text", "convert", "parse", "setting"]


def setting(default: Any, help: str, least: float | None = None, most: float | None = None) -> Any:
    """A field of a :class:`Section`: its default, its description, and the range of its numbers."""
    metadata = {"help": help, "least": least, "most": most}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """A group of settings; subclasses are frozen dataclasses whose fields are :func:`setting`.

    Raises:
        UserError: A value of another type, or out of range; the message names the setting.
    """

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for item in fields(self):
            value = convert(item.name, getattr(self, item.name), kinds[item.name])
            object.__setattr__(self, item.name, value)  # lists of a TOML file become tuples
            least, most = item.metadata.get("least"), item.metadata.get("most")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and (
                    (least is not None and not number >= least)
                    or (most is not None and not number <= most)
                ):
                    bounds = f"{least} or more" if most is None else f"{least} to {most}"
                    raise UserError(f"{item.name} is {value}: give {bounds}")


class Text(str):
    """A value as it was typed; its type is still to be found."""


def parse(text: str) -> Any:
    """JSON as far as it is JSON, Python's spelling of the constants, or the text itself."""
    constants = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def convert(key: str, value: Any, kind: Any) -> Any:
    """The value as the type has it, or a UserError that says which type is wanted."""
    if isinstance(value, Text):
        value = str(value) if _takes(kind, str) and value.lower() != "none" else parse(value)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return convert(key, value, next(one for one in inner if one is not NoneType))
    if origin is tuple and isinstance(value, list | tuple):
        if inner[-1] is Ellipsis:
            return tuple(convert(key, item, inner[0]) for item in value)
        if len(value) == len(inner):
            return tuple(convert(key, *pair) for pair in zip(value, inner, strict=True))
    elif (origin is Literal and value in inner) or (origin is dict and isinstance(value, dict)):
        return value
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    raise UserError(f"{key} is {value!r}: give {_words(kind)}")


def _takes(kind: Any, wanted: type) -> bool:
    return kind is wanted or wanted in get_args(kind) or get_origin(kind) is Literal


def _words(kind: Any) -> str:
    """A type in words, for an error message."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join("none" if one is NoneType else _words(one) for one in inner)
    if origin is Literal:
        return " or ".join(inner)
    if origin is tuple:
        return "a list such as [[20, 0.1], [80, 0.01]]" if inner[-1] is Ellipsis else "[a, b]"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return names.get(kind, "a table")
