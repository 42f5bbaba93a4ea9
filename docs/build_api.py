"""The API reference from the docstrings: ``python docs/build_api.py FOLDER``.

Needs pdoc (the ``dev`` extra). Every warning is an error, so a name that is gone or a docstring
that cannot be read fails the build.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import deen_zoo


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
        (folder / "index.html").write_text(render.html_index(pages), encoding="utf-8")
        (folder / "search.js").write_text(render.search_index(pages), encoding="utf-8")
    return len(pages)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/build_api.py FOLDER")
    target = Path(sys.argv[1])
    print(f"{build(target)} modules in {target}/index.html")
