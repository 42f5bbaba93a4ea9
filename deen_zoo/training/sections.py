"""Typed groups of settings: declared once as dataclass fields, checked by their types."""

from __future__ import annotations

import json
import math
from dataclasses import Field, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError

__all__ = ["Section", "cast", "check_range", "flatten", "parse", "setting"]


def setting(
    default: Any, help: str, least: float = -math.inf, most: float = math.inf, **argument: Any
) -> Any:
    """A field of a :class:`Section` or of the run's settings: its default (``MISSING`` for none),
    its description, the range of its numbers and, of an option, what ``add_argument`` takes."""
    metadata = {"help": help, "range": (least, most), "argument": argument}
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
            value = cast(item.name, getattr(self, item.name), kinds[item.name])
            object.__setattr__(self, item.name, value)  # lists of a TOML file become tuples
            check_range(item.name, value, item)


def check_range(name: str, value: Any, item: Field[Any]) -> None:
    """Raise UserError if a number, or one of a tuple, is out of the range that its setting has."""
    least, most = item.metadata["range"]
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not least <= number <= most:
            bounds = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise UserError(f"{name} {value}: give {bounds}")


def parse(text: str) -> Any:
    """JSON as far as it is JSON, Python's spelling of the constants, or the text itself.

    >>> parse("0.05"), parse("None"), parse("[64, 32]"), parse("resnet18")
    (0.05, None, [64, 32], 'resnet18')
    """
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def flatten(table: dict[str, Any], depth: int = 9, prefix: str = "") -> dict[str, Any]:
    """Nested tables by dotted names of at most ``depth`` parts.

    >>> flatten({"data": {"pad": 0}, "seed": 1})
    {'data.pad': 0, 'seed': 1}
    """
    out: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict) and depth > 1
        out |= flatten(value, depth - 1, f"{prefix}{key}.") if inner else {prefix + key: value}
    return out


def cast(key: str, value: Any, kind: Any) -> Any:
    """The value as the type has it, or a UserError that says which type is wanted."""
    try:
        return _cast(value, kind)
    except (TypeError, ValueError):
        raise UserError(f"{key} is {value!r}: give {_words(kind)}") from None


def _cast(value: Any, kind: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # X | None
        return None if value is None else _cast(value, inner[0])
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_cast(item, one) for item, one in zip(value, kinds, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if value not in inner if origin is Literal else type(value) is not (origin or kind):
        raise TypeError
    return value


def _words(kind: Any) -> str:
    """A type in words, for an error message."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return f"{_words(inner[0])} or none"
    if origin is Literal:
        return " or ".join(inner)
    if origin is tuple:
        return "a list such as [[20, 0.1], [80, 0.01]]" if inner[-1] is Ellipsis else "[a, b]"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return names.get(kind, "a table")
