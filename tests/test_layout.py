"""The architecture: who imports whom, what ``import deen_zoo`` loads, that no name is dead."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deen_zoo"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a part may import of ours beside itself. A part is a folder or a module of deen_zoo/; what is
# not here may import any part that does not import it.
MAY_IMPORT = {
    "errors": set(),
    "losses": {"errors"},
    "device": {"errors"},
    "models": {"errors", "device"},
    "data": {"errors"},
    "evaluation": {"errors", "data"},
}
# Who may import these, and nobody else.
IMPORTED_BY = {
    "cli": {"__main__"},
    "benchmark": {"cli"},
    "ablation": {"cli"},
    "reproduce": {"cli", "ablation", "benchmark"},
    "train": {"reproduce", "benchmark"},
    "hub": {"cli"},
    "convert": {"cli", "benchmark"},
}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """The parts that a module imports, anywhere in it; "" is the package itself."""
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
            package, _, rest = name.partition(".")
            if package == "deen_zoo":
                found = rest.split(".")[0]
                known = (PACKAGE / found).is_dir() or (PACKAGE / f"{found}.py").is_file()
                yield found if found and known else ""


def graph() -> dict[str, set[str]]:
    """Part -> the parts that it imports."""
    found: dict[str, set[str]] = {}
    for file in FILES:
        part = part_of(file)
        found.setdefault(part, set()).update(set(imports(file)) - {part, ""})
    return found


def test_imports_follow_the_arrows() -> None:
    arrows = graph()
    assert len(arrows) > 20 and arrows["evaluation"] == {"errors", "data"}  # it does see imports
    for part, allowed in MAY_IMPORT.items():
        assert arrows[part] <= allowed, f"{part} imports {arrows[part] - allowed}"
    for part, allowed in IMPORTED_BY.items():
        users = {user for user, used in arrows.items() if part in used} - {"__init__"}
        assert users <= allowed, f"{part} is imported by {users - allowed}"


def test_no_two_parts_import_each_other() -> None:
    """The parts can be read in an order where each needs only those before it."""
    left = {part: used - {"__init__"} for part, used in graph().items() if part != "__init__"}
    while left:
        ready = {part for part, used in left.items() if not used & left.keys()}
        assert ready, f"a circle among {sorted(left)}"
        left = {part: used for part, used in left.items() if part not in ready}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_modules_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


def test_import_is_light() -> None:
    """Beyond what timm loads, only the models; no verb's options need a heavy library."""
    code = """
import json, sys, timm
before = set(sys.modules)
import deen_zoo
loaded = sorted(set(sys.modules) - before)
from deen_zoo.cli import VERBS, load_verb
for verb in VERBS:
    load_verb(verb)
libraries = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([loaded, sorted(libraries)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded, libraries = json.loads(done.stdout)
    light = re.compile(r"deen_zoo(\.errors|\.models(\..+)?)?")
    assert [name for name in loaded if not light.fullmatch(name)] == []
    heavy = {"matplotlib", "scipy", "sklearn", "faiss", "onnx", "onnxruntime", "tensorboard"}
    assert heavy & set(libraries) == set()


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def names_used(file: Path) -> set[str]:
    """Identifiers that a module uses: not its definitions, comments, docstrings or ``__all__``."""
    used: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and file.name != "__init__.py":
            used.update(alias.name for alias in node.names)
        elif isinstance(node, ast.keyword) and node.arg:
            used.add(node.arg)
    return used


def definitions(file: Path) -> Iterator[str]:
    """What a module and its classes define: functions, classes, constants, methods."""
    for node in tree(file).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        if isinstance(node, ast.ClassDef):
            yield from (inner.name for inner in node.body if isinstance(inner, ast.FunctionDef))


# Read or called by timm and torch, by these names.
FOR_OTHERS = {"default_cfgs", "forward", "fuse", "get_classifier", "group_matcher"}
FOR_OTHERS |= {"no_weight_decay"}


def test_no_name_is_dead() -> None:
    """A definition is used: a private one in the package, a public one there, in tests or docs."""
    package: set[str] = set().union(*(names_used(file) for file in FILES))
    others = [*ROOT.glob("tests/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]
    documents = [ROOT / "README.md", PACKAGE / "card.md", *ROOT.glob("docs/*.md")]
    outside = set().union(*(words(file.read_text(encoding="utf-8")) for file in others + documents))
    dead = []
    for file in FILES:
        for name in definitions(file):
            known = package if name.startswith("_") else package | outside | FOR_OTHERS
            if name not in known and not re.fullmatch("__.+__|add_arguments|run|EXAMPLES", name):
                dead.append(f"{file.relative_to(ROOT)}: {name}")
    assert dead == []
