"""Weights of real people that others have published, and what of them is installed here.

``catalog.json`` has one entry for each public file: its ``source`` (a key of
``deen_zoo.models.convert.SOURCES``), the ``model`` it becomes, where it is and its licence. None of
the files may be passed on by this project. The results that a source published stand in
``published.json`` under the same source.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

from ..errors import UserError

__all__ = ["entries", "installed", "installed_splits", "public_weights", "weights_home"]


@functools.cache
def entries() -> tuple[dict[str, str], ...]:
    """The public files: ``source``, ``model``, ``network``, ``dataset``, ``split`` (RegDB's, else
    ``""``), ``file``, ``repository``, ``where``, ``licence``.

    >>> sorted({entry["source"] for entry in entries()})
    ['agw', 'caj', 'tvilfm', 'yyds']
    """
    text = Path(__file__).with_name("catalog.json").read_text(encoding="utf-8")
    return tuple(json.loads(text))


def weights_home() -> Path:
    """Folder of installed weights: ``$DEEN_ZOO_HOME/weights``, or below ``~/.cache/deen_zoo``."""
    home = os.environ.get("DEEN_ZOO_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "deen_zoo") / "weights"


def installed(model: str = "") -> dict[str, Path]:
    """Installed weights by ``<model>.<tag>``, of one model or of all.

    A folder is listed if it has both of its files; ``deen-zoo convert --install`` wrote it.
    """
    found = {}
    for folder in sorted(weights_home().glob(f"{model or '*'}.*")):
        whole = all((folder / name).is_file() for name in ("config.json", "model.safetensors"))
        if whole and not folder.name.endswith(".partial"):
            found[folder.name] = folder
    return found


def installed_splits(name: str) -> dict[int, Path]:
    """Installed weights of RegDB's splits, by split, of a model or of one tag of it.

    Args:
        name: ``deen_resnet50_regdb.yyds``, or without the tag if one source's are installed.

    Raises:
        UserError: Several sources have weights of a split; the message names them.
    """
    model, _, tag = name.partition(".")
    tags: dict[str, dict[int, Path]] = {}
    for full, folder in installed().items():
        match = re.fullmatch(rf"{re.escape(model)}\.(.+)-split(\d+)", full)
        if match and tag in ("", match[1]):
            tags.setdefault(f"{model}.{match[1]}", {})[int(match[2])] = folder
    if len(tags) > 1:
        raise UserError(f"several weights of {model} are installed: give one of {', '.join(tags)}")
    return {split: splits[split] for splits in tags.values() for split in sorted(splits)}


def public_weights(model: str) -> str:
    """Say in one line where public weights of a model are, with the commands that install them.

    >>> public_weights("test_agw_resnet")
    ''
    """
    found = [entry for entry in entries() if entry["model"] == model]
    if not found:
        return ""
    places = "; or ".join(f"{e['file']} ({e['repository']}: {e['where']})" for e in found)
    return (
        f"Public weights of {model}: {places}. Download the file, then run 'deen-zoo convert FILE "
        f"--install'; 'deen-zoo weights' lists it"
    )
