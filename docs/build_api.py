"""The API reference from the docstrings: ``python docs/build_api.py FOLDER``.

Needs pdoc (the ``dev`` extra). Every warning is an error, so a name that is gone or a docstring
that cannot be read fails the build.
"""

from __future__ import annotations

import html
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import deen_zoo

# Where a reader starts: what he wants to do, and the names that do it.
TASKS = {
    "Get a model": [
        "create_model", "list_models", "save_pretrained", "models.ReidModel", "models.DEEN",
        "models.AGW", "models.PlainModel", "models.register_reid_model",
    ],
    "Describe images": [
        "FeatureExtractor", "features.quantize.quantize", "features.project.fit_head",
    ],
    "Keep and read features": [
        "features.files.FeatureTable", "features.files.read_feature_table",
        "features.files.write_feature_table",
    ],
    "Find a person": ["search.search", "search.calibrate", "search.SearchResult"],
    "Evaluate any model": [
        "evaluation.evaluate", "evaluation.evaluate_ranking", "evaluation.published",
        "data.register_protocol",
    ],
    "Read datasets": [
        "data.open_dataset", "data.register_dataset", "data.ReidDataset", "data.Sample",
        "data.check_dataset", "synthetic.synthesize",
    ],
    "Train": [
        "training.reproduce.reproduce", "training.settings.Settings", "training.recipes.Recipe",
        "training.tasks.Task", "training.losses", "training.ablation.sweep",
    ],
    "Draw": ["visualize"],
    "Export and publish": ["export.export_model", "hub.publish", "models.convert.convert"],
}  # fmt: skip


def modules() -> list[str]:
    """The public modules, without the command line's: ``deen-zoo VERB --help`` documents those."""
    found = pkgutil.walk_packages(deen_zoo.__path__, "deen_zoo.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    return ["deen_zoo", *(name for name in names if "deen_zoo.cli" not in name)]


def public_names(module: ModuleType) -> list[str]:
    """``__all__``, or what a package's ``import x as x`` offers; all is loaded, lazy names too."""
    names = getattr(module, "__all__", None)
    if names is None:
        ours = {k: getattr(v, "__module__", None) or "" for k, v in vars(module).items()}
        names = [name for name, home in ours.items() if home.startswith("deen_zoo.")]
    vars(module).update({name: getattr(module, name) for name in names})
    return list(names)


def tasks_page(pages: Iterable[str]) -> str:
    """The first page: what one wants to do, what does it, and then every module."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>deen_zoo: API</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}"
        "dt{font-family:monospace}dd{margin:0 0 .4rem 1.5rem}h2{margin-bottom:.3rem}</style>"
        "<h1>deen_zoo</h1>"
    ]
    for task, names in TASKS.items():
        parts.append(f"<h2>{task}</h2><dl>")
        for name in names:
            home, target, value = _find(name)
            first = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            plain = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"\1", first).replace("``", "")
            summary = html.escape(plain)
            link = f"{home.replace('.', '/')}.html{target and '#' + target}"
            parts.append(f"<dt><a href={link}>deen_zoo.{name}</a><dd>{summary}")
        parts.append("</dl>")
    parts.append("<h2>Every module</h2><p>")
    parts += [f"<a href={name.replace('.', '/')}.html>{name}</a> " for name in pages]
    return "\n".join(parts)


def _find(name: str) -> tuple[str, str, Any]:
    """The module whose page documents a name, its anchor there, and what it is."""
    parts = f"deen_zoo.{name}".split(".")
    if ".".join(parts) in modules():
        return ".".join(parts), "", importlib.import_module(".".join(parts))
    home = ".".join(parts[:-1])
    return home, parts[-1], getattr(importlib.import_module(home), parts[-1])


def build(folder: Path) -> int:
    """Write the pages; how many there are."""
    from pdoc import doc, render

    for name in modules():
        module = importlib.import_module(name)
        if hasattr(module, "__path__"):
            vars(module)["__all__"] = public_names(module)
        for value in vars(module).values():
            if hasattr(value, "_field_defaults"):  # a NamedTuple keeps its types as strings
                value.__new__.__annotations__ = get_type_hints(value)
    render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pages = {name: doc.Module.from_name(name) for name in modules()}
        for name, page in pages.items():
            file = folder / f"{name.replace('.', '/')}.html"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(render.html_module(page, pages), encoding="utf-8")
        (folder / "index.html").write_text(tasks_page(pages), encoding="utf-8")
        (folder / "search.js").write_text(render.search_index(pages), encoding="utf-8")
    return len(pages)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/build_api.py FOLDER")
    target = Path(sys.argv[1])
    print(f"{build(target)} modules in {target}/index.html")
