"""deen_zoo: visible-infrared person re-identification with DEEN (CVPR 2023).

Importing it registers the models with timm; everything else is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .models import DEEN, create_model, list_models, save_pretrained

if TYPE_CHECKING:
    from .features import FeatureExtractor as FeatureExtractor

__version__ = "0.1.0"
__all__ = [
    "DEEN",
    "FeatureExtractor",
    "create_model",
    "list_models",
    "save_pretrained",
]

_LAZY = {"FeatureExtractor": "features"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
