"""One's own images: folders, and tables of path, identity, camera, modality."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .draws import INFRARED, VISIBLE, Sample
from .files import is_image_name

__all__ = ["UNKNOWN", "list_images", "open_folder", "read_csv"]

UNKNOWN = -1  # an identity or camera that nobody said
COLUMNS = ("path", "identity", "camera", "modality")


def list_images(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """All files at any depth, sorted by path: the images by their names, and the others.

    Hidden files are in neither list. Links to folders are followed, each folder once.

    Raises:
        OSError: A folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    images: list[str] = []
    others: list[str] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                (images if is_image_name(name) else others).append(os.path.join(here, name))
    key = lambda path: path.split(os.sep)  # noqa: E731
    return sorted(images, key=key), sorted(others, key=key)


def read_csv(file: str | os.PathLike[str], modality: str | None = None) -> list[Sample]:
    """Samples of a table: a CSV file with a header line and one image a row.

    Args:
        file: Columns ``path`` (absolute, or relative to the file's folder), ``modality``
            (``visible`` or ``infrared``), and, where they are known, ``identity`` and ``camera``:
            whole numbers from 0 on; left empty they are :data:`UNKNOWN`. Other columns are ignored.
        modality: Of the images whose cell is empty or missing; ``"auto"`` is passed on.

    Raises:
        UserError: Not such a table; the message names the line.
    """
    samples = []
    for line, row in _rows(Path(file)):
        kind = row.get("modality") or modality
        if kind not in (VISIBLE, INFRARED) and (row.get("modality") or kind != "auto"):
            raise UserError(
                f"{file}, line {line}: modality {row.get('modality', '')!r}; "
                "write 'visible' or 'infrared'"
            )
        if not row["path"]:
            raise UserError(f"{file}, line {line}: no path; name an image file")
        identity, camera = (
            _label(row.get(name, ""), name, f"{file}, line {line}") for name in COLUMNS[1:3]
        )
        path = os.path.join(Path(file).parent, row["path"])
        samples.append(Sample(path, identity, camera, str(kind)))
    if not samples:
        raise UserError(f"{file}: no rows; write one for each image")
    return samples


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, cells without blanks around) of each row."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such file")
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            header = [name.strip() for name in reader.fieldnames or ()]
            if "path" not in header:
                raise UserError(
                    f"{file}: the first line is {','.join(header)!r}; write {','.join(COLUMNS)}"
                )
            reader.fieldnames = header
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{file}, line {reader.line_num}: not {len(header)} cells")
                yield reader.line_num, {key: cell.strip() for key, cell in row.items()}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a CSV file in UTF-8 ({error})") from None


def _label(text: str, name: str, where: str) -> int:
    if text and not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError(f"{where}: {name} {text!r}; write a whole number")
    return int(text) if text else UNKNOWN


def open_folder(root: str | os.PathLike[str]) -> list[Sample]:
    """Labelled samples of two folders, ``ROOT/visible`` and ``ROOT/infrared``, visible ones first.

    Each holds a folder for every identity, named by its number (``0007`` and ``7`` are the same),
    with the images in it; or in ``0007/cam3`` when cameras are known. Without, all visible images
    are of camera 1 and all infrared ones of camera 2.

    Raises:
        UserError: Another layout; the message names the first thing that does not fit.
    """
    root = Path(root).expanduser()
    absent = [name for name in (VISIBLE, INFRARED) if not (root / name).is_dir()]
    if absent:
        raise UserError(
            f"{root}: no folder {' and '.join(absent)} in it; lay images out as "
            "visible/IDENTITY/*.jpg and infrared/IDENTITY/*.jpg, or list them in a CSV file"
        )
    samples = []
    for number, modality in enumerate((VISIBLE, INFRARED), start=1):
        paths, _ = list_images(root / modality)
        for path in paths:
            parts = Path(path).relative_to(root / modality).parts
            match = re.fullmatch(r"(\d{1,18})(?:/[^/\d]*(\d{1,9}))?/[^/]+", "/".join(parts))
            if match is None:
                raise UserError(
                    f"{path}: not {modality}/IDENTITY/name or {modality}/IDENTITY/camN/name, where "
                    "IDENTITY is a number; move it, or list the images in a CSV file"
                )
            samples.append(Sample(path, int(match[1]), int(match[2] or number), modality))
    return _labelled(samples, str(root))


def _labelled(samples: Sequence[Sample], source: str) -> list[Sample]:
    for modality in (VISIBLE, INFRARED):
        if not any(sample.modality == modality for sample in samples):
            raise UserError(f"{source}: no {modality} image")
    return list(samples)
