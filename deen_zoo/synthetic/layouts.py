"""The three layouts: which cameras there are, what the files are called, the index files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.datasets import LLCM, RegDB, SysuMM01
from ..data.protocols import INFRARED, VISIBLE
from .world import Person, Pose, stream

_FRAME, _SPLIT, _DRAW = 10, 11, 12  # names of random streams
DRAWS = 10  # of the gallery, as SYSU-MM01's authors hand out


class Shot(NamedTuple):
    """One picture to take."""

    identity: int
    camera: int
    modality: str
    take: int  # counts the pictures of one identity in one camera and modality


Paths = dict[Shot, str]


class Layout(NamedTuple):
    """A dataset's shape, near the real one's numbers, and how its files are named and listed."""

    path: Callable[[int, Shot, bool], str]  # of a picture below the root: seed, shot, test or not
    write_index: Callable[[Path, int, Paths, set[int]], None]  # root, seed, paths, who is tested
    size: tuple[int, int]  # typical (width, height) of a crop
    same_size: bool
    low_light: float  # 0 is day, 1 is night
    visible: tuple[int, ...]  # cameras
    infrared: tuple[int, ...]
    sighted: float  # share of the cameras that see an identity
    test_fraction: float
    images_per_camera: int
    test_cameras: Mapping[str, tuple[int, ...]] = {}  # by modality, where they are not all


def split(seed: int, identities: Iterable[int], size: int, number: int = 1) -> set[int]:
    """``size`` identities to test on."""
    drawn = stream(seed, _SPLIT, number).permutation(sorted(identities))[:size]
    return set(drawn.tolist())


def _sysu_path(seed: int, shot: Shot, test: bool) -> str:
    return f"cam{shot.camera}/{shot.identity:04d}/{shot.take + 1:04d}.jpg"


def _regdb_path(seed: int, shot: Shot, test: bool) -> str:
    identity = shot.identity
    folder = "Visible" if shot.modality == VISIBLE else "Thermal"
    view = "back" if Pose(seed, *shot).back else "front"
    who, frame = Person(seed, identity).gender, (1000 * identity + 7 * shot.take) % 100_000
    return f"{folder}/{identity}/{who}_{view}_{folder[0].lower()}_{frame:05d}_{identity}.bmp"


def _llcm_path(seed: int, shot: Shot, test: bool) -> str:
    identity, camera, modality, take = shot
    kind = "vis" if modality == VISIBLE else "nir"
    rng = stream(seed, _FRAME, identity, camera, int(kind == "nir"))
    clock = "{:02d}{:02d}{:02d}".format(*rng.integers((18, 0, 0), (23, 60, 60)))
    folder = f"test_{kind}/cam{camera}" if test else kind
    frame = int(rng.integers(100, 9000)) + 15 * take
    name = f"{identity:04d}_c{camera:02d}_s{clock}_f{frame}_{kind}.jpg"
    return f"{folder}/{identity:04d}/{name}"


def _ids(identities: Iterable[int]) -> str:
    return ",".join(map(str, sorted(identities))) + "\n"


def _labelled(paths: Paths, modality: str, chosen: set[int]) -> str:
    """Lines ``path label``; labels number the chosen identities from 0."""
    label = {identity: n for n, identity in enumerate(sorted(chosen))}
    rows = sorted(s for s in paths if s.modality == modality and s.identity in chosen)
    return "".join(f"{paths[shot]} {label[shot.identity]}\n" for shot in rows)


def _index_sysu(root: Path, seed: int, paths: Paths, test: set[int]) -> None:
    everyone = {shot.identity for shot in paths}
    rest = everyone - test
    val = split(seed, rest, max(1, len(rest) // 4), number=2)  # an empty list is a fault
    (root / "exp").mkdir()
    for name, chosen in (("train", rest - val), ("val", val), ("test", test)):
        (root / f"exp/{name}_id.txt").write_text(_ids(chosen))
    counts = np.zeros((6, max(everyone)), int)
    for shot in paths:
        counts[shot.camera - 1, shot.identity - 1] += 1
    rng = stream(seed, _DRAW)
    cells = np.empty((6, 1), object)
    for camera, row in enumerate(counts.tolist()):
        cells[camera, 0] = np.empty((len(row), 1), object)
        for n, images in enumerate(row):  # ten permutations, one per draw
            rows = [rng.permutation(images) + 1 for _ in range(DRAWS if images else 0)]
            cells[camera, 0][n, 0] = np.array(rows, np.uint16).reshape(len(rows), images)
    _write_mat(root / "exp/rand_perm_cam.mat", {"rand_perm_cam": cells})


def _write_mat(file: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a MATLAB file without a date in it, or warn that scipy is missing."""
    try:
        from scipy.io import savemat
    except ImportError:
        warnings.warn(
            f"{file.name} is not written, so the official draw is not available: scipy is not "
            "installed; install it with: pip install 'deen-zoo[mat]'",
            stacklevel=2,
        )
        return
    content = io.BytesIO()
    savemat(content, arrays)
    header = b"MATLAB 5.0 MAT-file, synthetic".ljust(116)  # savemat's own has the date in it
    file.write_bytes(header + content.getvalue()[len(header) :])


def _index_regdb(root: Path, seed: int, paths: Paths, test: set[int]) -> None:
    (root / "idx").mkdir()
    everyone = {shot.identity for shot in paths}
    for number in RegDB.splits:
        held_out = test if number == 1 else split(seed, everyone, len(test), number)
        for side, chosen in (("train", everyone - held_out), ("test", held_out)):
            for word, modality in (("visible", VISIBLE), ("thermal", INFRARED)):
                text = _labelled(paths, modality, chosen)
                (root / f"idx/{side}_{word}_{number}.txt").write_text(text)


def _index_llcm(root: Path, seed: int, paths: Paths, test: set[int]) -> None:
    for folder in LLCM.folders:  # there, if only to be empty: the reader misses none
        (root / folder).mkdir(parents=True, exist_ok=True)
    train = {shot.identity for shot in paths} - test
    (root / "idx/train_vis.txt").write_text(_labelled(paths, VISIBLE, train))
    (root / "idx/train_nir.txt").write_text(_labelled(paths, INFRARED, train))
    (root / "idx/test_id.txt").write_text(_ids(test))


_NINE = LLCM.test_cameras[VISIBLE]
LAYOUTS = {
    "sysu": Layout(
        _sysu_path, _index_sysu, (72, 192), False, 0.3, SysuMM01.cameras[VISIBLE],
        SysuMM01.cameras[INFRARED], 0.8, 96 / 491, 4,
    ),
    "regdb": Layout(_regdb_path, _index_regdb, (64, 128), True, 0.2, (1,), (2,), 1.0, 0.5, 10),
    "llcm": Layout(
        _llcm_path, _index_llcm, (72, 192), False, 0.8, _NINE, _NINE, 0.5, 351 / 1064, 2,
        test_cameras=LLCM.test_cameras,
    ),
}  # fmt: skip
