"""SYSU-MM01, RegDB and LLCM from the folders their authors hand out, and all their facts.

Only names are read. Identities and cameras come from the path below the root, so the root may be
called anything. What the readers cannot trust (a file in another identity's folder, a listed file
that is absent, an identity of one modality in training) is a :class:`Fault`: one line of error, or
with ``skip_broken`` left out with a counted warning. ``deen_zoo.data.check`` lists all of them.

A dataset or protocol of your own: subclass :class:`ReidDataset`, decorate it with
:func:`register_dataset`, and name who queries whom by :func:`register_protocol`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

from ..errors import UserError, check_choice, load_object
from .folder import OwnData
from .protocols import INFRARED, PROTOCOLS, RULES, VISIBLE, Protocol, Sample
from .reader import Fault, Listing, ReidDataset

__all__ = ["DATASETS", "LLCM", "RegDB", "SyntheticLLCM", "SysuMM01", "get_dataset", "open_dataset"]
__all__ += ["known_datasets", "register_dataset", "register_protocol"]

DATASETS: dict[str, type[ReidDataset]] = {}
_Kind = TypeVar("_Kind", bound=type[ReidDataset])


def register_dataset(kind: _Kind) -> _Kind:
    """Make a dataset known by its ``name``; a class decorator.

    Raises:
        UserError: The name or the title is missing, or another class has that name.
    """
    name = getattr(kind, "name", "")
    if not name or not getattr(kind, "title", ""):
        raise UserError(f"dataset class {kind.__name__}: give it a name and a title")
    if DATASETS.get(name, kind).__qualname__ != kind.__qualname__:
        raise UserError(f"dataset {name!r} is registered already: choose another name")
    DATASETS[name] = kind
    return kind


def register_protocol(name: str, protocol: Protocol) -> Protocol:
    """Make a protocol known by its name; register its dataset first.

    Raises:
        UserError: Another protocol has that name, or the row names no known dataset, modality,
            rule or side.
    """
    if PROTOCOLS.get(name, protocol) != protocol:
        raise UserError(f"protocol {name!r} is registered already: choose another name")
    check_choice(f"protocol {name}: dataset", protocol.dataset, DATASETS)
    check_choice(f"protocol {name}: query", protocol.query, (VISIBLE, INFRARED))
    check_choice(f"protocol {name}: gallery", protocol.gallery, (VISIBLE, INFRARED))
    check_choice(f"protocol {name}: rule", protocol.rule, RULES)
    check_choice(f"protocol {name}: sampled", protocol.sampled, ("gallery", "query", ""))
    if not protocol.trials:
        raise UserError(f"protocol {name}: no trials; give at least one number")
    PROTOCOLS[name] = protocol
    return protocol


def get_dataset(name: str) -> type[ReidDataset]:
    """The class of a dataset, which holds all its facts.

    Args:
        name: A registered name, or ``package.module:Class`` of one's own.

    Raises:
        UserError: There is none; the message lists the known ones.
    """
    if ":" in name:
        kind = load_object(name, "dataset")
        if not (isinstance(kind, type) and issubclass(kind, ReidDataset)):
            raise UserError(f"dataset {name}: it is not a subclass of deen_zoo.data.ReidDataset")
        return register_dataset(kind)
    check_choice("dataset", name, DATASETS)
    return DATASETS[name]


def known_datasets() -> str:
    """What names a dataset, in words."""
    return f"{', '.join(DATASETS)}, or package.module:Class of your own"


def several_splits() -> str:
    """The datasets that have several splits and their numbers, in words.

    >>> several_splits()
    "RegDB's splits 1 to 10"
    """
    kinds = [kind for kind in DATASETS.values() if len(kind.splits) > 1]
    return ", ".join(f"{k.title}'s splits {k.splits[0]} to {k.splits[-1]}" for k in kinds)


@register_dataset
class SysuMM01(ReidDataset):
    """``cam1..cam6/0001/0001.jpg``, cameras 3 and 6 infrared; identities of splits in ``exp``."""

    name, title = "sysu", "SYSU-MM01"
    home = "https://github.com/wuancong/SYSU-MM01"
    ask = f"the signed agreement in {home}"
    cameras: ClassVar[Mapping[str, tuple[int, ...]]] = {
        VISIBLE: (1, 2, 4, 5),
        INFRARED: (3, 6),
    }
    folders = (*(f"cam{camera}" for camera in range(1, 7)), "exp")
    index = "exp"
    test_ids = "exp/test_id.txt"
    default_model = "deen_resnet50_sysu"
    erasing_area = (0.2, 0.8)
    # train, query and gallery: facts of the protocol as the field reports them; cameras of the test
    # set and the indoor gallery: from the lengths in the authors' own test_id and rand_perm_cam
    expected: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "train": {"identities": 395, "visible": 22258, "infrared": 11909},
        "test": {
            "identities": 96, "visible": 6775, "infrared": 3803,
            "visible camera 1": 1374, "visible camera 2": 1565,
            "visible camera 4": 1918, "visible camera 5": 1918,
            "infrared camera 3": 1883, "infrared camera 6": 1920,
        },
        "sysu-all": {"query": 3803, "gallery": 301},
        "sysu-indoor": {"query": 3803, "gallery": 112},
    }  # fmt: skip

    def list_train(self, split: int) -> Listing:
        ids = {*self._identities("exp/train_id.txt"), *self._identities("exp/val_id.txt")}
        return self._read_folders(sorted(ids))

    def list_test(self, split: int) -> Listing:
        return self._read_folders(self._identities(self.test_ids))

    def _read_folders(self, identities: list[int]) -> Listing:
        samples = [
            Sample(self._path(f"{folder}/{name}"), identity, camera, modality)
            for modality, cameras in self.cameras.items()
            for identity in identities
            for camera in cameras
            for folder in [f"cam{camera}/{identity:04d}"]
            for name in self._images(folder)
            if self.belongs(f"{folder}/{name}")
        ]
        return samples, self._absent(identities, samples)

    def belongs(self, relative: str) -> bool:
        return re.fullmatch(r"cam[1-6]/\d{4}/\d+\.\w+", relative, re.IGNORECASE) is not None


@register_dataset
class RegDB(ReidDataset):
    """``Visible/285/x_v_05528_285.bmp``, ``Thermal/...``; ten splits into halves in ``idx``.

    It has one camera of each modality: the visible one is 1 here, the thermal one 2.
    """

    name, title = "regdb", "RegDB"
    home = "http://dm.dongguk.edu/link.html"
    ask = f"DBPerson-Recog-DB1 on {home}"
    folders = ("Visible", "Thermal", "idx")
    index = "idx"
    default_model = "deen_resnet50_regdb"
    splits = range(1, 11)
    expected: ClassVar[Mapping[str, Mapping[str, int]]] = {
        **{
            f"{part} {split}": {"identities": 206, "visible": 2060, "infrared": 2060}
            for split in splits
            for part in ("train", "test")
        },
        "regdb-vis2ir": {"query": 2060, "gallery": 2060},
        "regdb-ir2vis": {"query": 2060, "gallery": 2060},
    }

    def list_train(self, split: int) -> Listing:
        return self._read_lists(f"idx/train_{side}_{split}.txt" for side in ("visible", "thermal"))

    def list_test(self, split: int) -> Listing:
        return self._read_lists(f"idx/test_{side}_{split}.txt" for side in ("visible", "thermal"))

    def belongs(self, relative: str) -> bool:
        return self._parse(relative)[0] is not None

    def _parse(self, relative: str) -> tuple[tuple[int, int, str] | None, str]:
        match = re.fullmatch(r"(Visible|Thermal)/(\d+)/([^/]+)\.\w+", relative, re.IGNORECASE)
        if match is None:
            return None, "not Visible/IDENTITY/name or Thermal/IDENTITY/name"
        side, identity = match[1].lower(), int(match[2])
        named = re.search(r"_([vt])_\d+_(\d+)$", match[3])
        complaint = ""
        if named and (int(named[2]) != identity or named[1] != side[0]):
            complaint = f"the name says {named[1]} and identity {int(named[2])}"
        return (identity, *((1, VISIBLE) if side == "visible" else (2, INFRARED))), complaint


@register_dataset
class LLCM(ReidDataset):
    """``vis/0001/0001_c01_x_vis.jpg``, ``nir``, listed in ``idx``; ``test_vis/cam1/0003/...``."""

    name, title = "llcm", "LLCM"
    home = "https://github.com/ZYK100/LLCM"
    ask = f"the signed agreement in {home}"
    test_cameras: ClassVar[Mapping[str, tuple[int, ...]]] = {
        VISIBLE: (1, 2, 3, 4, 5, 6, 7, 8, 9),
        INFRARED: (1, 2, 4, 5, 6, 7, 8, 9),
    }
    folders = (
        "vis", "nir", "idx",
        *(f"test_vis/cam{camera}" for camera in test_cameras[VISIBLE]),
        *(f"test_nir/cam{camera}" for camera in test_cameras[INFRARED]),
    )  # fmt: skip
    index = "idx"
    test_ids = "idx/test_id.txt"
    expected: ClassVar[Mapping[str, Mapping[str, int]]] = {  # as published; adjusted since
        "train": {"identities": 713, "visible": 16946, "infrared": 13975},
        "test": {"identities": 351, "visible": 8680, "infrared": 7166},
        "llcm-ir2vis": {"query": 7166},
        "llcm-vis2ir": {"query": 8680},
        "llcm-vis2ir-official": {"gallery": 8680},
    }

    def list_train(self, split: int) -> Listing:
        return self._read_lists(["idx/train_vis.txt", "idx/train_nir.txt"])

    def list_test(self, split: int) -> Listing:
        samples, faults = [], []
        identities = self._identities(self.test_ids)
        for side, modality in (("vis", VISIBLE), ("nir", INFRARED)):
            for identity in identities:
                for camera in self.test_cameras[modality]:
                    folder = f"test_{side}/cam{camera}/{identity:04d}"
                    for relative in (f"{folder}/{name}" for name in self._images(folder)):
                        parsed, complaint = self._parse(relative)
                        if complaint and parsed:
                            faults.append(Fault("mislabelled", relative, complaint))
                        elif parsed:
                            samples.append(Sample(self._path(relative), *parsed))
        return samples, faults + self._absent(identities, samples)

    def belongs(self, relative: str) -> bool:
        return self._parse(relative)[0] is not None

    def _parse(self, relative: str) -> tuple[tuple[int, int, str] | None, str]:
        match = re.fullmatch(
            r"(?:test_)?(vis|nir)/(?:cam(\d)/)?(\d+)/(\d+)_c(\d+)_([^/]*)\.\w+",
            relative,
            re.IGNORECASE,
        )
        if match is None:
            return None, "not vis/IDENTITY/IDENTITY_cCAMERA_name or nir/..."
        side, folder_camera, folder_identity, identity, camera, rest = match.groups()
        side = side.lower()
        complaint = ""
        if int(identity) != int(folder_identity):
            complaint = f"the name says identity {int(identity)}"
        elif folder_camera and int(camera) != int(folder_camera):
            complaint = f"the name says camera {int(camera)}"
        elif rest.endswith(("vis", "nir")) and not rest.endswith(side):
            complaint = f"the name says {rest[-3:]}"
        modality = VISIBLE if side == "vis" else INFRARED
        return (int(folder_identity), int(camera), modality), complaint

    def version(self, counts: Mapping[str, Mapping[str, int]]) -> str:
        differ, near = [], True
        for split in ("train", "test"):
            for side in ("identities", VISIBLE, INFRARED):
                found, want = counts.get(split, {}).get(side, 0), self.expected[split][side]
                near = near and abs(found - want) <= 0.1 * want
                if found != want:
                    differ.append(f"{found:,} {side} in {split} where {want:,} were published")
        if not differ:
            return (
                "the version of the paper, as every count is the published one: compare results "
                "with the paper's table (DEEN: llcm-ir2vis 54.9 / 62.9)"
            )
        if near:
            return (
                "either an incomplete copy, or the version adjusted after publication (issue 28 of "
                "its repository, July 2024), whose counts are not published and on which results "
                f"are higher: {'; '.join(differ)}; compare results on that version with the "
                "repository's table (DEEN: llcm-ir2vis 55.52 / 62.07), not the paper's"
            )
        return f"neither the published version nor the adjusted one: {'; '.join(differ)}"


register_dataset(OwnData)


@register_dataset
class SyntheticLLCM(LLCM):
    """Drawn people in LLCM's layout, see :mod:`deen_zoo.synthetic`."""

    name, title, home, ask = "synthetic", "the synthetic world", "", ""
    layout = LLCM.name
    expected: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    default_model, default_recipe = "test_deen_resnet", "synthetic"
    synthetic = True


def open_dataset(name: str, root: str | os.PathLike[str], skip_broken: bool = False) -> ReidDataset:
    """A dataset by name, from the folder that holds it as its authors hand it out.

    Args:
        name: ``"sysu"``, ``"regdb"``, ``"llcm"``, ``"own"`` for the user's own images (see
            :class:`~deen_zoo.data.folder.OwnData`), ``"synthetic"``, a registered one, or
            ``"package.module:Class"`` of one's own.
        root: The folder with ``cam1``, ``Visible``, ``test_vis`` or ``visible`` in it.
        skip_broken: Leave out what can't be trusted, with one counted warning, instead of raising.

    Raises:
        UserError: Unknown name; no such folder; or a folder that is not of this layout, with the
            folder or the name to give instead where that can be told.
    """
    kind, folder = get_dataset(name), Path(root).expanduser()
    if not folder.is_dir():
        holding = f"the one that holds {kind.folders[0]}" if kind.folders else "its root"
        given = f" {kind.title} is given out on request only: {kind.ask}" if kind.ask else ""
        raise UserError(f"{folder}: there is no such folder; give {holding}.{given}")
    absent = kind.absent(folder)
    if not absent:
        return kind(folder, skip_broken)
    raise UserError(
        f"{folder}: not {kind.title}: it has no folder {', '.join(absent[:3])}"
        f"{', ...' if len(absent) > 3 else ''}; {_advice(kind, folder)}"
    )


def _advice(kind: type[ReidDataset], folder: Path) -> str:
    """What to give instead of a folder that is not of the layout ``kind``."""
    for other in DATASETS.values():
        if other is not kind and not other.layout and other.looks_like(folder):
            return f"it looks like {other.title}: name it '{other.name}'"
    whole = folder.resolve()
    below = (path for depth in ("*/", "*/*/") for path in whole.glob(depth))
    for place in (*whole.parents[:2], *sorted(itertools.islice(below, 1000))):
        with contextlib.suppress(OSError):  # a folder that may not be read
            if place.is_dir() and kind.looks_like(place):
                return f"did you mean {place}?"
    if kind.ask:
        return f"copy it again from the source ({kind.ask})"
    return (
        "lay images out as visible/IDENTITY/*.jpg and infrared/IDENTITY/*.jpg, or list them in "
        "images.csv"
    )
