"""SYSU-MM01, RegDB and LLCM from the folders their authors hand out, as lists of samples.

Only names are read. Identities and cameras come from the path below the root, so the root may be
called anything. What the readers cannot trust (a file in another identity's folder, a listed file
that is absent, an identity of one modality in training) is a :class:`Fault`: one line of error, or
with ``skip_broken`` left out with a counted warning. ``deen_zoo.data.check`` lists all of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import UserError
from .folder import OwnData
from .protocols import INFRARED, PROTOCOLS, SPLITS, VISIBLE, Protocol, Sample, draw_gallery
from .protocols import read_permutations as read_permutations
from .reader import Fault, ReidDataset

__all__ = ["DATASETS", "LLCM", "PROTOCOLS", "Fault", "Protocol", "RegDB", "ReidDataset", "Sample"]
__all__ += ["SysuMM01", "draw_gallery", "open_dataset", "read_permutations"]


class SysuMM01(ReidDataset):
    """``cam1..cam6/0001/0001.jpg``, cameras 3 and 6 infrared; identities of splits in ``exp``."""

    name, title = "sysu", "SYSU-MM01"
    home = "https://github.com/wuancong/SYSU-MM01"
    ask = f"the signed agreement in {home}"
    folders = (*(f"cam{camera}" for camera in range(1, 7)), "exp")
    # train, query and gallery: facts of the protocol as the field reports them; cameras of the test
    # set and the indoor gallery: from the lengths in the authors' own test_id and rand_perm_cam
    expected = {
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

    def _read_train(self, trial: int) -> tuple[list[Sample], list[Fault]]:
        ids = {*self._identities("exp/train_id.txt"), *self._identities("exp/val_id.txt")}
        return self._read_folders(sorted(ids))

    def read_test(self, trial: int = 1) -> tuple[list[Sample], list[Fault]]:
        return self._read_folders(self._identities("exp/test_id.txt"))

    def _test_identities(self, trial: int) -> set[int]:
        return set(self._identities("exp/test_id.txt"))

    def _read_folders(self, identities: list[int]) -> tuple[list[Sample], list[Fault]]:
        samples = [
            Sample(self._path(f"{folder}/{name}"), identity, camera, modality)
            for modality, cameras in ((VISIBLE, (1, 2, 4, 5)), (INFRARED, (3, 6)))
            for identity in identities
            for camera in cameras
            for folder in [f"cam{camera}/{identity:04d}"]
            for name in self._images(folder)
            if self.belongs(f"{folder}/{name}")
        ]
        return samples, self._absent(identities, samples)

    def belongs(self, relative: str) -> bool:
        return re.fullmatch(r"cam[1-6]/\d{4}/\d+\.\w+", relative) is not None


class RegDB(ReidDataset):
    """``Visible/285/x_v_05528_285.bmp``, ``Thermal/...``; ten splits into halves in ``idx``.

    It has one camera of each modality: the visible one is 1 here, the thermal one 2.
    """

    name, title = "regdb", "RegDB"
    home = "http://dm.dongguk.edu/link.html"
    ask = f"DBPerson-Recog-DB1 on {home}"
    folders = ("Visible", "Thermal", "idx")
    trials = SPLITS
    expected = {
        **{
            f"{split} {trial}": {"identities": 206, "visible": 2060, "infrared": 2060}
            for trial in SPLITS
            for split in ("train", "test")
        },
        "regdb-vis2ir": {"query": 2060, "gallery": 2060},
        "regdb-ir2vis": {"query": 2060, "gallery": 2060},
    }

    def _lists(self, split: str, trial: int) -> list[str]:
        return [f"idx/{split}_{side}_{self._trial(trial)}.txt" for side in ("visible", "thermal")]

    def _read_train(self, trial: int) -> tuple[list[Sample], list[Fault]]:
        return self._read_lists(self._lists("train", trial))

    def read_test(self, trial: int = 1) -> tuple[list[Sample], list[Fault]]:
        return self._read_lists(self._lists("test", trial))

    def _test_identities(self, trial: int) -> set[int]:
        return {sample.identity for sample in self.read_test(trial)[0]}

    def _trial(self, trial: int) -> int:
        if trial not in SPLITS:
            raise UserError(f"RegDB has trials 1 to 10, not {trial}")
        return trial

    def belongs(self, relative: str) -> bool:
        return self._parse(relative)[0] is not None

    def _parse(self, relative: str) -> tuple[tuple[int, int, str] | None, str]:
        match = re.fullmatch(r"(Visible|Thermal)/(\d+)/([^/]+)\.\w+", relative)
        if match is None:
            return None, "not Visible/IDENTITY/name or Thermal/IDENTITY/name"
        side, identity = match[1], int(match[2])
        named = re.search(r"_([vt])_\d+_(\d+)$", match[3])
        complaint = ""
        if named and (int(named[2]) != identity or named[1] != side[0].lower()):
            complaint = f"the name says {named[1]} and identity {int(named[2])}"
        return (identity, *((1, VISIBLE) if side == "Visible" else (2, INFRARED))), complaint


class LLCM(ReidDataset):
    """``vis/0001/0001_c01_x_vis.jpg``, ``nir``, listed in ``idx``; ``test_vis/cam1/0003/...``."""

    name, title = "llcm", "LLCM"
    home = "https://github.com/ZYK100/LLCM"
    ask = f"the signed agreement in {home}"
    cameras = {VISIBLE: (1, 2, 3, 4, 5, 6, 7, 8, 9), INFRARED: (1, 2, 4, 5, 6, 7, 8, 9)}
    folders = (
        "vis", "nir", "idx",
        *(f"test_vis/cam{camera}" for camera in cameras[VISIBLE]),
        *(f"test_nir/cam{camera}" for camera in cameras[INFRARED]),
    )  # fmt: skip
    expected = {  # as published; the dataset was adjusted since
        "train": {"identities": 713, "visible": 16946, "infrared": 13975},
        "test": {"identities": 351, "visible": 8680, "infrared": 7166},
        "llcm-ir2vis": {"query": 7166},
        "llcm-vis2ir": {"query": 8680},
        "llcm-vis2ir-official": {"gallery": 8680},
    }

    def _read_train(self, trial: int) -> tuple[list[Sample], list[Fault]]:
        return self._read_lists(["idx/train_vis.txt", "idx/train_nir.txt"])

    def read_test(self, trial: int = 1) -> tuple[list[Sample], list[Fault]]:
        samples, faults = [], []
        identities = self._identities("idx/test_id.txt")
        for side, modality in (("vis", VISIBLE), ("nir", INFRARED)):
            for identity in identities:
                for camera in self.cameras[modality]:
                    folder = f"test_{side}/cam{camera}/{identity:04d}"
                    for relative in (f"{folder}/{name}" for name in self._images(folder)):
                        parsed, complaint = self._parse(relative)
                        if complaint and parsed:
                            faults.append(Fault("mislabelled", relative, complaint))
                        elif parsed:
                            samples.append(Sample(self._path(relative), *parsed))
        return samples, faults + self._absent(identities, samples)

    def _test_identities(self, trial: int) -> set[int]:
        return set(self._identities("idx/test_id.txt"))

    def belongs(self, relative: str) -> bool:
        return self._parse(relative)[0] is not None

    def _parse(self, relative: str) -> tuple[tuple[int, int, str] | None, str]:
        match = re.fullmatch(
            r"(?:test_)?(vis|nir)/(?:cam(\d)/)?(\d+)/(\d+)_c(\d+)_([^/]*)\.\w+", relative
        )
        if match is None:
            return None, "not vis/IDENTITY/IDENTITY_cCAMERA_name or nir/..."
        side, folder_camera, folder_identity, identity, camera, rest = match.groups()
        complaint = ""
        if int(identity) != int(folder_identity):
            complaint = f"the name says identity {int(identity)}"
        elif folder_camera and int(camera) != int(folder_camera):
            complaint = f"the name says camera {int(camera)}"
        elif rest.endswith(("vis", "nir")) and not rest.endswith(side):
            complaint = f"the name says {rest[-3:]}"
        modality = VISIBLE if side == "vis" else INFRARED
        return (int(folder_identity), int(camera), modality), complaint


DATASETS: dict[str, type[ReidDataset]] = {
    kind.name: kind for kind in (SysuMM01, RegDB, LLCM, OwnData)
}


def open_dataset(name: str, root: str | os.PathLike[str], skip_broken: bool = False) -> ReidDataset:
    """A dataset by name, from the folder that holds it as its authors hand it out.

    Args:
        name: ``"sysu"``, ``"regdb"``, ``"llcm"``, or ``"own"`` for one's own images, see
            :class:`~deen_zoo.data.folder.OwnData`.
        root: The folder with ``cam1``, ``Visible``, ``test_vis`` or ``test`` in it.
        skip_broken: Leave out what can't be trusted, with one counted warning, instead of raising.

    Raises:
        UserError: Unknown name; no such folder; or a folder that is not of this layout, with the
            folder or the name to give instead where that can be told.
    """
    if name not in DATASETS:
        raise UserError(f"dataset {name!r}; known are {', '.join(DATASETS)}")
    kind, folder = DATASETS[name], Path(root).expanduser()
    if not folder.is_dir():
        given = f" {kind.title} is given out on request only: {kind.ask}" if kind.ask else ""
        raise UserError(
            f"{folder}: there is no such folder; give the one that holds {kind.folders[0]}.{given}"
        )
    absent = [sub for sub in kind.folders if not (folder / sub).is_dir()]
    if not absent:
        return kind(folder, skip_broken)
    raise UserError(
        f"{folder}: not {kind.title}: it has no folder {', '.join(absent[:3])}"
        f"{', ...' if len(absent) > 3 else ''}; {_advice(kind, folder)}"
    )


def _advice(kind: type[ReidDataset], folder: Path) -> str:
    """What to give instead of a folder that is not of the layout ``kind``."""

    def holds(other: type[ReidDataset], place: Path) -> bool:
        return all((place / sub.split("/")[0]).is_dir() for sub in other.folders)

    for other in DATASETS.values():
        if other is not kind and holds(other, folder):
            return f"it looks like {other.title}: name it '{other.name}'"
    whole = folder.resolve()
    near = [*whole.parents[:2], *sorted(p for p in whole.iterdir() if p.is_dir())]
    for place in near:
        if holds(kind, place):
            return f"did you mean {place}?"
    return f"copy it again from the source ({kind.ask})" if kind.ask else "see docs/features.md"
