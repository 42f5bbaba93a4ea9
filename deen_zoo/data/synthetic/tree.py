"""Synthetic datasets on disk, in the very layouts of SYSU-MM01, RegDB and LLCM.

The stream of random numbers of each picture is named by what it shows, so a tree is the same to
the byte for any number of worker processes (with the same versions of Pillow and NumPy).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ...errors import UserError
from .picture import draw
from .world import Camera, Person, Pose, stream

__all__ = ["LAYOUTS", "SyntheticTree", "contact_sheet", "picture", "synthesize"]

_PICTURE, _SIGHTING, _SPLIT, _DRAW = 10, 11, 12, 13  # names of random streams
_FEWEST, _MOST = 4, 9999  # identities: two to train and two to test; four digits in names
_INLINE = 200  # up to so many pictures, starting worker processes costs more than it saves
TRIALS = 10


class _Layout(NamedTuple):
    size: tuple[int, int]  # typical (width, height) of a crop
    same_size: bool
    low_light: float
    visible: tuple[int, ...]  # cameras
    infrared: tuple[int, ...]
    sighted: float  # share of the cameras that see an identity
    test_fraction: float
    images_per_camera: int


LAYOUTS = {
    "sysu": _Layout((72, 192), False, 0.3, (1, 2, 4, 5), (3, 6), 0.8, 96 / 491, 4),
    "regdb": _Layout((64, 128), True, 0.2, (1,), (2,), 1.0, 0.5, 10),
    "llcm": _Layout((72, 192), False, 0.8, (*range(1, 10),), (*range(1, 10),), 0.5, 351 / 1064, 2),
}


class _Shot(NamedTuple):
    identity: int
    camera: int
    modality: str
    take: int  # counts an identity's pictures in one camera and modality


@dataclass(frozen=True)
class SyntheticTree:
    """What :func:`synthesize` wrote."""

    root: str
    layout: str
    seed: int
    identities: int
    test_identities: int
    visible_images: int
    infrared_images: int
    images_per_camera: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def synthesize(
    layout: str,
    root: str | os.PathLike[str],
    identities: int = 32,
    seed: int = 0,
    images_per_camera: int | None = None,
    test_fraction: float | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> SyntheticTree:
    """Write a synthetic dataset: folders, images and index files as in the real one.

    The tree is built beside ``root`` under a temporary name and renamed when complete.

    Args:
        layout: ``"sysu"``, ``"regdb"`` or ``"llcm"``.
        root: A folder that does not exist yet, or is empty.
        identities: How many people, from 4 up to 9,999.
        seed: Of the world: the same people, cameras and pictures for the same number.
        images_per_camera: Of each identity, in each camera (and modality) that sees it;
            4, 10 and 2 by default for the three layouts.
        test_fraction: Share of the identities to test on; by default as in the real dataset
            (96 of 491, a half, 351 of 1,064). At least two identities stay on either side.
        workers: Processes that draw; the number of available CPU cores by default. Where processes
            are spawned (macOS, Windows), the calling script needs the usual ``__main__`` guard.
        progress: Show a progress bar where stderr is a terminal.

    Raises:
        UserError: An unknown layout, a number out of range, or ``root`` is in use.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tree = synthesize("regdb", folder, identities=4, images_per_camera=1)
    ...     names = sorted(os.listdir(folder))
    >>> tree.visible_images, tree.infrared_images, names
    (4, 4, ['Thermal', 'Visible', 'idx', 'synthetic.json'])
    """
    start = time.monotonic()
    target = Path(root)
    _check(layout, target, identities, seed, images_per_camera, test_fraction, workers)
    spec = LAYOUTS[layout]
    each = images_per_camera or spec.images_per_camera
    fraction = spec.test_fraction if test_fraction is None else test_fraction
    held_out = min(max(2, round(identities * fraction)), identities - 2)
    shuffled = stream(seed, _SPLIT).permutation(identities) + 1
    test = sorted(shuffled[:held_out].tolist())

    sighted = [
        _sightings(layout, seed, identity, each, test) for identity in range(1, identities + 1)
    ]
    shots = [shot for person in sighted for shot in person]
    paths = {shot: _PATHS[layout](seed, shot, shot.identity in set(test)) for shot in shots}

    target.parent.mkdir(parents=True, exist_ok=True)
    partial_tree = target.parent / f".{target.name}.partial-{os.getpid()}"
    partial_tree.mkdir()
    try:
        jobs = [[(shot, str(partial_tree / paths[shot])) for shot in person] for person in sighted]
        _draw_all(partial(_draw_person, layout, seed), jobs, len(shots), workers, progress)
        _INDEXES[layout](partial_tree, seed, paths, test)
        tree = SyntheticTree(
            root=str(target),
            layout=layout,
            seed=seed,
            identities=identities,
            test_identities=held_out,
            visible_images=sum(shot.modality == "visible" for shot in shots),
            infrared_images=sum(shot.modality == "infrared" for shot in shots),
            images_per_camera=each,
            seconds=round(time.monotonic() - start, 2),
        )
        note = {k: v for k, v in tree.to_dict().items() if k not in ("root", "seconds")}
        note = {"note": "drawn by deen_zoo synthesize; shows no real person", **note}
        (partial_tree / "synthetic.json").write_text(json.dumps(note, indent=2) + "\n")
        if target.is_dir():
            target.rmdir()
        partial_tree.rename(target)
    except BaseException:
        shutil.rmtree(partial_tree, ignore_errors=True)
        raise
    return tree


def _check(
    layout: str,
    root: Path,
    identities: int,
    seed: int,
    images_per_camera: int | None,
    test_fraction: float | None,
    workers: int | None,
) -> None:
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if not _FEWEST <= identities <= _MOST:
        raise UserError(f"identities is {identities}; give a number from {_FEWEST} to {_MOST}")
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or a positive number")
    if images_per_camera is not None and not 1 <= images_per_camera <= 999:
        raise UserError(f"images_per_camera is {images_per_camera}; give a number from 1 to 999")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise UserError(f"test_fraction is {test_fraction}; give a share between 0 and 1")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; give 1 or more processes")
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; give a folder that does not exist yet or is empty")
    if root.is_dir() and any(root.iterdir()):
        raise UserError(f"{root} is not empty; give a folder that does not exist yet or is empty")


def _sightings(
    layout: str, seed: int, identity: int, each: int, test: Sequence[int]
) -> list[_Shot]:
    """Which cameras see a person. Always the first and, where there is one, a second of either
    modality: so each query has a match under every rule that leaves out cameras."""
    spec, rng, shots = LAYOUTS[layout], stream(seed, _SIGHTING, identity), []
    for modality, cameras in (("visible", spec.visible), ("infrared", spec.infrared)):
        seen = rng.random(len(cameras)) < spec.sighted
        seen[0] = True
        if len(cameras) > 2 and seen.sum() < 2:
            seen[1] = True
        for camera in np.array(cameras)[seen].tolist():
            if layout == "llcm" and identity in test and (modality, camera) == ("infrared", 3):
                continue  # as in the real test_nir
            shots += [_Shot(identity, camera, modality, take) for take in range(each)]
    return shots


def _draw_all(
    work: Callable[[list[tuple[_Shot, str]]], int],
    jobs: list[list[tuple[_Shot, str]]],
    total: int,
    workers: int | None,
    progress: bool,
) -> None:
    workers = workers or (_cores() if total > _INLINE else 1)
    bar = tqdm(total=total, unit="image", desc="drawing", disable=None if progress else True)
    with bar:
        if workers == 1:
            for job in jobs:
                bar.update(work(job))
            return
        pool = ProcessPoolExecutor(workers)
        try:
            for done in pool.map(work, jobs, chunksize=max(1, min(8, len(jobs) // (4 * workers)))):
                bar.update(done)
        finally:
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _draw_person(layout: str, seed: int, job: list[tuple[_Shot, str]]) -> int:
    for shot, path in job:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        picture(layout, seed, *shot).save(path, quality=90)  # BMP has no quality and ignores it
    return len(job)


def picture(
    layout: str, seed: int, identity: int, camera: int, modality: str, take: int
) -> Image.Image:
    """One picture of the world ``seed``, as :func:`synthesize` saves it: RGB if visible, else L."""
    person, rng = _person(seed, identity), _picture_stream(seed, identity, camera, modality, take)
    return draw(person, _camera(layout, seed, camera, modality), Pose.make(rng), rng)


def _picture_stream(
    seed: int, identity: int, camera: int, modality: str, take: int
) -> np.random.Generator:
    return stream(seed, _PICTURE, identity, camera, int(modality == "infrared"), take)


@lru_cache(maxsize=8)
def _person(seed: int, identity: int) -> Person:
    return Person.make(seed, identity)


@lru_cache(maxsize=64)
def _camera(layout: str, seed: int, number: int, modality: str) -> Camera:
    spec = LAYOUTS[layout]
    return Camera.make(seed, number, modality, spec.size, spec.low_light, spec.same_size)


def _sysu_path(seed: int, shot: _Shot, test: bool) -> str:
    return f"cam{shot.camera}/{shot.identity:04d}/{shot.take + 1:04d}.jpg"


def _regdb_path(seed: int, shot: _Shot, test: bool) -> str:
    person, identity = _person(seed, shot.identity), shot.identity
    view = "back" if Pose.make(_picture_stream(seed, *shot)).back else "front"
    folder = "Visible" if shot.modality == "visible" else "Thermal"
    frame = (identity * 1000 + shot.take * 7) % 100_000
    return (
        f"{folder}/{identity}/{person.gender}_{view}_{folder[0].lower()}_{frame:05d}_{identity}.bmp"
    )


def _llcm_path(seed: int, shot: _Shot, test: bool) -> str:
    kind = "vis" if shot.modality == "visible" else "nir"
    rng = stream(seed, _SIGHTING, shot.identity, shot.camera, int(kind == "nir"))
    clock = 18 * 3600 + int(rng.integers(5 * 3600))
    clock = clock // 3600 * 10_000 + clock // 60 % 60 * 100 + clock % 60
    folder = f"test_{kind}/cam{shot.camera}" if test else kind
    frame = int(rng.integers(100, 9000)) + 15 * shot.take
    return (
        f"{folder}/{shot.identity:04d}/"
        f"{shot.identity:04d}_c{shot.camera:02d}_s{clock:06d}_f{frame}_{kind}.jpg"
    )


_PATHS: dict[str, Callable[[int, _Shot, bool], str]] = {
    "sysu": _sysu_path,
    "regdb": _regdb_path,
    "llcm": _llcm_path,
}

_Paths = dict[_Shot, str]


def _ids(numbers: Sequence[int]) -> str:
    return ",".join(map(str, sorted(numbers))) + "\n"


def _labelled(paths: _Paths, modality: str, chosen: Sequence[int]) -> str:
    """Lines ``path label``; labels number the chosen identities from 0."""
    label = {identity: n for n, identity in enumerate(sorted(chosen))}
    rows = [(s, p) for s, p in paths.items() if s.modality == modality and s.identity in label]
    return "".join(f"{path} {label[shot.identity]}\n" for shot, path in sorted(rows))


def _sysu_index(root: Path, seed: int, paths: _Paths, test: Sequence[int]) -> None:
    everyone = sorted({shot.identity for shot in paths})
    rest = [identity for identity in everyone if identity not in set(test)]
    val = stream(seed, _SPLIT, 1).permutation(rest)[: len(rest) // 4].tolist()
    (root / "exp").mkdir()
    for camera in range(1, 7):
        (root / f"cam{camera}").mkdir(exist_ok=True)
    (root / "exp/test_id.txt").write_text(_ids(test))
    (root / "exp/val_id.txt").write_text(_ids(val))
    (root / "exp/train_id.txt").write_text(_ids(sorted(set(rest) - set(val))))
    counts = np.zeros((6, everyone[-1]), int)
    for shot in paths:
        counts[shot.camera - 1, shot.identity - 1] += 1
    (root / "exp/rand_perm_cam.mat").write_bytes(_gallery_draws(seed, counts))


def _gallery_draws(seed: int, counts: NDArray[np.int_]) -> bytes:
    """The SYSU authors' draws: ``rand_perm_cam{camera}{identity}(trial, :)`` permutes 1..n."""
    rng = stream(seed, _DRAW)

    def draws(n: int) -> NDArray[np.int_]:
        rows = [rng.permutation(n) + 1 for _ in range(TRIALS)]
        return np.stack(rows) if n else np.zeros((0, 0), int)

    cells = [[draws(n) for n in row] for row in counts.tolist()]
    return _mat_file("rand_perm_cam", cells)


def _mat_file(name: str, cells: list[list[NDArray[np.int_]]]) -> bytes:
    """A MATLAB 5 file of one cell array of cell arrays of uint16 matrices.

    Written here since ``scipy.io.savemat`` stamps the time of day into its files.
    """

    def element(kind: int, data: bytes) -> bytes:
        return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)

    def array(kind: int, shape: tuple[int, ...], data: bytes, name: bytes = b"") -> bytes:
        head = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<2i", *shape))
        return element(14, head + element(1, name) + data)

    cell, uint16 = 1, 11
    rows = [
        array(
            cell,
            (len(row), 1),
            b"".join(array(uint16, m.shape, element(4, m.astype("<u2").tobytes("F"))) for m in row),
        )
        for row in cells
    ]
    header = b"MATLAB 5.0 MAT-file, synthetic".ljust(124) + b"\x00\x01IM"
    return header + array(cell, (len(cells), 1), b"".join(rows), name.encode())


def _regdb_index(root: Path, seed: int, paths: _Paths, test: Sequence[int]) -> None:
    """Ten random splits; the first tests on ``test``."""
    (root / "idx").mkdir()
    everyone = sorted({shot.identity for shot in paths})
    for trial in range(1, TRIALS + 1):
        drawn = stream(seed, _SPLIT, trial).permutation(everyone)[: len(test)].tolist()
        held_out = set(test) if trial == 1 else set(drawn)
        for side, chosen in (("train", set(everyone) - held_out), ("test", held_out)):
            for word, modality in (("visible", "visible"), ("thermal", "infrared")):
                text = _labelled(paths, modality, sorted(chosen))
                (root / f"idx/{side}_{word}_{trial}.txt").write_text(text)


def _llcm_index(root: Path, seed: int, paths: _Paths, test: Sequence[int]) -> None:
    (root / "idx").mkdir()
    for kind, cameras in (("vis", range(1, 10)), ("nir", (1, 2, *range(4, 10)))):
        for camera in cameras:  # there, if only to be empty: the reader takes none for missing
            (root / f"test_{kind}/cam{camera}").mkdir(parents=True, exist_ok=True)
    train = sorted({shot.identity for shot in paths} - set(test))
    (root / "idx/train_vis.txt").write_text(_labelled(paths, "visible", train))
    (root / "idx/train_nir.txt").write_text(_labelled(paths, "infrared", train))
    (root / "idx/test_id.txt").write_text(_ids(test))


_INDEXES: dict[str, Callable[[Path, int, _Paths, Sequence[int]], None]] = {
    "sysu": _sysu_index,
    "regdb": _regdb_index,
    "llcm": _llcm_index,
}


def contact_sheet(
    layout: str = "llcm", seed: int = 0, identities: int = 8, views: int = 4
) -> Image.Image:
    """People of a world, two to a row: ``views`` visible pictures each, then as many infrared."""
    spec = LAYOUTS[layout]
    width, height = spec.size
    sheet = Image.new(
        "RGB", (4 * views * width + 12, (identities + 1) // 2 * (height + 4)), "white"
    )
    for place in range(identities):
        x, y = (place % 2) * (2 * views * width + 12), place // 2 * (height + 4)
        for side, modality in enumerate(("visible", "infrared")):
            cameras = spec.visible if modality == "visible" else spec.infrared
            for n in range(views):
                image = picture(layout, seed, place + 1, cameras[n % len(cameras)], modality, n)
                left = x + (side * views + n) * width + 4 * side
                sheet.paste(image.convert("RGB").resize((width, height)), (left, y))
    return sheet
