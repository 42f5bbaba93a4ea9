"""An official ``.t`` checkpoint to a folder that timm and transformers load.

This is the only place that opens a pickle, and it opens it with ``weights_only``: tensors, numbers
and NumPy values are read, anything that would run code is refused.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import importlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from ..errors import UserError
from . import create_model, save_pretrained
from .checkpoint import checkpoint_filter_fn, is_official


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_official` did and verified."""

    model: str
    identities: int
    official_keys: int
    official_megabytes: float
    keys: int
    megabytes: float
    parameters: int
    tensors_equal: int
    sha256: str
    epoch: int | None
    rank1: float | None
    mAP: float | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"model            {self.model}, {self.identities} identities",
            f"official file    {self.official_keys} tensors, {self.official_megabytes:.1f} MB",
            f"model.safetensors {self.keys} tensors, {self.megabytes:.1f} MB, "
            f"{self.parameters / 1e6:.1f} M parameters",
            f"verified         {self.tensors_equal} of {self.keys} tensors equal bit for bit "
            f"after loading the folder with timm",
            f"sha256           {self.sha256}",
        ]
        if self.rank1 is not None:
            lines.append(
                f"recorded in it   epoch {self.epoch}, rank-1 {self.rank1:.4f}, mAP {self.mAP:.4f} "
                f"(the reference's own test, chosen as its best epoch; not measured here)"
            )
        return "\n".join(lines)


def read_official(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read an official checkpoint: ``{net, cmc, mAP, mINP, epoch}``, or the bare state dict.

    Raises:
        UserError: No such file, not a checkpoint, cut off, or a pickle that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}; give the .t file that the official train.py saved")
    try:
        with _numpy_values_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = str(error).partition("GLOBAL ")[2].split(" ")[0]
        if wanted:
            raise UserError(
                f"{path} is refused: unpickling it would run {wanted}, which a checkpoint of "
                f"tensors does not need; get the file from a source that you trust"
            ) from error
        raise UserError(
            f"{path} is refused: it is not a torch checkpoint of tensors and numbers alone, and "
            f"opening it any other way could run code"
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch raises what its readers raise: struct.error, EOFError, ...
        raise UserError(f"{path} is not a whole torch checkpoint: {_brief(error)}") from error
    if isinstance(content, dict) and "net" not in content and is_official(content):
        content = {"net": content}
    if not isinstance(content, dict) or not isinstance(content.get("net"), dict):
        raise UserError(
            f"{path} holds no official DEEN network: expected a dictionary with 'net', "
            f"got {type(content).__name__}"
        )
    return content


@contextlib.contextmanager
def _numpy_values_allowed() -> Iterator[None]:
    """The official file stores its scores as NumPy values, by old and new module names."""
    core = "numpy._core" if hasattr(np, "_core") else "numpy.core"
    multiarray = importlib.import_module(f"{core}.multiarray")
    scalar, reconstruct = multiarray.scalar, multiarray._reconstruct
    allowed: list[Any] = [np.ndarray, np.dtype, codecs.encode]  # torch 2.4 lacks the last
    allowed += [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")]
    for name, function in (("scalar", scalar), ("_reconstruct", reconstruct)):
        for home in ("numpy.core", "numpy._core"):
            named: Any = functools.partial(function)  # torch before 2.6 takes no name beside it
            named.__module__, named.__name__ = f"{home}.multiarray", name
            named.__qualname__ = name
            allowed.append(named)
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(allowed)  # torch 2.4 has no ``safe_globals`` context yet
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def convert_official(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], model: str
) -> ConversionReport:
    """Write ``config.json`` and ``model.safetensors`` for an official checkpoint, and verify them.

    Args:
        source: The ``.t`` file.
        folder: Where to write; created if needed, an existing model there is not overwritten.
        model: Which model it is: ``deen_resnet50_sysu``, ``_regdb`` or ``_llcm``.

    Raises:
        UserError: The file or its keys do not fit; every misfit is named.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "config.json"):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already: choose another folder, or remove it")
    content = read_official(source)
    weights = content["net"]
    classifier = weights.get("classifier.weight", weights.get("module.classifier.weight"))
    if classifier is None:
        raise UserError(f"{source} has no classifier.weight: it is not a whole DEEN checkpoint")
    net = create_model(model, num_classes=classifier.shape[0])
    net.load_state_dict(checkpoint_filter_fn(dict(weights), net))
    save_pretrained(net, folder)

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    wanted = checkpoint_filter_fn(dict(weights), net)
    equal = sum(torch.equal(loaded[key], wanted[key]) for key in loaded)
    if equal != len(loaded):
        raise RuntimeError(f"{len(loaded) - equal} tensors of {folder} differ from {source}")
    target = folder / "model.safetensors"
    cmc = content.get("cmc")
    return ConversionReport(
        model=model,
        identities=classifier.shape[0],
        official_keys=len(weights),
        official_megabytes=Path(source).stat().st_size / 1e6,
        keys=len(loaded),
        megabytes=target.stat().st_size / 1e6,
        parameters=sum(p.numel() for p in net.parameters()),
        tensors_equal=equal,
        sha256=hashlib.sha256(target.read_bytes()).hexdigest(),
        epoch=None if content.get("epoch") is None else int(content["epoch"]),
        rank1=None if cmc is None else float(cmc[0]),
        mAP=None if content.get("mAP") is None else float(content["mAP"]),
    )
