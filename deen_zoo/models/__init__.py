"""The DEEN models; importing this registers them with timm."""

from __future__ import annotations

from typing import Any

import timm

from .checkpoint import save_pretrained as save_pretrained
from .deen import DEEN as DEEN


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> DEEN:
    """``timm.create_model`` for the models of this package.

    Args:
        name: One of :func:`list_models`, ``"local-dir:FOLDER"`` or ``"hf-hub:ORG/NAME@REVISION"``.
        pretrained: Load the weights as well.
        **kwargs: To :class:`DEEN` and to timm: ``num_classes``, ``modality``, ``backbone``, ...

    Raises:
        UserError: No such model, or its weights cannot be had; the message says what to do.

    >>> create_model("test_deen_resnet", num_classes=10).num_classes
    10
    """
    from ..errors import UserError

    if ":" not in name and name.split(".")[0] not in list_models():
        raise UserError(
            f"no model {name!r}: choose one of {', '.join(list_models())}, "
            f"'local-dir:FOLDER' or 'hf-hub:ORG/NAME'"
        )
    model = timm.create_model(name, pretrained=pretrained, **kwargs)
    return model


def list_models(filter: str = "") -> list[str]:
    """Names of the models of this package; ``filter`` is a wildcard such as ``"*llcm"``.

    >>> list_models("deen_*")
    ['deen_resnet50_llcm', 'deen_resnet50_regdb', 'deen_resnet50_sysu']
    """
    names: list[str] = timm.list_models(filter, module="deen")
    return names
