"""The official DEEN code, imported from where the environment variable ``DEEN_OFFICIAL`` points.

It is read in place and never copied: the tests that need it are skipped, with this reason, where
the variable is not set.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

OFFICIAL = os.environ.get("DEEN_OFFICIAL")
needs_official = pytest.mark.skipif(
    not OFFICIAL, reason="DEEN_OFFICIAL is not set to the DEEN folder of the reference's checkout"
)
_NAMES = ("model", "resnet", "loss", "eval_metrics", "data_manager", "random_erasing", "utils")


def official(name: str) -> ModuleType:
    """Import one module of the reference; neither ``sys.path`` nor ``sys.modules`` keeps it."""
    assert OFFICIAL and name in _NAMES
    kept = {n: sys.modules.pop(n) for n in _NAMES if n in sys.modules}
    sys.path.insert(0, str(Path(OFFICIAL).resolve()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
        for n in _NAMES:
            sys.modules.pop(n, None)
        sys.modules.update(kept)


def official_net(num_classes: int, dataset: str) -> nn.Module:
    """The reference's ``embed_net`` with dropout off and fresh weights (it would download some)."""
    module = official("model")
    build = module.resnet50
    module.resnet50 = lambda pretrained, **kwargs: build(pretrained=False, **kwargs)
    net: nn.Module = module.embed_net(num_classes, dataset)
    net.DEE.dropout.p = 0.0
    return net
