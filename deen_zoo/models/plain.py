"""Any timm backbone on the model contract: one network for both modalities, with a BN neck."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from .base import BNNeck, ReidModel

__all__ = ["PlainModel"]


class PlainModel(ReidModel):
    """A backbone that does not tell the modalities apart, trained by identity and triplet loss.

    Args:
        backbone: Any timm model by name.
        num_classes: Training identities.
        image_size: (height, width) of its images.
        pretrained_backbone: Start from the backbone's own weights.
        backbone_args: Arguments of the backbone.
    """

    flip = False

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        image_size: tuple[int, int] = (288, 144),
        pretrained_backbone: bool = False,
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        args = {"num_classes": 0, **(backbone_args or {})}
        net: Any = timm.create_model(backbone, pretrained=pretrained_backbone, **args)
        cfg = {
            **net.pretrained_cfg,
            "architecture": backbone,
            "num_classes": num_classes,
            "input_size": (3, *image_size),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "interpolation": "lanczos",
        }
        self.pretrained_cfg = self.default_cfg = cfg
        self.visible_stem, self.infrared_stem = nn.Identity(), nn.Identity()
        self.stages = nn.Sequential(_Maps(net))
        self.num_features = self.head_hidden_size = net.num_features
        self.model_args = {"backbone": backbone, "image_size": image_size}
        self.descriptors = {"official": net.num_features}
        self.bottleneck = BNNeck(net.num_features)
        self.reset_classifier(num_classes, "avg")

    def forward_pool(self, x: torch.Tensor) -> torch.Tensor:
        """Maps or tokens of the backbone -> (N, num_features), as the backbone pools them."""
        maps: Any = self.stages[0]
        return maps.net.forward_head(x, pre_logits=True)

    def describe(self, x: torch.Tensor, modality: Any, descriptor: str) -> torch.Tensor:
        """Images -> the BN-neck feature (N, num_features), L2-normalised."""
        return F.normalize(self.bottleneck(self.forward_pool(self.forward_features(x, modality))))


class _Maps(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.forward_features(x)
