"""Which device, and in which precision."""

from __future__ import annotations

import torch

from .errors import UserError

__all__ = ["PRECISIONS", "autocast", "choose_device", "resolve_precision"]

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
