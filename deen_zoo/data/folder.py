"""The user's own images: folders, and tables of path, identity, camera, modality."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, plural
from .images import is_foreign_name, is_image_name
from .protocols import INFRARED, UNKNOWN, VISIBLE, Label, Sample, as_label
from .reader import Fault, Listing, ReidDataset

__all__ = ["UNKNOWN", "OwnData", "list_images", "read_csv"]

COLUMNS = ("path", "identity", "camera", "modality")


def list_images(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """All images at any depth, by their names and sorted by path; and the files of foreign names.

    Links to folders are followed, each folder once; hidden folders and files are left out.

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
            if is_image_name(name) or is_foreign_name(name):
                (images if is_image_name(name) else others).append(os.path.join(here, name))
    key = lambda path: path.split(os.sep)  # noqa: E731, used twice below
    return sorted(images, key=key), sorted(others, key=key)


def read_csv(file: str | os.PathLike[str], modality: str | None = None) -> list[Sample]:
    """Samples of a table: a CSV file with a header line and one image per row.

    Args:
        file: Columns ``path`` (absolute, or relative to the file's folder), ``modality``
            (``visible`` or ``infrared``), and, where they are known, ``identity`` and ``camera``:
            whole numbers from 0, or words; left empty they are :data:`UNKNOWN`. Other columns are
            ignored.
        modality: Modality of the images whose cell is empty or missing; ``"auto"`` is passed on.

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


def _label(text: str, name: str, where: str) -> Label:
    if re.fullmatch(r"-[0-9]+", text):
        raise UserError(f"{where}: {name} {text!r}; write a whole number from 0, a word or nothing")
    return as_label(text, f"{where}: {name}") if text else UNKNOWN


_NUMBER = {VISIBLE: 1, INFRARED: 2}  # the camera where none is known


def _read_folder(root: Path) -> tuple[list[Sample], list[Fault], list[str]]:
    """Samples, visible ones first; identities without images; files that are no images."""
    faults: list[Fault] = []
    others: list[str] = []
    table = root / "images.csv"
    if table.is_file():
        samples = read_csv(table)
        unknown = [sample.path for sample in samples if sample.identity == UNKNOWN]
        if unknown:
            rows = plural(len(unknown), "row")
            raise UserError(f"{table}: {rows} without an identity, such as {unknown[0]}")
        samples = [
            s._replace(camera=_NUMBER[s.modality]) if s.camera == UNKNOWN else s for s in samples
        ]
        samples.sort(key=lambda sample: _NUMBER[sample.modality])
    else:
        samples = []
        for modality in _NUMBER:
            if not (root / modality).is_dir():
                raise UserError(
                    f"{root}: no folder {modality} in it; lay images out as visible/IDENTITY/*.jpg "
                    "and infrared/IDENTITY/*.jpg, or list them in images.csv"
                )
            images, foreign = list_images(root / modality)
            others += foreign
            samples += [_sample(path, root / modality) for path in images]
            seen = {as_label(sample.identity) for sample in samples if sample.modality == modality}
            for folder in sorted(path for path in (root / modality).iterdir() if path.is_dir()):
                if not folder.name.startswith(".") and as_label(folder.name) not in seen:
                    detail = "no image in it that can be read"
                    faults.append(Fault("missing", f"{modality}/{folder.name}", detail))
    for modality in _NUMBER:
        if not any(sample.modality == modality for sample in samples):
            raise UserError(f"{root}: no {modality} image")
    return samples, faults, others


def _sample(path: str, folder: Path) -> Sample:
    """The sample at IDENTITY/name or IDENTITY/camN/name below a modality's folder."""
    match = re.fullmatch(
        r"([^/]+)(?:/[^/\d]*(\d{1,9}))?/[^/]+", Path(path).relative_to(folder).as_posix()
    )
    if match is None:
        raise UserError(
            f"{path}: not {folder.name}/IDENTITY/name or {folder.name}/IDENTITY/camN/name; move "
            "it, or list the images in images.csv"
        )
    camera = int(match[2] or _NUMBER[folder.name])
    return Sample(path, _label(match[1], "identity", path), camera, folder.name)


class OwnData(ReidDataset):
    """The user's own images.

    Either ``ROOT/visible`` and ``ROOT/infrared``, each with a folder for every identity, named by
    a number (``0007`` and ``7`` are the same) or a word (``person_001``), and the images in it, or
    in ``0007/cam3`` where cameras are known; or ``ROOT/images.csv``, as :func:`read_csv` takes it.
    Where no camera is known, the visible images are of camera 1 and the infrared ones of camera 2.
    Such a root can be evaluated, extracted and searched. To train, lay out ``ROOT/train`` and
    ``ROOT/test`` of different people, each of that form.
    """

    name, title = "own", "the user's own images"
    folders = ("visible", "infrared", "train", "test")

    @classmethod
    def absent(cls, folder: Path) -> list[str]:
        """What a root lacks to be evaluated; training needs ``train`` as well."""
        if (folder / "test").is_dir() or (folder / "images.csv").is_file():
            return []
        missing = [kind for kind in _NUMBER if not (folder / kind).is_dir()]
        return [f"{' and '.join(missing)} (or, to train, train and test)"] if missing else []

    @classmethod
    def looks_like(cls, folder: Path) -> bool:
        """Whether a folder may be such a root."""
        return not cls.absent(folder)

    @property
    def trainable(self) -> bool:
        """Whether there is a folder ``train``."""
        return Path(self.root, "train").is_dir()

    def list_train(self, split: int) -> Listing:
        if not self.trainable:
            raise UserError(
                f"{self.root}: no folder train in it; training needs ROOT/train and ROOT/test of "
                "different people, each with visible/IDENTITY/*.jpg and infrared/IDENTITY/*.jpg or "
                "images.csv"
            )
        return self._list("train")

    def list_test(self, split: int) -> Listing:
        return self._list("test" if Path(self.root, "test").is_dir() else "")

    def _list(self, part: str) -> Listing:
        samples, faults, others = _read_folder(Path(self.root, part))
        self.ignored.update(map(self.relative, others))
        prefix = f"{part}/" if part else ""
        return samples, [fault._replace(where=prefix + fault.where) for fault in faults]

    def belongs(self, relative: str) -> bool:
        return relative.startswith(tuple(f"{folder}/" for folder in self.folders))
