"""What the three datasets on disk have in common: names become samples, and faults are found."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..errors import UserError
from .images import is_image_name
from .protocols import (
    INFRARED,
    PROTOCOLS,
    VISIBLE,
    Protocol,
    Sample,
    draw_gallery,
    read_permutations,
)

__all__ = ["Fault", "ReidDataset", "count", "one_modality"]


class Fault(NamedTuple):
    """Something wrong with a dataset: what kind, where (relative to the root), and what exactly."""

    kind: str
    where: str
    detail: str


def one_modality(samples: Iterable[Sample]) -> list[tuple[int, str]]:
    """Sorted (identity, modality) of the identities that have images of one modality only."""
    seen: dict[int, set[str]] = {}
    for sample in samples:
        seen.setdefault(sample.identity, set()).add(sample.modality)
    return sorted((i, min(kinds)) for i, kinds in seen.items() if len(kinds) == 1)


def count(samples: Sequence[Sample]) -> dict[str, int]:
    """How many identities, images of each modality, and images of each modality and camera.

    >>> count([Sample("cam3/0006/0001.jpg", 6, 3, "infrared")])
    {'identities': 1, 'visible': 0, 'infrared': 1, 'infrared camera 3': 1}
    """
    counts = {"identities": len({sample.identity for sample in samples}), VISIBLE: 0, INFRARED: 0}
    cameras: dict[tuple[str, int], int] = {}
    for sample in samples:
        counts[sample.modality] += 1
        key = sample.modality, sample.camera
        cameras[key] = cameras.get(key, 0) + 1
    order = sorted(cameras.items(), key=lambda item: (item[0][0] != VISIBLE, item[0][1]))
    return counts | {f"{modality} camera {camera}": n for (modality, camera), n in order}


class ReidDataset:
    """A dataset on disk; :func:`~deen_zoo.data.open_dataset` makes one.

    Attributes:
        name: ``"sysu"``, ``"regdb"`` or ``"llcm"``.
        root: The folder, as given.
        expected: Counts to find in a complete copy, by split and kind.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    home: ClassVar[str]  # where the dataset is given out, and how to ask for it
    ask: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    trials: ClassVar[Sequence[int]] = (1,)  # the splits into training and test
    expected: ClassVar[dict[str, dict[str, int]]]

    def __init__(self, root: str | os.PathLike[str], skip_broken: bool = False) -> None:
        self.root, self.skip_broken = os.fspath(root), skip_broken
        self.left_out: frozenset[str] = frozenset()  # names below the root, see leave_out
        self._listed: dict[str, list[str]] = {}

    def train(self, trial: int = 1) -> list[Sample]:
        """Training images, visible ones first; ``trial`` (1..10) is RegDB's split."""
        return self._settle(*self.read_train(trial), "training")

    def test(self, modality: str, trial: int = 1) -> list[Sample]:
        """All test images of a modality, in the reference's order."""
        if modality not in (VISIBLE, INFRARED):
            raise UserError(f"modality {modality!r}; it is 'visible' or 'infrared'")
        samples = self._settle(*self.read_test(trial), "test")
        return [sample for sample in samples if sample.modality == modality]

    def query(self, protocol: str, trial: int | None = None) -> list[Sample]:
        """The images that search, in a trial of a protocol (the first one when None)."""
        terms, trial = self._terms(protocol, trial)
        pool = self.test(terms.query, trial)
        lonely = one_modality(pool + self.test(terms.gallery, trial))
        if lonely:
            warnings.warn(
                f"{self.title}: {len(lonely)} test identities have one modality only and can't be "
                f"matched, such as {lonely[0][0]} ({lonely[0][1]})",
                stacklevel=2,
            )
        return [pool[i] for i in draw_gallery(pool, trial)] if terms.sampled == "query" else pool

    def gallery(
        self, protocol: str, trial: int | None = None, draw: str = "seeded", shots: int = 1
    ) -> list[Sample]:
        """The images that are searched.

        Args:
            protocol: One of :data:`PROTOCOLS` of this dataset.
            trial: Its number; None is the first one.
            draw: ``"seeded"`` as the reference, or for SYSU-MM01 ``"official"``, as its authors.
            shots: Images of each identity and camera, where the protocol draws the gallery.

        See :func:`draw_gallery`.
        """
        terms, trial = self._terms(protocol, trial)
        if draw not in ("seeded", "official"):
            raise UserError(f"draw {draw!r}; it is 'seeded' or 'official'")
        pool = self.test(terms.gallery, trial)
        if terms.gallery_cameras:
            pool = [sample for sample in pool if sample.camera in terms.gallery_cameras]
        if terms.sampled != "gallery":
            if shots != 1 or draw != "seeded":
                raise UserError(f"{protocol} takes the whole gallery: it has no draw and no shots")
            return pool
        if draw == "official" and self.name != "sysu":
            raise UserError(f"{protocol} has no official draw; sysu-all and sysu-indoor have one")
        permutations = read_permutations(self.root) if draw == "official" else None
        return [pool[i] for i in draw_gallery(pool, trial, shots, permutations)]

    def fingerprint(self) -> dict[str, Any]:
        """Counts of each split and the SHA-256 of the sorted names of all images."""
        counts: dict[str, dict[str, int]] = {}
        names: set[str] = set()
        for split, samples, _ in self.read_splits():
            counts[split] = count(samples)
            names.update(self.relative(sample.path) for sample in samples)
        digest = hashlib.sha256(os.fsencode("\n".join(sorted(names)))).hexdigest()
        return {"dataset": self.name, "images": len(names), "counts": counts, "sha256": digest}

    def read_train(self, trial: int = 1) -> tuple[list[Sample], list[Fault]]:
        """As :meth:`train`, but the faults are returned beside the samples that are left."""
        samples, faults = self._read_train(self._trial(trial))
        bad = {
            identity: Fault("one-modality", f"identity {identity}", f"only {modality} in training")
            for identity, modality in one_modality(samples)
        }
        for identity in {sample.identity for sample in samples} & self._test_identities(trial):
            bad[identity] = Fault("leak", f"identity {identity}", "in both training and test")
        faults += [bad[identity] for identity in sorted(bad)]
        return [sample for sample in samples if sample.identity not in bad], faults

    def read_test(self, trial: int = 1) -> tuple[list[Sample], list[Fault]]:
        """All test images, visible ones first, and the faults that were found in listing them."""
        raise NotImplementedError

    def read_splits(self) -> Iterator[tuple[str, list[Sample], list[Fault]]]:
        """Every split by name: ``"train"``, ``"test"``, or RegDB's ``"train 1"`` and so on."""
        for trial in self.trials:
            number = f" {trial}" if len(self.trials) > 1 else ""
            yield f"train{number}", *self.read_train(trial)
            yield f"test{number}", *self.read_test(trial)

    def belongs(self, relative: str) -> bool:
        """Whether a path below the root is where and how an image of this layout is called."""
        raise NotImplementedError

    def relative(self, path: str) -> str:
        """A sample's path below the root, with slashes."""
        return os.path.relpath(path, self.root).replace(os.sep, "/")

    def _read_train(self, trial: int) -> tuple[list[Sample], list[Fault]]:
        raise NotImplementedError

    def _test_identities(self, trial: int) -> set[int]:
        raise NotImplementedError

    def _trial(self, trial: int) -> int:
        return trial

    def _terms(self, protocol: str, trial: int | None) -> tuple[Protocol, int]:
        mine = [name for name, terms in PROTOCOLS.items() if terms.dataset == self.name]
        if protocol not in mine:
            raise UserError(f"protocol {protocol!r} for {self.title}; it has {', '.join(mine)}")
        terms = PROTOCOLS[protocol]
        trial = terms.trials[0] if trial is None else trial
        if trial not in terms.trials:
            raise UserError(
                f"{protocol} has trials {terms.trials[0]} to {terms.trials[-1]}, not {trial}"
            )
        return terms, trial

    def _settle(self, samples: list[Sample], faults: list[Fault], split: str) -> list[Sample]:
        if faults:
            found = (
                f"{self.title} at {self.root}: {len(faults)} faults in the {split} set, "
                f"such as {faults[0].where}: {faults[0].detail}"
            )
            if not self.skip_broken:
                raise UserError(
                    f"{found}; 'deen-zoo check {self.name} {self.root}' lists them, and "
                    "skip_broken leaves them out"
                )
            warnings.warn(f"{found}; they are left out", stacklevel=3)
        samples = [s for s in samples if self.relative(s.path) not in self.left_out]
        if not samples:
            raise UserError(f"{self.title} at {self.root}: no {split} images were found")
        return samples

    def leave_out(self, names: Iterable[str]) -> None:
        """From now on, do as if these images (names below the root) were not there."""
        self.left_out = frozenset(names)

    def _path(self, relative: str) -> str:
        return os.path.join(self.root, *relative.split("/"))

    def _images(self, folder: str) -> list[str]:
        """Sorted names of the images in a folder below the root; none when it is not there."""
        if folder not in self._listed:
            try:
                with os.scandir(self._path(folder)) as entries:
                    names = [e.name for e in entries if is_image_name(e.name) and not e.is_dir()]
            except (FileNotFoundError, NotADirectoryError):
                names = []
            self._listed[folder] = sorted(names)
        return self._listed[folder]

    def _index(self, relative: str) -> str:
        path = self._path(relative)
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(
                f"{path}: this index file of {self.title} is missing; it comes with the dataset: "
                f"{self.ask}"
            ) from None
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise UserError(f"{path}: not a text file; copy it again from the source")
        if not text.strip(" \t\r\n,"):
            raise UserError(f"{path}: an empty file; copy it again from the source")
        return text

    def _identities(self, relative: str) -> list[int]:
        """Sorted identities of an index file: numbers between commas."""
        words = self._index(relative).replace(",", " ").split()
        wrong = [word for word in words if not re.fullmatch(r"[0-9]{1,18}", word)]
        if wrong:
            raise UserError(
                f"{self._path(relative)}: {wrong[0]!r} is not an identity; the file holds numbers "
                "between commas"
            )
        return sorted({int(word) for word in words})

    def _absent(self, identities: Iterable[int], samples: Iterable[Sample]) -> list[Fault]:
        """The identities of an index file that have no image at all."""
        absent = set(identities) - {sample.identity for sample in samples}
        detail = "listed in an index file, has no images"
        return [Fault("missing", f"identity {identity}", detail) for identity in sorted(absent)]

    def _pairs(self, relative: str) -> list[tuple[str, int]]:
        """Lines of an index file: a path below the root, a blank, a label."""
        pairs = []
        for number, line in enumerate(self._index(relative).splitlines(), start=1):
            words = line.rsplit(None, 1)
            if not words:
                continue
            if len(words) != 2 or not re.fullmatch(r"[0-9]{1,18}", words[1]):
                raise UserError(
                    f"{self._path(relative)}, line {number}: {line.strip()!r} is not "
                    "'folder/identity/name label'"
                )
            pairs.append((words[0].strip().replace("\\", "/"), int(words[1])))
        return pairs

    def _read_lists(self, lists: Sequence[str]) -> tuple[list[Sample], list[Fault]]:
        """The samples of index files whose labels stand for the same identities in all of them."""
        samples: list[Sample] = []
        faults: list[Fault] = []
        identities: dict[int, int] = {}  # of labels
        labels: dict[int, int] = {}  # of identities
        seen: set[str] = set()
        for listed in lists:
            for relative, label in self._pairs(listed):
                parsed, complaint = self._parse(relative)
                folder, _, name = relative.rpartition("/")
                names = self._images(folder)
                if name not in names:  # a .JPG on disk may be a .jpg in the list
                    name = next((n for n in names if n.lower() == name.lower()), "")
                if parsed is None:
                    faults.append(Fault("index", relative, f"{complaint} (in {listed})"))
                elif not name:
                    faults.append(Fault("missing", relative, f"listed in {listed}, not on disk"))
                elif relative in seen:
                    faults.append(Fault("index", relative, f"listed twice, at last in {listed}"))
                elif complaint:
                    faults.append(Fault("mislabelled", relative, complaint))
                elif (
                    identities.setdefault(label, parsed[0]) != parsed[0]
                    or labels.setdefault(parsed[0], label) != label
                ):
                    detail = f"label {label} in {listed} contradicts earlier lines"
                    faults.append(Fault("mislabelled", relative, detail))
                else:
                    samples.append(Sample(self._path(f"{folder}/{name}"), *parsed))
                seen.add(relative)
        return samples, faults

    def _parse(self, relative: str) -> tuple[tuple[int, int, str] | None, str]:
        """(identity, camera, modality) of a path and what in it contradicts them; or None, why."""
        raise NotImplementedError
