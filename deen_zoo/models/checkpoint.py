"""Checkpoints: strict both ways when they are loaded, and to a folder for timm."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..errors import UserError
from ..io import write_atomically
from .pretrained import CONFIG, FORMAT, WEIGHTS

StateDict = dict[str, torch.Tensor]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> StateDict:
    """timm's hook before loading: check the keys both ways.

    timm loads with ``strict=False`` when the class count differs, and a badly mapped checkpoint
    would pass with a warning; here a missing, surplus or misshapen key is an error that names it.

    Raises:
        UserError: The keys or shapes do not fit, or the checkpoint has another number of training
            identities than the model and nobody asked for a fresh classifier.
    """
    for wrapper in ("net", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    expected = model.state_dict()
    classifier = state_dict.get("classifier.weight")
    if classifier is not None:
        asked, configured = model.num_classes, model.pretrained_cfg["num_classes"]
        if asked == configured and classifier.shape[0] != asked:
            raise UserError(
                f"the checkpoint was trained on {classifier.shape[0]} identities and the model is "
                f"for {asked}: give num_classes={classifier.shape[0]} to load it whole, or "
                f"num_classes=0 to leave the classifier out"
            )
        model.pretrained_cfg["num_classes"] = classifier.shape[0]  # what timm compares with
        if asked != classifier.shape[0]:
            expected["classifier.weight"] = classifier
    elif model.num_classes != model.pretrained_cfg["num_classes"]:  # a fresh one was asked for
        expected.pop("classifier.weight", None)

    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    wanted = {name: tensor.shape for name, tensor in expected.items()}
    if model.in_chans != 3:  # timm adapts the first convolutions next
        for name in set(shapes) & set(wanted):
            if re.match(r"(visible|infrared)_stem\.conv1\.(0\.)?weight", name):
                wanted[name] = wanted[name][:1] + shapes[name][1:2] + wanted[name][2:]
    differing = misfits(shapes, wanted)
    if any(differing.values()):
        raise UserError(
            f"the checkpoint does not fit {model.pretrained_cfg.get('architecture', 'the model')}: "
            + in_words(differing)
        )
    return state_dict


def misfits(found: dict[str, torch.Size], wanted: dict[str, torch.Size]) -> dict[str, list[str]]:
    """How the shapes of a state dict differ from a network's: names that are missing, surplus or
    misshapen, in the network's order."""
    return {
        "missing": [n for n in wanted if n not in found],
        "surplus": [n for n in found if n not in wanted],
        "misshapen": [
            f"{n} {tuple(found[n])} for {tuple(wanted[n])}"
            for n in wanted
            if n in found and found[n] != wanted[n]
        ],
    }


def in_words(misfits: dict[str, list[str]], most: int = 4) -> str:
    """The first names of each kind of :func:`misfits`."""
    return "; ".join(
        f"{kind}: {', '.join(names[:most])}"
        + (f" and {len(names) - most} more" if len(names) > most else "")
        for kind, names in misfits.items()
        if names
    )


def save_pretrained(model: Any, folder: str | os.PathLike[str]) -> Path:
    """Write ``config.json`` and ``model.safetensors``: a folder for timm and for transformers.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds the same model from it, in a
    process that has imported ``deen_zoo``. Each file is written whole and then renamed.

    Raises:
        OSError: One cannot be written; the message names it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    weights = save(tensors, {"format": "pt"})
    config = model_config(model, hashlib.sha256(weights).hexdigest())
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def model_config(model: Any, weights_sha256: str) -> dict[str, Any]:
    """``config.json`` of a model: what builds it again, and the digest of its weights' file."""
    from .. import __version__

    cfg = dict(model.pretrained_cfg)
    architecture = cfg.pop("architecture")
    for source in ("url", "file", "state_dict", "hf_hub_id", "source", "tag"):
        cfg.pop(source, None)
    cfg["num_classes"] = model.num_classes
    cfg["input_size"] = [model.in_chans, *cfg["input_size"][1:]]
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": model.model_args,
        "pretrained_cfg": cfg,
        "deen_zoo": {
            "format": FORMAT,
            "version": __version__,
            "weights_sha256": weights_sha256,
            **({"trained_on": model.trained_on} if model.trained_on else {}),
        },
    }
