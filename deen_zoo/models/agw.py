"""AGW: two-stem ResNet with non-local blocks and generalised-mean pooling.

Paper: `Deep Learning for Person Re-identification: A Survey and Outlook` (TPAMI 2022),
https://arxiv.org/abs/2001.04193
Reference: https://github.com/mangye16/Cross-Modal-Re-ID-baseline (MIT).

CAJ (`Channel Augmented Joint Learning for Visible-Infrared Recognition`, ICCV 2021; folder
ICCV21_CAJ of that repository) trains the same network and tests it with mirrored images. The
visible-infrared base models of TVI-LFM (NeurIPS 2024, https://github.com/WHU-HZY/TVI-LFM, MIT) are
its plain relative: no non-local blocks, no ReLU in the stems, a learned pooling exponent, a BN neck
with a bias. Switches name the differences. Written from the papers and from the references'
behaviour, on top of timm's ResNet; outputs and gradients agree to rounding.
"""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import generate_default_cfgs

from .base import (
    TINY,
    BNNeck,
    ConvBN,
    Modality,
    ReidModel,
    kept_args,
    register_reid_model,
    reid_cfg,
)
from .pretrained import build_model
from .resnet import resnet_parts

__all__ = ["AGW"]

NON_LOCAL = {2: 2, 3: 3}  # stage, counted from 1: after how many of its last blocks


class NonLocal(nn.Module):
    """Non-local block without softmax and with one inner channel: (N, C, H, W) to the same.

    The attention of position i to j is ``theta_i * phi_j / HW``. With one channel it factors: every
    position reads the same mean of ``phi * g``, so no (HW, HW) matrix is needed.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.theta = nn.Conv2d(dim, 1, 1, **dd)
        self.phi = nn.Conv2d(dim, 1, 1, **dd)
        self.g = nn.Conv2d(dim, 1, 1, **dd)
        self.proj = ConvBN(1, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        context = (self.phi(x) * self.g(x)).mean((2, 3), keepdim=True)  # (N, 1, 1, 1)
        return torch.add(x, self.proj(self.theta(x) * context))


class GeM(nn.Module):
    """Generalised-mean pooling, (N, C, H, W) -> (N, C): ``mean(x ** 3) ** (1 / 3)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.pow(x.pow(3).mean((2, 3)) + 1e-12, 1 / 3)


class LearnedGeM(nn.Module):
    """Generalised-mean pooling whose exponent is learned, from 3 on, of maps clamped at 1e-6."""

    def __init__(self, device: Any = None, dtype: Any = None):
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), 3.0, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.pow(x.clamp(min=1e-6).pow(self.p).mean((2, 3)), 1 / self.p)


POOLS: dict[str, Any] = {
    "gem": GeM,
    "gem-learned": LearnedGeM,
    "avg": partial(SelectAdaptivePool2d, pool_type="fast", flatten=True),
}


class NonLocalStage(nn.Module):
    """A ResNet stage with a non-local block after each of its last few blocks."""

    def __init__(self, blocks: nn.Sequential, non_local: list[nn.Module]):
        super().__init__()
        self.blocks = blocks
        self.non_local = nn.ModuleList(non_local)
        self.first = len(blocks) - len(non_local)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            for j, non_local in enumerate(self.non_local):
                if i == self.first + j:
                    x = non_local(x)
        return x


class AGW(ReidModel):
    """Two-stem ResNet without its last stride, non-local blocks, pooling and a BN neck.

    Images are (N, in_chans, H, W), ImageNet-normalised; C is 2048 for ResNet-50.

    Descriptors: ``"official"`` is the L2-normalised feature after the BN neck, (N, C), with which
    the references report their results; ``"pool"`` the one before it. The descriptor of the
    mirrored image (``flip``) is added and the sum L2-normalised again, as in CAJ's test.

    :class:`ReidModel` describes the arguments of all families; CAJ's results have ``flip``.

    Args:
        non_local: Non-local blocks after the last two blocks of the second stage and the last three
            of the third.
        pool: ``"gem"`` with the exponent 3, ``"gem-learned"``, or ``"avg"``.
        stem_act: ReLU in the stems; the base models of TVI-LFM have none.
        neck_bias: Let the BN neck learn a bias.
        drop_rate: Dropout before the classifier.
    """

    task = "deen_zoo.training.tasks:AGWTask"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        backbone: str = "resnet50.tv_in1k",
        backbone_args: dict[str, Any] | None = None,
        pretrained_backbone: bool = False,
        non_local: bool = True,
        pool: str = "gem",
        stem_act: bool = True,
        neck_bias: bool = False,
        flip: bool = False,
        modality: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        output_stride: int = 16,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(in_chans, modality, drop_rate, output_stride)
        self.model_args = kept_args(locals())
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}: got {pool!r}")
        dd = {"device": device, "dtype": dtype}
        drop = dict(drop_path_rate=drop_path_rate, drop_block_rate=drop_block_rate)
        self.flip = flip
        if stem_act:  # without it the model is TVI-LFM's, whose README prints no numbers
            self.method = "CAJ" if flip else "AGW"
        self.visible_stem, self.infrared_stem, trunk, dims = resnet_parts(
            backbone, backbone_args, pretrained_backbone, drop, in_chans=in_chans, **dd
        )
        if not stem_act:
            del self.visible_stem.act1, self.infrared_stem.act1
        stages = []
        for i, blocks in enumerate(trunk, start=1):
            last = min(NON_LOCAL.get(i, 0), len(blocks)) if non_local else 0
            stages.append(NonLocalStage(blocks, [NonLocal(dims[i], **dd) for _ in range(last)]))
        self.set_stages(stages, dims)
        self.num_features = self.head_hidden_size = dims[-1]
        self.descriptors = dict(official=dims[-1], pool=dims[-1])
        self.gem: nn.Module = POOLS[pool](**(dd if pool == "gem-learned" else {}))
        self.bottleneck = (nn.BatchNorm1d if neck_bias else BNNeck)(dims[-1], **dd)
        self.reset_classifier(num_classes, global_pool)

    def forward_pool(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, h, w) -> pooled features (N, C)."""
        return self.gem(x)

    def describe(self, x: torch.Tensor, modality: Modality, descriptor: str) -> torch.Tensor:
        """Images -> L2-normalised features (N, C), after the BN neck or before it (``"pool"``)."""
        pool = self.forward_pool(self.forward_features(x, modality))
        return F.normalize(pool if descriptor == "pool" else self.bottleneck(pool))

    def add_mirrored(self, out: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """The sum, of length 1 again, as in CAJ's test."""
        return F.normalize(out + mirrored)


def _cfg(num_classes: int, height: int = 288, width: int = 144, **kwargs: Any) -> dict[str, Any]:
    paper = dict(
        paper_ids="arXiv:2001.04193",
        paper_name="Deep Learning for Person Re-identification: A Survey and Outlook",
        origin_url="https://github.com/mangye16/Cross-Modal-Re-ID-baseline",
    )
    return reid_cfg(num_classes, height, width, **{**paper, **kwargs})


def _tvilfm_cfg(num_classes: int) -> dict[str, Any]:
    return _cfg(
        num_classes,
        paper_ids="NeurIPS 2024",
        paper_name="Empowering Visible-Infrared Person Re-Identification with Large Foundation "
        "Models",
        origin_url="https://github.com/WHU-HZY/TVI-LFM",
    )


default_cfgs = generate_default_cfgs(
    {
        "agw_resnet50_sysu": _cfg(395),
        "agw_resnet50_regdb": _cfg(206),
        "agw_resnet50_llcm": _cfg(713),
        "tvilfm_resnet50_sysu": _tvilfm_cfg(395),
        "tvilfm_resnet50_regdb": _tvilfm_cfg(206),
        "tvilfm_resnet50_llcm": _tvilfm_cfg(713),
        "test_agw_resnet": _cfg(
            64,
            128,
            64,
            first_conv=("visible_stem.conv1.0", "infrared_stem.conv1.0"),
        ),
    }
)


def _create_tvilfm(variant: str, pretrained: bool, **kwargs: Any) -> AGW:
    own = dict(non_local=False, pool="gem-learned", stem_act=False, neck_bias=True)
    return build_model(AGW, variant, pretrained, **{**own, **kwargs})


@register_reid_model(imagenet=True)
def agw_resnet50_sysu(pretrained: bool = False, **kwargs: Any) -> AGW:
    """AGW for SYSU-MM01: 395 training identities."""
    return build_model(AGW, "agw_resnet50_sysu", pretrained, **kwargs)


@register_reid_model(imagenet=True)
def agw_resnet50_regdb(pretrained: bool = False, **kwargs: Any) -> AGW:
    """AGW for RegDB: 206 training identities."""
    return build_model(AGW, "agw_resnet50_regdb", pretrained, **kwargs)


@register_reid_model(imagenet=True)
def agw_resnet50_llcm(pretrained: bool = False, **kwargs: Any) -> AGW:
    """AGW for LLCM: 713 training identities."""
    return build_model(AGW, "agw_resnet50_llcm", pretrained, **kwargs)


@register_reid_model(imagenet=True)
def tvilfm_resnet50_sysu(pretrained: bool = False, **kwargs: Any) -> AGW:
    """The base model of TVI-LFM for SYSU-MM01: 395 training identities."""
    return _create_tvilfm("tvilfm_resnet50_sysu", pretrained, **kwargs)


@register_reid_model(imagenet=True)
def tvilfm_resnet50_regdb(pretrained: bool = False, **kwargs: Any) -> AGW:
    """The base model of TVI-LFM for RegDB: 206 training identities."""
    return _create_tvilfm("tvilfm_resnet50_regdb", pretrained, **kwargs)


@register_reid_model(imagenet=True)
def tvilfm_resnet50_llcm(pretrained: bool = False, **kwargs: Any) -> AGW:
    """The base model of TVI-LFM for LLCM: 713 training identities."""
    return _create_tvilfm("tvilfm_resnet50_llcm", pretrained, **kwargs)


@register_reid_model
def test_agw_resnet(pretrained: bool = False, **kwargs: Any) -> AGW:
    """A tiny AGW for tests and demonstrations, with random weights."""
    kwargs = kwargs if "backbone" in kwargs else {**TINY, **kwargs}
    return build_model(AGW, "test_agw_resnet", pretrained, **kwargs)
