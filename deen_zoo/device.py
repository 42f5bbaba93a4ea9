"""Devices, precision, and reuse of memory."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

from .errors import UserError, brief, check_choice

if TYPE_CHECKING:
    import torch

__all__ = ["PRECISIONS", "autocast", "choose_device", "keep_freed_memory", "resolve_precision"]

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name: str = "auto") -> torch.device:
    """``"auto"`` (CUDA, else Apple's MPS, else the CPU), or torch's name of a device.

    Raises:
        UserError: The device cannot be used on this machine.
    """
    import torch  # here, so that what only needs the names of precisions starts fast

    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = brief(error)
        raise UserError(f"device {name!r} cannot be used ({why}): try auto or cpu") from error
    return device


def resolve_precision(device: torch.device, precision: str) -> str:
    """``"float32"`` or ``"bfloat16"``; ``"auto"`` is the latter on a GPU that supports it.

    Raises:
        UserError: Another name.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision == "auto":
        import torch

        mixed = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bfloat16" if mixed else "float32"
    return precision


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """Autocast to bfloat16, or do nothing, as :func:`resolve_precision` decides."""
    import torch

    mixed = resolve_precision(device, precision) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed)


def keep_freed_memory() -> bool:
    """Let this process reuse the CPU memory of freed tensors, where the C library is glibc.

    By default glibc takes each large map from the system and returns it at once; the page faults
    can be a quarter of the time on a virtual machine. This costs some memory (docs/speed.md).

    Returns:
        True if the C library accepted the setting.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    mmap_max, trim_threshold = -4, -1  # as malloc.h numbers them
    return mallopt is not None and bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))
