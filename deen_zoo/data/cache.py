"""Decoded images on disk: each file is read, decoded and resized once, not in every epoch.

The pixels are one uint8 ``.npy`` file, (images, height, width, 3), which any program can map:
``np.load(path, mmap_mode="r")``. At 384x144 an image takes 166 kB and SYSU-MM01's 34,167 training
images take 5.7 GB of disk, and no memory but what the system lends to its page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import PIL

from ..errors import UserError, plural
from ..io import cores, exclusive, file_states, sha256_of, whole_folder
from .images import Intensity, Pixels, check_intensity, open_image, resize

__all__ = ["DecodedCache", "open_cache", "read_image"]

CHUNK = 256  # images decoded before they are written: 42 MB at 384x144
_HEADER = 128  # bytes before the pixels in the .npy file


class DecodedCache:
    """A finished cache; :func:`open_cache` makes one.

    Holds names and row numbers alone. Safe to read from many threads.

    Attributes:
        folder: Where it lies.
        size: (height, width) of its images.
        intensity: How its 16-bit images were scaled.
    """

    def __init__(
        self, folder: Path, paths: Sequence[str], size: tuple[int, int], intensity: Intensity
    ) -> None:
        self.folder, self.size, self.intensity = folder, size, intensity
        self._file = os.path.join(folder, "images.npy")
        broken = _broken_rows(folder)
        self._rows = {path: row for row, path in enumerate(paths) if row not in broken}

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, path: str) -> Pixels | None:
        """The decoded image, uint8 (H, W, 3), or None when it is not here."""
        if path not in self._rows:
            return None
        count = self.size[0] * self.size[1] * 3
        offset = _HEADER + self._rows[path] * count
        # Not through a mapping: a process that maps a file dies where the file is cut short.
        try:
            return np.fromfile(self._file, np.uint8, count, offset=offset).reshape(*self.size, 3)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the decoded cache {self.folder} was removed or cut short while in use "
                f"({error}): start again to rebuild it"
            ) from error


def read_image(
    path: str | os.PathLike[str],
    size: tuple[int, int],
    cache: DecodedCache | None = None,
    intensity: Intensity = "full",
) -> Pixels:
    """Read an image, squashed to size = (height, width) by LANCZOS: uint8 (H, W, 3), RGB.

    ``cache`` holds decoded images of that size and intensity (see :func:`open_image`); those that
    it lacks are read from their files.

    Raises:
        UserError: The file is missing or broken; the message names it.
    """
    cached = cache.read(os.fspath(path)) if cache is not None else None
    return resize(open_image(path, intensity), size) if cached is None else cached


def open_cache(
    folder: str | os.PathLike[str],
    paths: Iterable[str],
    size: tuple[int, int] = (384, 144),
    intensity: Intensity = "full",
) -> DecodedCache:
    """Open the decoded cache of these images, building it first if there is none.

    A cache is a folder named by a fingerprint of its settings, Pillow's version, and the files'
    names, sizes and times, so that changed files get a new one. It gets its name when it is whole:
    a build that was killed leaves nothing that could be taken for a cache, and is removed by the
    next. Processes that want to build at the same time wait for one another.

    Args:
        folder: Where caches are kept; made if missing.
        paths: Images, in any order; repeats count once.
        size: (height, width) to resize to.
        intensity: How 16-bit images become 8-bit, see :func:`~deen_zoo.data.open_image`.

    Raises:
        UserError: The disk is too small.
    """
    folder, paths, intensity = Path(folder), sorted(set(paths)), check_intensity(intensity)
    state = _fingerprint(paths, intensity)
    target = folder / f"decoded-{size[0]}x{size[1]}-{state[:16]}"
    if not _is_whole(target, len(paths), size):
        with exclusive(folder / "decoded.lock", f"the decoded caches in {folder}", wait=True):
            if not _is_whole(target, len(paths), size):
                _build(target, paths, size, intensity)
    return DecodedCache(target, paths, size, intensity)


def _is_whole(target: Path, count: int, size: tuple[int, int]) -> bool:
    images = target / "images.npy"
    try:
        _broken_rows(target)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return images.is_file() and images.stat().st_size == _HEADER + count * size[0] * size[1] * 3


def _broken_rows(folder: Path) -> set[int]:
    return set(json.loads((folder / "index.json").read_bytes())["broken"])


def _fingerprint(paths: Sequence[str], intensity: Intensity) -> str:
    """Hash the scaling, the decoder's version, and the files' names below their common folder,
    sizes and times."""
    places = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath(places) if places else ""
    states = file_states({place[len(root) :]: place for place in places})
    return sha256_of(f"{intensity} {PIL.__version__} {states}")


def _build(target: Path, paths: Sequence[str], size: tuple[int, int], intensity: Intensity) -> None:
    """Write the cache; the caller holds the folder's lock."""
    for abandoned in target.parent.glob("decoded-*.partial"):
        shutil.rmtree(abandoned, ignore_errors=True)
    blank = np.zeros((*size, 3), np.uint8)
    need, free = len(paths) * blank.nbytes, shutil.disk_usage(target.parent).free
    if need > free:
        raise UserError(
            f"the decoded cache of {len(paths):,} images at {size[0]}x{size[1]} takes "
            f"{need / 1e9:.1f} GB and {target.parent} has {free / 1e9:.1f} GB free: make room "
            "(old caches there may go), choose another folder, or go without it"
        )
    what = f"decoding {len(paths):,} images once, {need / 1e6:,.0f} MB, into {target}"
    print(what, file=sys.stderr, flush=True)

    def decode(path: str) -> Pixels | None:
        try:
            return read_image(path, size, intensity=intensity)
        except UserError:
            return None  # whoever asks for it reads the file and gets the reason

    from tqdm import tqdm

    broken: list[int] = []
    with (
        whole_folder(target) as partial,
        ThreadPool(cores()) as pool,
        tqdm(total=len(paths), unit="image", disable=None) as progress,
    ):
        # Written, not mapped: a full disk is then an error and not a crash.
        with open(partial / "images.npy", "wb") as file:
            shape = (len(paths), *size, 3)
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            for start in range(0, len(paths), CHUNK):
                chunk = paths[start : start + CHUNK]
                for row, image in enumerate(pool.map(decode, chunk), start):
                    if image is None:
                        broken.append(row)
                    file.write((blank if image is None else image).data)
                progress.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        (partial / "index.json").write_text(json.dumps({"size": size, "broken": broken}))
    whole = len(paths) - len(broken)
    print(
        f"decoded {plural(whole, 'image')}; {plural(len(broken), 'broken file')} left out",
        file=sys.stderr,
    )
