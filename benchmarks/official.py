"""The official DEEN code, run where it lies: read from a checkout, never copied.

Its scripts expect a CUDA device, an old Pillow, fixed paths and weights that they download.
:func:`run_test` gives them stand-ins for these and changes nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import nn

from deen_zoo.errors import UserError

__all__ = ["check_checkout", "import_module", "make_net", "run_test", "save_weights"]

_MODULES = (
    "model", "resnet", "loss", "eval_metrics", "data_manager", "data_loader", "random_erasing",
    "utils",
)  # fmt: skip


def check_checkout(folder: str | os.PathLike[str]) -> Path:
    """The folder, resolved.

    Raises:
        UserError: It is not the ``DEEN`` folder of the reference.
    """
    found = Path(folder).resolve()
    for name in ("model.py", "loss.py", "eval_metrics.py", "test.py"):
        if not (found / name).is_file():
            raise UserError(
                f"{folder} has no {name}: give the DEEN folder of a checkout of the reference"
            )
    return found


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The reference's modules by their bare names; afterwards those that were there before."""
    kept = {name: sys.modules.pop(name) for name in _MODULES if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in _MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def import_module(folder: Path, name: str) -> ModuleType:
    """One module of the reference; neither ``sys.path`` nor ``sys.modules`` keeps it."""
    with _importable(folder):
        return _import(name)


def _import(name: str) -> ModuleType:
    module = importlib.import_module(name)
    if name == "model":  # its ResNets come without the weights that it would download
        build = module.resnet50
        module.__dict__["resnet50"] = lambda pretrained, **kwargs: build(pretrained=False, **kwargs)
    return module


def make_net(folder: Path, num_classes: int, dataset: str) -> nn.Module:
    """The reference's ``embed_net`` with fresh weights."""
    net: nn.Module = import_module(folder, "model").embed_net(num_classes, dataset)
    return net


@torch.no_grad()
def save_weights(folder: Path, num_classes: int, dataset: str, path: Path) -> None:
    """Write a checkpoint as the reference would: random weights, batch norms that fit to them.

    The last batch norms of MFA start at zero; here they don't, so that MFA has a share.
    """
    torch.manual_seed(0)
    net = make_net(folder, num_classes, dataset).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 1.0
            if not module.weight.any():
                nn.init.constant_(module.weight, 0.1)
    images = torch.randn(4, 3, 384, 144)
    net(images, images.flip(0))
    torch.save({"net": net.state_dict(), "epoch": 0}, path)


def run_test(
    folder: Path, dataset: str, root: Path, weights: Path, size: tuple[int, int]
) -> dict[str, float]:
    """The reference's test.py from images, resized to (height, width), to the numbers it prints.

    It fails where a gallery has no 20 identities: its CMC is then shorter for some queries.

    Returns:
        Fractions r1, r20, mAP and mINP of its descriptor, not rounded: the mean over ten trials.
    """
    places = {"sysu": "SYSU-MM01", "llcm": "LLCM"}
    with contextlib.ExitStack() as on:
        scratch = on.enter_context(tempfile.TemporaryDirectory())
        on.enter_context(_importable(folder))
        for place, target in ((f"Datasets/{places[dataset]}", root), ("save_model/x.t", weights)):
            Path(scratch, place).parent.mkdir()
            Path(scratch, place).symlink_to(target.resolve())
        on.callback(os.chdir, os.getcwd())
        os.chdir(scratch)
        _import("model")
        arguments = ["test.py", "--dataset", dataset, "--resume", "x.t", "--gpu", "0"]
        arguments += ["--img_h", str(size[0]), "--img_w", str(size[1])]
        on.enter_context(mock.patch.object(sys, "argv", arguments))
        lanczos = Image.Resampling.LANCZOS
        on.enter_context(mock.patch.object(Image, "ANTIALIAS", lanczos, create=True))
        if not torch.cuda.is_available():
            on.enter_context(mock.patch.object(torch.Tensor, "cuda", _stay))
        on.enter_context(contextlib.redirect_stdout(io.StringIO()))
        found = runpy.run_path(str(folder / "test.py"), run_name="__main__")
    cmc, mean_ap, mean_inp = found["cmc7"], found["mAP7"], found["mINP7"]
    return {"r1": float(cmc[0]), "r20": float(cmc[19]), "mAP": mean_ap, "mINP": mean_inp}


def _stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor
