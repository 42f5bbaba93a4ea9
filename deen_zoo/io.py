"""Files and folders: written whole or not at all, used by one process at a time, and hashed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

__all__ = ["check_new_folder", "check_target", "cores", "exclusive", "file_states"]
__all__ += ["read_object", "reserved", "sha256", "sha256_of", "whole_file", "whole_folder"]
__all__ += ["write_atomically"]


def cores() -> int:
    """Number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file whole or not at all; what was there stays until the new one is on the disk.

    Raises:
        OSError: It cannot be written; the message names the file, and the old one is as it was.
    """
    # Names of files need not be UTF-8: their bytes are written as they are.
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    try:
        with whole_file(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        kept = "; the file of that name is still the previous one" if Path(path).exists() else ""
        raise OSError(f"cannot write {path}: {error.strerror or error}{kept}") from error


@contextlib.contextmanager
def whole_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to whose file becomes ``target`` when the block ends without an exception.

    It lies in a folder of its own, and all that is written there comes next to ``target``, the last
    by name last: a format may have several files.
    """
    target = Path(target)
    folder = target.with_name(f"{target.name}.partial")
    _remove(folder)
    try:
        folder.mkdir()
        yield folder / target.name
        written = sorted(folder.iterdir())
        for path in written:
            path.chmod(folder.stat().st_mode & 0o666)  # as of any new file; some writers give 0600
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for path in written:
            os.replace(path, target.with_name(path.name))
        folder.rmdir()  # here, so that a signal in between still finds what removes it
    finally:
        _remove(folder)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_target(path: str | os.PathLike[str]) -> Path:
    """Raise UserError unless a file can be written there; call it before long work."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UserError(f"{path}: you may not write there; choose another place")
    return path


def check_new_folder(path: str | os.PathLike[str]) -> Path:
    """Raise UserError unless the folder is absent or empty."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "is not empty" if path.is_dir() else "is a file"
        raise UserError(f"{path} exists already and {what}: give a new or an empty folder")
    return path


def sha256(path: str | os.PathLike[str], begun: Any = None) -> str:
    """SHA-256 (or another, ``begun``) of a file, in hex."""
    found = begun or hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return str(found.hexdigest())


def sha256_of(content: bytes | str) -> str:
    """SHA-256 of what is in memory, in hex; of text in UTF-8."""
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON file holds; empty if it is not there, cut off or something else."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def file_states(files: Mapping[str, str]) -> str:
    """SHA-256 of names, and of the sizes and modification times of the files at their paths."""
    found = hashlib.sha256()
    for name, path in files.items():
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):  # ValueError: no name that a file can have
            state = "missing"
        found.update(f"{name}\0{state}\0".encode(errors="surrogateescape"))
    return found.hexdigest()


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` when the block ends without an exception.

    Whatever happens to the process, ``target`` is absent or whole; leftovers of a killed process
    are removed by the next one. An existing ``target`` is replaced: it is moved aside first, and
    moved back by the next process should this one be killed just then.

    Raises:
        UserError: Another process is writing it.
    """
    target = Path(target)
    partial = target.with_name(f"{target.name}.partial")
    previous = target.with_name(f"{target.name}.previous.partial")
    with reserved(target):
        if previous.exists() and not target.exists():
            os.replace(previous, target)
        for leftover in (partial, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if target.exists():
                os.replace(target, previous)
            os.replace(partial, target)
            shutil.rmtree(previous, ignore_errors=True)  # and again if a signal ends this one
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def reserved(target: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from writing ``target`` while the block runs, by a lock file next to it.

    Raises:
        UserError: Another process is writing it.
    """
    target = Path(target)
    lock = target.with_name(f".{target.name}.lock")
    with exclusive(lock, str(target)):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str], what: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; the system frees it if the process dies.

    Args:
        path: The lock file, made if missing and left in place.
        what: What it protects, for the message, such as ``"the run in runs/llcm"``.
        wait: Wait for another process that holds it, and say so on stderr.

    Raises:
        UserError: Another process holds it, and ``wait`` is False.
    """
    from filelock import FileLock, Timeout

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(f"another process is using {what}: wait for it, or stop it") from None
        print(f"waiting for another process that is using {what}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
