"""Datasets on disk as lists of samples, their images as batches, and checks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .cache import DecodedCache, open_cache, read_image
from .check import CheckReport, check_dataset
from .datasets import get_dataset, open_dataset, register_dataset, register_protocol
from .images import is_image_name, open_image
from .protocols import PROTOCOLS, Protocol, Sample, draw_gallery, read_permutations
from .reader import Fault, ReidDataset

if TYPE_CHECKING:
    from .loader import TrainLoader
    from .sampler import IdentitySampler
    from .transforms import eval_transform

__all__ = ["PROTOCOLS", "CheckReport", "DecodedCache", "Fault", "IdentitySampler", "Protocol"]
__all__ += ["ReidDataset", "Sample", "TrainLoader", "check_dataset", "draw_gallery"]
__all__ += ["eval_transform", "get_dataset", "is_image_name", "open_cache", "open_dataset"]
__all__ += ["open_image", "read_image", "read_permutations", "register_dataset"]
__all__ += ["register_protocol"]

# These need torch, which takes seconds to import: they are imported when first used.
_LATER = {"TrainLoader": "loader", "IdentitySampler": "sampler", "eval_transform": "transforms"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
