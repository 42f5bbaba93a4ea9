"""The models; importing this registers them with timm."""

from __future__ import annotations

import fnmatch
import os
from typing import Any, cast

import timm

from ..errors import UserError, load_module
from . import pretrained as weights
from .agw import AGW as AGW
from .base import NAMES
from .base import ReidModel as ReidModel
from .base import register_reid_model as register_reid_model
from .deen import DEEN as DEEN
from .plain import PlainModel as PlainModel
from .pretrained import save_pretrained as save_pretrained


def create_model(
    name: str, pretrained: bool = False, revision: str | None = None, **kwargs: Any
) -> ReidModel:
    """``timm.create_model`` for the models of this package, with the Hub's errors explained.

    Args:
        name: One of :func:`list_models`, ``"local-dir:FOLDER"`` or ``"hf-hub:ORG/NAME@REVISION"``.
        pretrained: Load the weights as well.
        revision: Branch, tag or commit of the model's repository on the Hub.
        **kwargs: To :class:`DEEN` and to timm: ``num_classes``, ``modality``, ``backbone``, ...

    Raises:
        UserError: No such model, or its weights cannot be had; the message says what to do.

    >>> create_model("test_deen_resnet", num_classes=10).num_classes
    10
    """
    source, _, place = name.partition(":")
    if source in ("hf-hub", "hf_hub"):
        place = f"{place}@{revision}" if revision else place
        name = "hf-hub:" + weights.hub_config(place, cache_dir=kwargs.get("cache_dir"))[1]
    elif source == "local-dir":
        weights.local_config(place)
    if ":" not in name and name.split(".")[0] not in list_models():
        raise UserError(
            f"no model {name!r}: choose one of {', '.join(list_models())}, "
            f"'local-dir:FOLDER' or 'hf-hub:ORG/NAME'"
        )
    if revision and source not in ("hf-hub", "hf_hub"):
        overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
        repo = overlay.get("hf_hub_id")
        if not repo and not timm.is_model_pretrained(name.split(".")[0]):
            repo = (weights.hub_repository(name) or ("",))[0]
        if not repo:
            raise UserError(f"revision {revision!r}: {name} is not on the Hub, so it has none")
        kwargs["pretrained_cfg_overlay"] = {**overlay, "hf_hub_id": f"{repo}@{revision}"}
    checkpoint = str(kwargs.get("checkpoint_path") or ".safetensors")
    if not checkpoint.endswith(".safetensors"):
        raise UserError(
            f"{checkpoint} is not loaded: only safetensors files are; 'deen-zoo convert' turns "
            f"another repository's file into one"
        )
    model: Any = timm.create_model(name, pretrained=pretrained, **kwargs)
    return cast(ReidModel, model)


def locate(source: str | os.PathLike[str]) -> str:
    """A checkpoint folder or a name without the ``package.module:`` before it, which is imported:
    it registers a model of one's own."""
    name = os.fspath(source)
    module, colon, rest = name.partition(":")
    if not colon or module in ("hf-hub", "hf_hub", "local-dir") or os.path.exists(name):
        return name
    load_module(module, "--model")
    return rest


def open_model(source: str | os.PathLike[str], pretrained: bool = True) -> ReidModel:
    """The model of a checkpoint folder, or of a name as :func:`create_model` takes it; either may
    follow the module of a model of one's own, as :func:`locate` has it."""
    name = locate(source)
    return create_model(f"local-dir:{name}" if os.path.isdir(name) else name, pretrained)


def list_models(filter: str = "") -> list[str]:
    """Names of the models of this package; ``filter`` is a wildcard such as ``"*llcm"``.

    >>> list_models("deen_*")
    ['deen_resnet50_llcm', 'deen_resnet50_regdb', 'deen_resnet50_sysu']
    """
    return fnmatch.filter(sorted(NAMES), filter or "*")
