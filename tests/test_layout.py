"""The architecture: who imports whom, and what ``import deen_zoo`` loads."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deen_zoo"
FILES = sorted(PACKAGE.rglob("*.py"))

# The rooms, from the ground up: an import only ever points to a room before its own.
ROOMS = [
    "errors", "terminal", "io", "device", "distributed", "data", "models", "synthetic",
    "evaluation",
    "features", "search", "visualize", "export", "training", "model_card", "hub", "cli",
    "reproduce", "__main__",
]  # fmt: skip


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """The modules that a module imports, anywhere in it; "" is the package itself."""
    inside = file.relative_to(PACKAGE).parts[:-1]
    entry = [node for node in tree(file).body if isinstance(node, ast.If)]
    main = {inner for node in entry if "__main__" in ast.unparse(node) for inner in ast.walk(node)}
    for node in ast.walk(tree(file)):
        if node in main:  # what runs as a command may call the command line
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ("deen_zoo", *inside)[: len(inside) + 2 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            while package == "deen_zoo" and parts:  # the last names may be in a module
                place = PACKAGE.joinpath(*parts)
                if place.is_dir() or place.with_suffix(".py").is_file():
                    break
                parts.pop()
            if package == "deen_zoo":
                yield ".".join(parts)


def graph() -> dict[str, set[str]]:
    """Part -> the parts that it imports."""
    found: dict[str, set[str]] = {}
    for file in FILES:
        part = part_of(file)
        used = {name.split(".")[0] for name in imports(file)}
        found.setdefault(part, set()).update(used - {part, ""})
    return found


def test_imports_follow_the_arrows() -> None:
    arrows = graph()
    assert arrows.pop("__init__") == {"models", "features", "terminal"}
    assert sorted(arrows) == sorted(ROOMS) and arrows["evaluation"]  # it does see imports
    for room, used in arrows.items():
        above = used & set(ROOMS[ROOMS.index(room) :])
        assert not above, f"{room} imports {above}"


def test_no_module_imports_another_in_a_circle() -> None:
    """Also within a room, and for types alone."""
    names = {file: ".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in FILES}
    arrows = {
        name.removesuffix(".__init__"): set(imports(file)) - {""}
        for file, name in names.items()
        if name != "__init__"  # the package hands out what its rooms make
    }
    assert "data.images" in arrows["data.cache"]
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError


def test_import_is_light() -> None:
    """Beyond what timm loads, only the models; no verb's options need a heavy library."""
    code = """
import gc, json, sys
gc.disable()  # which halves the time of the imports
import timm
before = set(sys.modules)
import deen_zoo
loaded = sorted(set(sys.modules) - before)
from deen_zoo.cli import VERBS, load_verb
for verb in VERBS:
    load_verb(verb)
libraries = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([loaded, sorted(libraries)]))
gc.freeze()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded, libraries = json.loads(done.stdout)
    light = re.compile(r"deen_zoo(\.errors|\.terminal|\.io|\.models(\..+)?)?")
    assert [name for name in loaded if not light.fullmatch(name)] == []
    heavy = "matplotlib scipy sklearn pyarrow openvino onnx onnxruntime tensorboard"
    assert set(heavy.split()) & set(libraries) == set()
