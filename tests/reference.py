"""The official DEEN code, imported from where the environment variable ``DEEN_OFFICIAL`` points.

It is read in place and never copied: the tests that need it are skipped, with this reason, where
the variable is not set.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from benchmarks.official import import_module, make_net

OFFICIAL = os.environ.get("DEEN_OFFICIAL")
needs_official = pytest.mark.skipif(
    not OFFICIAL, reason="DEEN_OFFICIAL is not set to the DEEN folder of the reference's checkout"
)


def official(name: str) -> ModuleType:
    """Import one module of the reference; neither ``sys.path`` nor ``sys.modules`` keeps it."""
    assert OFFICIAL
    return import_module(Path(OFFICIAL), name)


def official_net(num_classes: int, dataset: str) -> nn.Module:
    """The reference's ``embed_net`` with dropout off and fresh weights (it would download some)."""
    assert OFFICIAL
    net = make_net(Path(OFFICIAL), num_classes, dataset)
    net.get_submodule("DEE.dropout").__dict__["p"] = 0.0
    return net
