"""deen_zoo: models for visible-infrared person re-identification.

Importing it registers the models with timm; everything else is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import terminal

__version__ = "0.2.0"

if terminal.is_command():
    terminal.prepare()  # the verb imports the models, if it needs them: --help is fast
else:
    from . import models as models

if TYPE_CHECKING:
    from .features import FeatureExtractor as FeatureExtractor
    from .models import DEEN as DEEN
    from .models import create_model as create_model
    from .models import list_models as list_models
    from .models import save_pretrained as save_pretrained

_HOMES = {
    "DEEN": "models",
    "FeatureExtractor": "features",
    "create_model": "models",
    "list_models": "models",
    "save_pretrained": "models",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
