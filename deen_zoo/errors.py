"""The errors that a user can correct.

Everything that goes wrong because of what the user gave (an argument, a file, a folder, a
missing extra) is a :class:`UserError` with a one-line message: what came, what is valid, what to
do. The command line prints that line and exits with code 2; in Python it is a ``ValueError``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class UserError(ValueError):
    """A mistake that the user can correct; its message is one line."""


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message names the pip command."""


def check_least(name: str, number: int, least: int) -> None:
    """Raise UserError if ``number`` is below ``least``."""
    if number < least:
        raise UserError(f"{name} {number}: give {least} or more")


def check_choice(what: str, value: object, valid: Iterable[str]) -> None:
    """Raise UserError unless ``value`` is one of the valid names."""
    if value not in (names := list(valid)):
        raise UserError(f"{what} {value!r}: choose from {', '.join(names)}")


def plural(number: int, noun: str) -> str:
    """
    >>> plural(1, "image"), plural(1200, "image"), plural(2, "identity"), plural(3, "match")
    ('1 image', '1,200 images', '2 identities', '3 matches')
    >>> plural(2, "epoch"), plural(2, "process")
    ('2 epochs', '2 processes')
    """
    if number != 1:
        noun = re.sub("y$", "ie", re.sub("(s|[^o]ch)$", r"\1e", noun)) + "s"
    return f"{number:,} {noun}"


def brief(error: BaseException | None) -> str:
    """First line of an error, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: Dotted name to import, such as ``"onnx.checker"``.
        extra: The extra of this package that brings it, such as ``"export"``.

    Raises:
        MissingExtraError: ``module`` cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.split('.', maxsplit=1)[0]} is not installed ({error}); "
            f"install it with: pip install 'deen-zoo[{extra}]'"
        ) from error


def load_module(name: str, option: str) -> ModuleType:
    """Import the module of ``package.module:name``, of the working folder too.

    Raises:
        UserError: It cannot be imported; the message names the option that gave it.
    """
    module = name.partition(":")[0]
    if not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{option} {name}: give package.module:name")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own module, wherever the command lives
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{option} {name}: it cannot be imported ({error})") from error


def load_object(name: str, option: str) -> Any:
    """What ``package.module:name`` names.

    Raises:
        UserError: It cannot be imported; the message names the option that gave it.
    """
    if ":" not in name:
        raise UserError(f"{option} {name}: give package.module:name")
    try:
        return getattr(load_module(name, option), name.partition(":")[2])
    except AttributeError as error:
        raise UserError(f"{option} {name}: it cannot be imported ({error})") from error
