"""The docstrings are the API reference: they name what exists, and build without warnings."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import deen_zoo

from . import forked

ROOT = Path(__file__).parents[1]
MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(deen_zoo.__path__, "deen_zoo.")
    if not found.name.endswith("__main__")
]
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns):\n((?:[ ]{4}.*\n|\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\*{0,2}\w+): \S", re.MULTILINE)
REFERENCE = re.compile(r":(?:func|class|meth|data|attr):`~?([\w.]+)`")


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What a module defines itself under a public name, and the public methods of its classes."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if not isinstance(value, (type, FunctionType)):
            continue
        yield name, value
        for key, member in vars(value).items() if isinstance(value, type) else ():
            member = getattr(member, "__func__", member)
            if isinstance(member, FunctionType) and not key.startswith("_"):
                yield f"{name}.{key}", member


def sections(value: Any) -> dict[str, list[str]]:
    """The names under each heading of a docstring."""
    text = inspect.cleandoc(value.__doc__ or "") + "\n"
    return {head: ENTRY.findall(body) for head, body in SECTION.findall(text)}


def faults(module: ModuleType, name: str, value: Any) -> Iterator[str]:
    """What a docstring says that is not so."""
    found = sections(value)
    if "Args" in found:
        takes = [
            {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(p.kind.name, "") + p.name
            for p in inspect.signature(value).parameters.values()
            if p.name != "self"
        ]
        yield from (f"{arg} is no argument" for arg in found["Args"] if arg not in takes)
        texts = [  # what a parent class tells counts
            getattr(kind, "__doc__", None) or "" for kind in getattr(value, "__mro__", [value])
        ]
        told = [*found["Args"], *re.findall(r"``(\w+)``", " ".join(texts))]
        yield from (f"argument {arg} is not told" for arg in takes if arg.strip("*") not in
                    {name.strip("*") for name in told})  # fmt: skip
    for error in found.get("Raises", ()):
        kind = getattr(module, error, getattr(deen_zoo.errors, error, getattr(builtins, error, 0)))
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            yield f"{error} is no exception"
    if "Attributes" in found:
        has = {field.name for field in fields(value)} if is_dataclass(value) else set()
        tree = ast.parse(inspect.getsource(value))
        has |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        has |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign)
                and isinstance(n.target, ast.Name)}  # fmt: skip
        yield from (f"no attribute {name}" for name in found["Attributes"] if name not in has)
        if is_dataclass(value):
            public = [f.name for f in fields(value) if not f.name.startswith("_")]
            missing = [name for name in public if name not in found["Attributes"]]
            missing = [name for name in missing if f"``{name}``" not in value.__doc__]
            yield from (f"field {name} is not told" for name in missing)
    for reference in REFERENCE.findall(value.__doc__ or ""):
        if not resolves(reference, module, name.partition(".")[0]):
            yield f"{reference} is not there"


def resolves(reference: str, module: ModuleType, owner: str) -> bool:
    """Whether a name in a docstring can be reached from its class, its module, or from anywhere."""
    for start in (vars(module).get(owner), module):
        target = start
        for part in reference.split("."):
            target = getattr(target, part, None)
        if target is not None:
            return True
    home, _, last = reference.rpartition(".")
    try:
        return hasattr(importlib.import_module(home), last) if home else False
    except ImportError:
        return bool(home) and resolves(home, module, owner)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstrings_name_what_exists(module: ModuleType) -> None:
    found = {name: list(faults(module, name, value)) for name, value in public(module)}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_what_is_public_has_a_docstring(module: ModuleType) -> None:
    assert module.__doc__
    names = getattr(module, "__all__", None)
    if names is None:  # its functions and classes; a verb's two functions are told of in cli/
        names = [name for name in vars(module) if not hasattr(module, "EXAMPLES")]
        told = [(name, value) for name, value in public(module) if name in names]
    else:
        told = [(name, value) for name, value in public(module) if name.split(".")[0] in names]
    # inspect looks in the base class as well; "Name(" is what dataclasses and NamedTuples make.
    text = {name: inspect.getdoc(value) or "" for name, value in told}
    assert [name for name in text if not text[name] or text[name].startswith(f"{name}(")] == []


def test_the_reference_builds_without_warnings(tmp_path: Path) -> None:
    """``docs/build_api.py`` makes every warning an error."""
    pytest.importorskip("pdoc")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = forked.run(ROOT / "docs/build_api.py", tmp_path, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "deen_zoo/evaluation/metrics.html").read_text(encoding="utf-8")
    assert "evaluate_ranking" in page and "greater is more alike" in page
    lazy = (tmp_path / "deen_zoo.html").read_text(encoding="utf-8")
    assert 'id="FeatureExtractor"' in lazy and 'id="DEEN.forward_embedding"' in lazy
    assert len(list(tmp_path.rglob("*.html"))) > 40
