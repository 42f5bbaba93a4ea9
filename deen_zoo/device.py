"""Which device, in which precision, and how its memory is kept."""

from __future__ import annotations

import ctypes
import sys

import torch

from .errors import UserError

__all__ = ["PRECISIONS", "autocast", "choose_device", "keep_freed_memory", "resolve_precision"]

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name: str = "auto") -> torch.device:
    """``"auto"`` (CUDA, else Apple's MPS, else the CPU), or whatever torch calls a device.

    Raises:
        UserError: No such device here.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): try auto or cpu") from error
    return device


def resolve_precision(device: torch.device, precision: str) -> str:
    """``"float32"`` or ``"bfloat16"``; ``"auto"`` is the latter on a GPU that has it.

    Raises:
        UserError: No such precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    if precision == "auto":
        mixed = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bfloat16" if mixed else "float32"
    return precision


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """A context of mixed bfloat16, or of nothing, as :func:`resolve_precision` has it."""
    mixed = resolve_precision(device, precision) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed)


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones; of the CPU, with glibc.

    By default glibc takes each large map from the system and gives it back at once. The page faults
    of that can be a quarter of the time on a virtual machine, for some more memory (docs/speed.md).

    Returns:
        Whether the C library took it.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    mmap_max, trim_threshold = -4, -1  # as malloc.h numbers them
    return mallopt is not None and bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))
