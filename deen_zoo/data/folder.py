"""One's own images: folders, and tables of path, identity, camera, modality."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from ..errors import UserError
from .images import is_image_name
from .protocols import INFRARED, VISIBLE, Sample
from .reader import Fault, ReidDataset

__all__ = ["UNKNOWN", "OwnData", "list_images", "open_folder", "read_csv"]

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
    """Labelled samples of one folder, visible ones first.

    Either ``ROOT/visible`` and ``ROOT/infrared``, each with a folder for every identity, named by
    its number (``0007`` and ``7`` are the same), and the images in it, or in ``0007/cam3`` where
    cameras are known; or ``ROOT/images.csv``, as :func:`read_csv` takes it. Where no camera is
    known, the visible images are of camera 1 and the infrared ones of camera 2.

    Raises:
        UserError: Another layout; the message names the first thing that does not fit.
    """
    root = Path(root).expanduser()
    number = {VISIBLE: 1, INFRARED: 2}
    table = root / "images.csv"
    if table.is_file():
        samples = read_csv(table)
        unknown = [sample.path for sample in samples if sample.identity == UNKNOWN]
        if unknown:
            raise UserError(f"{table}: {len(unknown)} rows have no identity, as {unknown[0]}")
        samples = [
            s._replace(camera=number[s.modality]) if s.camera == UNKNOWN else s for s in samples
        ]
        samples.sort(key=lambda sample: number[sample.modality])
    else:
        samples = [sample for kind in number for sample in _of_folder(root, kind, number[kind])]
    for modality in number:
        if not any(sample.modality == modality for sample in samples):
            raise UserError(f"{root}: no {modality} image")
    return samples


def _of_folder(root: Path, modality: str, camera: int) -> Iterator[Sample]:
    if not (root / modality).is_dir():
        raise UserError(
            f"{root}: no folder {modality} in it; lay images out as visible/IDENTITY/*.jpg and "
            "infrared/IDENTITY/*.jpg, or list them in images.csv"
        )
    for path in list_images(root / modality)[0]:
        relative = Path(path).relative_to(root / modality).as_posix()
        match = re.fullmatch(r"(\d{1,18})(?:/[^/\d]*(\d{1,9}))?/[^/]+", relative)
        if match is None:
            raise UserError(
                f"{path}: not {modality}/IDENTITY/name or {modality}/IDENTITY/camN/name, where "
                "IDENTITY is a number; move it, or list the images in images.csv"
            )
        yield Sample(path, int(match[1]), int(match[2] or camera), modality)


class OwnData(ReidDataset):
    """One's own images to train and test on: ``ROOT/train`` and ``ROOT/test``, of different
    people, each as :func:`open_folder` takes it."""

    name, title, home, ask = "own", "one's own images", "", ""
    folders = ("train", "test")
    expected: ClassVar[dict[str, dict[str, int]]] = {}

    def _read_train(self, trial: int) -> tuple[list[Sample], list[Fault]]:
        return open_folder(Path(self.root, "train")), []

    def read_test(self, trial: int = 1) -> tuple[list[Sample], list[Fault]]:
        return open_folder(Path(self.root, "test")), []

    def _test_identities(self, trial: int) -> set[int]:
        return {sample.identity for sample in self.read_test()[0]}

    def belongs(self, relative: str) -> bool:
        return relative.startswith(("train/", "test/"))
