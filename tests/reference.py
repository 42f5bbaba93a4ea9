"""The references, imported from where ``DEEN_OFFICIAL``, ``AGW_OFFICIAL``, ... point.

They are read in place and never copied: the tests that need one are skipped, with this reason,
where its variable is not set.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
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


# The other references: AGW with CAJ in its folder ICCV21_CAJ, YYDS, TVI-LFM.
CHECKOUTS = {name: os.environ.get(f"{name}_OFFICIAL") for name in ("AGW", "YYDS", "TVI")}


def needs(name: str) -> pytest.MarkDecorator:
    """Skip the test where the checkout ``name`` is not at hand."""
    reason = f"{name}_OFFICIAL is not set to a checkout of the {name} repository"
    return pytest.mark.skipif(not CHECKOUTS[name], reason=reason)


@contextlib.contextmanager
def importable(folder: Path, **stand_ins: Any) -> Iterator[None]:
    """Make the modules of a checkout importable, with stand-ins for some that they import."""
    sys.path.insert(0, str(folder))
    try:
        with mock.patch.dict(sys.modules, stand_ins):  # afterwards as it was before
            yield
    finally:
        sys.path.remove(str(folder))


def agw(name: str, folder: str = "") -> ModuleType:
    """A module of AGW, or of the folder ``ICCV21_CAJ``, whose ResNets come without weights."""
    with importable(Path(CHECKOUTS["AGW"] or "", folder)):
        module = importlib.import_module(name)
        if name == "model":
            build = module.resnet50
            module.__dict__["resnet50"] = lambda pretrained, **kwargs: build(**kwargs)
        return module


def yyds_net(num_classes: int, dataset: str, text_mode: str = "none") -> nn.Module:
    """YYDS's ``embed_net``: the baseline, or with a ``text_mode`` the network of its own."""
    einops, paths = ModuleType("einops"), ModuleType("utils_new")
    einops.rearrange, paths.RoBERTa_path = None, ""  # type: ignore[attr-defined]
    with importable(Path(CHECKOUTS["YYDS"] or ""), einops=einops, utils_new=paths):
        module = importlib.import_module("model")
    build, roberta = module.resnet50, module.RobertaModel
    module.__dict__["resnet50"] = lambda pretrained, **kwargs: build(**kwargs)
    module.__dict__["model_zoo"] = SimpleNamespace(load_url=lambda url: {})
    text = SimpleNamespace(from_pretrained=lambda *_, **__: roberta(roberta.config_class()))
    module.__dict__["RobertaModel"] = text
    args = SimpleNamespace(arch="resnet50", text_mode=text_mode, use_amp=False)
    net: nn.Module = module.embed_net(num_classes, dataset, args)
    return net


def tvi_net(num_classes: int) -> nn.Module:
    """TVI-LFM's whole network as its base training saves it: images, CLIP's text, classifier."""
    import torchvision

    build = torchvision.models.resnet50
    fresh = mock.Mock(side_effect=lambda pretrained: build())
    without_weights = mock.patch.object(torchvision.models, "resnet50", fresh)
    with importable(Path(CHECKOUTS["TVI"] or "")), without_weights:
        clip = importlib.import_module("network.clip_model.clip_model")
        # RN50_ORI with the sizes of CLIP's RN50 text encoder, 2,048 numbers and GeM: its defaults.
        net = nn.Module()
        net.base_model = clip.CLIP(
            "RN50_ORI", 2048, (288, 144), (3, 4, 6, 3), 64, None, 16, "GEM", 77, 49408, 512, 8, 12
        )
        net.logit_scale = nn.Parameter(torch.ones([]))
        net.classifier = importlib.import_module("network.model").Classifier(num_classes)
    return net
