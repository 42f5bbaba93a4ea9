"""Files: written whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

__all__ = ["sha256", "write_atomically"]


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file whole or not at all; what was there stays until the new one is on the disk.

    Raises:
        OSError: It cannot be written; the message names the file, and the old one is as it was.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        kept = "; the file of that name is still the previous one" if path.exists() else ""
        raise OSError(f"cannot write {path}: {error.strerror or error}{kept}") from error


def sha256(path: str | os.PathLike[str], digest: Any = None) -> str:
    """SHA-256 (or another, begun ``digest``) of a file, in hex."""
    digest = digest or hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return str(digest.hexdigest())
