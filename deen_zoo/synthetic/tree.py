"""Synthetic datasets on disk, in the very layouts of SYSU-MM01, RegDB and LLCM.

The stream of random numbers of each picture is named by what it shows, so a tree is the same to
the byte for any number of worker processes (with the same versions of Pillow and NumPy).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from ..data.reader import DRAWN
from ..errors import UserError, check_choice
from ..io import check_new_folder, cores, whole_folder
from .layouts import LAYOUTS, Shot, split
from .picture import draw
from .world import Camera, Person, Pose, stream

_PICTURE, _SIGHTING = 20, 21  # names of random streams
_INLINE = 200  # up to so many pictures, starting worker processes costs more than it saves


class SyntheticTree(NamedTuple):
    """What :func:`synthesize` wrote; the folder's ``synthetic.json`` has the same."""

    layout: str
    seed: int
    identities: int
    test_identities: int
    visible_images: int
    infrared_images: int
    images_per_camera: int


def synthesize(
    layout: str,
    root: str | os.PathLike[str],
    people: int = 32,
    seed: int = 0,
    images_per_camera: int | None = None,
    test_fraction: float | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> SyntheticTree:
    """Write a synthetic dataset: folders, images and index files as in the real one.

    It is drawn in a folder next to ``root`` that gets this name when it is whole, so a tree that
    was interrupted or killed is not there, and is drawn again.

    Args:
        layout: One of :data:`~deen_zoo.synthetic.LAYOUTS`, by its dataset's name.
        root: A folder that does not exist yet, or is empty.
        people: How many, from 4 up to 9,999.
        seed: The same people, cameras and pictures for the same number.
        images_per_camera: Images of each identity in each camera (and modality) that sees it;
            by default 4 for SYSU-MM01, 10 for RegDB and 2 for LLCM.
        test_fraction: Share of the identities to test on; by default as in the real dataset
            (96 of 491, a half, 351 of 1,064). At least two identities stay on either side.
        workers: Processes that draw; the number of available CPU cores by default. Where processes
            are spawned (macOS, Windows), the calling script needs the usual ``__main__`` guard.
        progress: Show a progress bar where stderr is a terminal.

    Raises:
        UserError: An unknown layout, a number out of range, or ``root`` is in use.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tree = synthesize("regdb", folder, people=4, images_per_camera=1)
    ...     names = sorted(path.name for path in Path(folder).iterdir())
    >>> tree.visible_images, tree.infrared_images, names
    (4, 4, ['Thermal', 'Visible', 'idx', 'synthetic.json'])
    """
    target = Path(os.path.realpath(root))
    ranges = {
        "people": (people, 4, 9999),  # two to train and two to test; four digits in names
        "seed": (seed, 0, 2**32 - 1),
        "images_per_camera": (images_per_camera, 1, 999),
        "test_fraction": (test_fraction, 0.0, 1.0),
        "workers": (workers, 1, 256),
    }
    _check(layout, target, ranges)
    spec = LAYOUTS[layout]
    each = images_per_camera or spec.images_per_camera
    fraction = spec.test_fraction if test_fraction is None else test_fraction
    everyone = range(1, people + 1)
    test = split(seed, everyone, min(max(2, round(people * fraction)), people - 2))
    shots = [_sightings(layout, seed, identity, each, identity in test) for identity in everyone]
    paths = {s: spec.path(seed, s, s.identity in test) for person in shots for s in person}

    with whole_folder(target) as workshop:
        jobs = [[(shot, f"{workshop}/{paths[shot]}") for shot in person] for person in shots]
        if multiprocessing.current_process().daemon:  # it may have no children
            workers = 1
        elif workers is None:
            workers = cores() if len(paths) > _INLINE else 1
        off = None if progress else True
        with tqdm(total=len(paths), unit="image", desc="drawing", disable=off) as bar:
            for done in _map(partial(_draw_person, layout, seed), jobs, workers):
                bar.update(done)
        spec.write_index(workshop, seed, paths, test)
        visible = sum(shot.modality == "visible" for shot in paths)
        infrared = len(paths) - visible
        tree = SyntheticTree(layout, seed, people, len(test), visible, infrared, each)
        note = {"note": "drawn by deen_zoo; shows no real person", **tree._asdict()}
        (workshop / DRAWN).write_text(json.dumps(note, indent=2) + "\n")
    return tree


def _check(layout: str, root: Path, ranges: dict[str, tuple[float | None, float, float]]) -> None:
    check_choice("layout", layout, LAYOUTS)
    for name, (value, low, high) in ranges.items():
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; give a number from {low} to {high}")
    check_new_folder(root)
    if root.is_mount():  # it cannot be replaced by the finished folder
        raise UserError(f"{root} is where a disk is mounted; give a folder in it")


def _sightings(layout: str, seed: int, identity: int, each: int, test: bool) -> list[Shot]:
    """The pictures of a person. The first camera of either modality sees everyone, and a second
    one where there are two, so that each query has a match under the rules that exclude cameras."""
    spec, rng = LAYOUTS[layout], stream(seed, _SIGHTING, identity)
    shots = []
    for modality, cameras in (("visible", spec.visible), ("infrared", spec.infrared)):
        seen = [c for c in cameras if rng.random() < spec.sighted or c == cameras[0]]
        if test:
            seen = [c for c in seen if c in spec.test_cameras.get(modality, cameras)]
        if len(seen) < 2 < len(cameras):
            seen.append(cameras[1])
        shots += [Shot(identity, c, modality, take) for c in seen for take in range(each)]
    return shots


Job = list[tuple[Shot, str]]


def _map(work: partial[int], jobs: list[Job], workers: int) -> Iterable[int]:
    if workers == 1:
        yield from map(work, jobs)
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin_worker)
    try:
        with _signals_wait():
            done = pool.map(work, jobs, chunksize=max(1, min(8, len(jobs) // (4 * workers))))
        yield from done
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Delay interrupts until the block ends: one that came while processes are started would leave
    some of them behind, and the pool waiting for them.

    Not by blocking the signals, which is for this thread alone: the system may give a signal to
    another one, tqdm's or NumPy's, and Python would raise here all the same.
    """
    if threading.current_thread() is not threading.main_thread():  # Python raises in the main one
        yield
        return
    came: list[int] = []
    before = {n: signal.getsignal(n) or signal.SIG_DFL for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        if came:
            signal.raise_signal(came[0])


def _begin_worker() -> None:
    """Leave interrupts to the main process, which stops the workers, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _draw_person(layout: str, seed: int, job: Job) -> int:
    for shot, path in job:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        picture(layout, seed, *shot).save(path, quality=90)  # of a JPEG; a BMP has no quality
    return len(job)


def picture(
    layout: str, seed: int, identity: int, camera: int, modality: str, take: int
) -> Image.Image:
    """One picture of those that ``seed`` draws, as :func:`synthesize` saves it."""
    person, place = _person(seed, identity), _camera(layout, seed, camera, modality)
    pose = Pose(seed, identity, camera, modality, take)
    infrared = int(modality == "infrared")
    return draw(person, place, pose, stream(seed, _PICTURE, identity, camera, infrared, take))


_person = lru_cache(maxsize=8)(Person)


@lru_cache(maxsize=64)
def _camera(layout: str, seed: int, number: int, modality: str) -> Camera:
    spec = LAYOUTS[layout]
    return Camera(seed, number, modality, spec.size, spec.low_light, spec.same_size)


def contact_sheet(layout: str = "llcm", seed: int = 0, people: int = 6) -> Image.Image:
    """Drawn people, two to a row: three visible pictures of each, then three infrared ones.

    Returns:
        An image with a palette of 128 colours, which halves the PNG of so much sensor noise.
    """
    spec, views = LAYOUTS[layout], 3
    width, height = spec.size
    sheet = Image.new("RGB", (4 * views * width + 12, (people + 1) // 2 * (height + 4)), "white")
    for place in range(people):
        x, y = (place % 2) * (2 * views * width + 12), place // 2 * (height + 4)
        for side, modality in enumerate(("visible", "infrared")):
            cameras = spec.visible if modality == "visible" else spec.infrared
            for n in range(views):
                image = picture(layout, seed, place + 1, cameras[n % len(cameras)], modality, n)
                left = x + (side * views + n) * width + 4 * side
                sheet.paste(image.convert("RGB").resize((width, height)), (left, y))
    palette = sheet.reduce(3).quantize(128, kmeans=3)
    return sheet.quantize(palette=palette, dither=Image.Dither.NONE)
