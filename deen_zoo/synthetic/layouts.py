"""The three layouts: which cameras there are, what the files are called, the index files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .world import Person, Pose, stream

_FRAME, _SPLIT, _DRAW = 10, 11, 12  # names of random streams
TRIALS = 10


class Layout(NamedTuple):
    """A dataset's shape; the numbers are near the real ones'."""

    size: tuple[int, int]  # typical (width, height) of a crop
    same_size: bool
    low_light: float  # 0 is day, 1 is night
    visible: tuple[int, ...]  # cameras
    infrared: tuple[int, ...]
    sighted: float  # share of the cameras that see an identity
    test_fraction: float
    images_per_camera: int


_NINE = tuple(range(1, 10))
LAYOUTS = {
    "sysu": Layout((72, 192), False, 0.3, (1, 2, 4, 5), (3, 6), 0.8, 96 / 491, 4),
    "regdb": Layout((64, 128), True, 0.2, (1,), (2,), 1.0, 0.5, 10),
    "llcm": Layout((72, 192), False, 0.8, _NINE, _NINE, 0.5, 351 / 1064, 2),
}


class Shot(NamedTuple):
    """One picture to take."""

    identity: int
    camera: int
    modality: str
    take: int  # counts the pictures of one identity in one camera and modality


Paths = dict[Shot, str]


def split(seed: int, identities: Iterable[int], size: int, trial: int = 1) -> set[int]:
    """``size`` identities to test on."""
    drawn = stream(seed, _SPLIT, trial).permutation(sorted(identities))[:size]
    return set(drawn.tolist())


def path_of(layout: str, seed: int, shot: Shot, test: bool) -> str:
    """Where a picture lies, below the root."""
    identity, camera, modality, take = shot
    if layout == "sysu":
        return f"cam{camera}/{identity:04d}/{take + 1:04d}.jpg"
    if layout == "regdb":
        folder = "Visible" if modality == "visible" else "Thermal"
        view = "back" if Pose(seed, *shot).back else "front"
        who, frame = Person(seed, identity).gender, (1000 * identity + 7 * take) % 100_000
        return f"{folder}/{identity}/{who}_{view}_{folder[0].lower()}_{frame:05d}_{identity}.bmp"
    kind = "vis" if modality == "visible" else "nir"
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
    val = split(seed, rest, max(1, len(rest) // 4), trial=2)  # an empty list is a fault
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
            rows = [rng.permutation(images) + 1 for _ in range(TRIALS if images else 0)]
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
    for trial in range(1, TRIALS + 1):
        held_out = test if trial == 1 else split(seed, everyone, len(test), trial)
        for side, chosen in (("train", everyone - held_out), ("test", held_out)):
            for word, modality in (("visible", "visible"), ("thermal", "infrared")):
                text = _labelled(paths, modality, chosen)
                (root / f"idx/{side}_{word}_{trial}.txt").write_text(text)


def _index_llcm(root: Path, seed: int, paths: Paths, test: set[int]) -> None:
    (root / "idx").mkdir()
    for kind, cameras in (("vis", range(1, 10)), ("nir", (1, 2, *range(4, 10)))):
        for camera in cameras:  # there, if only to be empty: the reader takes none for missing
            (root / f"test_{kind}/cam{camera}").mkdir(parents=True, exist_ok=True)
    train = {shot.identity for shot in paths} - test
    (root / "idx/train_vis.txt").write_text(_labelled(paths, "visible", train))
    (root / "idx/train_nir.txt").write_text(_labelled(paths, "infrared", train))
    (root / "idx/test_id.txt").write_text(_ids(test))


write_index: dict[str, Callable[[Path, int, Paths, set[int]], None]] = {
    "sysu": _index_sysu,
    "regdb": _index_regdb,
    "llcm": _index_llcm,
}
