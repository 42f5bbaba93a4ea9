"""Datasets on disk as lists of samples, their images as batches, and checks.

Every name is imported from its module when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "cache": ("DecodedCache", "open_cache"),
    "check": ("CheckReport", "check_dataset"),
    "datasets": ("get_dataset", "open_dataset", "register_dataset", "register_protocol"),
    "protocols": ("PROTOCOLS", "Protocol", "Sample", "draw_gallery", "read_permutations"),
    "images": ("is_image_name", "open_image", "read_image"),
    "loader": ("TrainLoader",),
    "reader": ("Fault", "ReidDataset"),
    "sampler": ("IdentitySampler",),
    "transforms": ("eval_transform",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

if TYPE_CHECKING:
    from .cache import DecodedCache as DecodedCache
    from .cache import open_cache as open_cache
    from .check import CheckReport as CheckReport
    from .check import check_dataset as check_dataset
    from .datasets import get_dataset as get_dataset
    from .datasets import open_dataset as open_dataset
    from .datasets import register_dataset as register_dataset
    from .datasets import register_protocol as register_protocol
    from .images import is_image_name as is_image_name
    from .images import open_image as open_image
    from .images import read_image as read_image
    from .loader import TrainLoader as TrainLoader
    from .protocols import PROTOCOLS as PROTOCOLS
    from .protocols import Protocol as Protocol
    from .protocols import Sample as Sample
    from .protocols import draw_gallery as draw_gallery
    from .protocols import read_permutations as read_permutations
    from .reader import Fault as Fault
    from .reader import ReidDataset as ReidDataset
    from .sampler import IdentitySampler as IdentitySampler
    from .transforms import eval_transform as eval_transform

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # asked once
    return value
