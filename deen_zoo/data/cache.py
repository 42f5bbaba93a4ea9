"""Decoded images on disk: each file is read, decoded and resized once, not once an epoch.

The pixels are one uint8 ``.npy`` file, (images, height, width, 3), which anything can map:
``np.load(path, mmap_mode="r")``. At 384x144 an image takes 166 kB and SYSU-MM01's 34,167 training
images take 5.7 GB of disk, and no memory but what the system lends to its page cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ..errors import UserError
from .images import Pixels, open_image, resize

__all__ = ["DecodedCache", "open_cache"]

CHUNK = 256  # images decoded before they are written: 42 MB at 384x144


class DecodedCache:
    """A finished cache; :func:`open_cache` makes one.

    Holds names and row numbers alone, so it may be handed to worker processes.

    Attributes:
        folder: Where it lies.
        size: (height, width) of its images.
        broken: The files that could not be decoded, and so are not in it.
    """

    def __init__(self, folder: Path, paths: Sequence[str], size: tuple[int, int]) -> None:
        self.folder, self.size = folder, size
        self._file = os.path.join(folder, "images.npy")
        self._start, self._row_bytes = len(_header(len(paths), size)), size[0] * size[1] * 3
        skipped = _broken_rows(folder)
        self.broken = [path for row, path in enumerate(paths) if row in skipped]
        self._rows = {path: row for row, path in enumerate(paths) if row not in skipped}

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, path: str) -> Pixels | None:
        """The decoded image, read-only uint8 (H, W, 3), or None when it is not here."""
        if path not in self._rows:
            return None
        # A plain read, as what was read through a mapping would stay in each worker's memory.
        try:
            file = os.open(self._file, os.O_RDONLY)
            try:
                start = self._start + self._rows[path] * self._row_bytes
                pixels = os.pread(file, self._row_bytes, start)
            finally:
                os.close(file)
            return np.frombuffer(pixels, np.uint8).reshape(*self.size, 3)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the decoded cache {self.folder} was removed or cut short while in use "
                f"({error}): start again to rebuild it"
            ) from error


def open_cache(
    folder: str | os.PathLike[str],
    paths: Iterable[str],
    size: tuple[int, int] = (384, 144),
    threads: int | None = None,
) -> DecodedCache:
    """Open the decoded cache of these images, building it first if there is none.

    A cache is a folder named by a fingerprint of the files' names, sizes and times, so that changed
    files get a new one. It is built aside and renamed when whole: a build that was killed leaves
    nothing that could be taken for a cache, and is cleared away by the next. Processes that want to
    build at the same time wait for one another.

    Args:
        folder: Where caches are kept; made if missing.
        paths: Images, in any order; repeats count once.
        size: (height, width) to resize to.
        threads: Threads that decode; None is one per CPU.

    Raises:
        UserError: The disk is too small, or the system has no file locks (Windows).
    """
    folder, paths = Path(folder), sorted(set(paths))
    target = folder / f"decoded-{size[0]}x{size[1]}-{_fingerprint(paths)[:16]}"
    if not _whole(target, len(paths), size):
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "decoded.lock"):
            if not _whole(target, len(paths), size):
                _build(target, paths, size, threads)
    return DecodedCache(target, paths, size)


def _header(count: int, size: tuple[int, int]) -> bytes:
    """The first bytes of the ``.npy`` file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
    )
    return header.getvalue()


def _whole(target: Path, count: int, size: tuple[int, int]) -> bool:
    images = target / "images.npy"
    expected = len(_header(count, size)) + count * size[0] * size[1] * 3
    try:
        _broken_rows(target)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return images.is_file() and images.stat().st_size == expected


def _broken_rows(folder: Path) -> set[int]:
    return set(json.loads((folder / "index.json").read_bytes())["broken"])


def _fingerprint(paths: Sequence[str]) -> str:
    """Of the files' names below their common folder, sizes and modification times."""
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath(paths) if paths else ""
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = os.stat(path)
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{path[len(root) :]}\0{state}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the system frees when its holder dies."""
    try:
        import fcntl
    except ImportError as error:
        raise UserError(
            "the decoded cache needs a system with file locks (Linux, macOS): go without it"
        ) from error
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that builds a decoded cache in {path.parent}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(target: Path, paths: Sequence[str], size: tuple[int, int], threads: int | None) -> None:
    """Write the cache; the caller holds the folder's lock."""
    for abandoned in (*target.parent.glob("decoded-*.partial"), target):
        shutil.rmtree(abandoned, ignore_errors=True)
    blank = np.zeros((*size, 3), np.uint8)
    need, free = len(paths) * blank.nbytes, shutil.disk_usage(target.parent).free
    if need > free:
        raise UserError(
            f"the decoded cache of {len(paths):,} images at {size[0]}x{size[1]} takes "
            f"{need / 1e9:.1f} GB and {target.parent} has {free / 1e9:.1f} GB free: make room "
            "(old caches there may go), choose another folder, or go without it"
        )
    _say(f"decoding {len(paths):,} images once, {need / 1e9:.1f} GB, into {target}")

    def decode(path: str) -> Pixels | None:
        try:
            return resize(open_image(path), size)
        except UserError:
            return None  # whoever asks for it reads the file and gets the reason

    from tqdm import tqdm

    broken: list[int] = []
    with (
        TemporaryDirectory(prefix="decoded-", suffix=".partial", dir=target.parent) as partial,
        ThreadPool(threads) as pool,
        tqdm(total=len(paths), unit="image", disable=None) as progress,
    ):
        whole = Path(partial) / "whole"
        whole.mkdir()
        with open(whole / "images.npy", "wb") as file:
            file.write(_header(len(paths), size))
            for start in range(0, len(paths), CHUNK):
                chunk = paths[start : start + CHUNK]
                for row, image in enumerate(pool.map(decode, chunk), start):
                    if image is None:
                        broken.append(row)
                    file.write((blank if image is None else image).data)
                progress.update(len(chunk))
            os.fsync(file.fileno())
        (whole / "index.json").write_text(json.dumps({"size": size, "broken": broken}))
        os.replace(whole, target)
    _say(f"decoded {len(paths) - len(broken):,} images; {len(broken)} broken files left out")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
