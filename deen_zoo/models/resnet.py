"""Stems and stages of a timm ResNet, as the families made of one use them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import timm
import torch.nn as nn

from .pretrained import backbone_weights

__all__ = ["resnet_parts"]


def resnet_parts(
    backbone: str,
    backbone_args: dict[str, Any] | None,
    pretrained: bool,
    drop: dict[str, float],
    num_stages: int = 4,
    **kwargs: Any,
) -> tuple[Any, Any, list[Any], list[int]]:
    """Stems and stages of a timm ResNet, without the stride of the fourth stage.

    ``drop`` holds ``drop_path_rate`` and ``drop_block_rate``; ``kwargs`` are more of the ResNet's
    arguments. If ``pretrained``, both stems start from the same weights.

    Returns:
        The visible and the infrared stem, the stages, and the channels of the stems' maps and of
        each stage's.

    Raises:
        ValueError: The backbone is not a ResNet.
    """
    args = dict(backbone_args or {})
    taken = {"in_chans", "num_classes", "global_pool", "output_stride"} & set(args)
    if taken:
        raise ValueError(f"backbone_args cannot have {', '.join(sorted(taken))}: the model sets it")
    if pretrained and "pretrained_cfg_overlay" not in args:
        args["pretrained_cfg_overlay"] = dict(file=backbone_weights(backbone))
    args.update((key, rate) for key, rate in drop.items() if rate)
    net = timm.create_model(backbone, pretrained=pretrained, num_classes=0, **args, **kwargs)
    if not isinstance(net, timm.models.ResNet):
        raise ValueError(
            f"backbone must be a timm ResNet such as 'resnet50': "
            f"{backbone} is a {type(net).__name__}"
        )
    names = ("conv1", "bn1", "act1", "maxpool")
    visible = nn.Sequential(OrderedDict((name, getattr(net, name)) for name in names))
    infrared = copy.deepcopy(visible)
    if not pretrained:
        for module in infrared.modules():
            if isinstance(module, nn.Conv2d):  # as timm's ResNet starts
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    stages = [getattr(net, f"layer{i}") for i in range(1, num_stages + 1)]
    if num_stages == 4:
        without_stride(stages[3], backbone)
    info: list[Any] = net.feature_info[: num_stages + 1]
    return visible, infrared, stages, [stage["num_chs"] for stage in info]


def without_stride(blocks: nn.Module, backbone: str) -> None:
    """Take the stride out of a ResNet stage; timm's ``output_stride=16`` would also dilate it."""
    for name, module in list(blocks.named_modules()):
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            parent, _, child = name.rpartition(".")
            setattr(blocks.get_submodule(parent), child, nn.Identity())
        elif getattr(module, "stride", 1) not in (1, 2, (1, 1)) or hasattr(module, "filt"):
            raise ValueError(
                f"backbone {backbone} strides by {type(module).__name__}, which cannot be "
                f"undone: choose a plain ResNet such as resnet50"
            )
