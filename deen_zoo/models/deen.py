"""DEEN: Diverse Embedding Expansion Network, for visible-infrared person re-identification.

Paper: `Diverse Embedding Expansion Network and Low-Light Cross-Modality Benchmark for
Visible-Infrared Person Re-identification` (CVPR 2023), https://arxiv.org/abs/2303.14481
Reference: https://github.com/ZYK100/LLCM, folder DEEN (commit 886e27c).

Two stems, one per modality, feed a shared ResNet trunk without its last stride. After every stage
but the last, MFA fuses the stage's input into its output; before the last stage, DEE turns each
map into three: the original and two generated branches. Written from the paper and from the
reference's behaviour, on top of timm's ResNet; gradients and outputs agree to rounding.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_notrace_function

from ..errors import UserError
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
from .pretrained import TINY_WEIGHTS, build_model
from .resnet import resnet_parts

__all__ = ["DEEN"]


class DEE(nn.Module):
    """Diverse embedding expansion: (N, C, H, W) -> (3N, C, H, W), branch-major.

    The first N rows are the input; each generated branch is three dilated 3x3 convolutions to C/4,
    averaged (summed without ``mean``, as in the paper), ReLU and a 1x1 convolution back.
    """

    def __init__(
        self, dim: int, drop_rate: float, mean: bool = True, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.divisor = 3 if mean else 1
        self.reduce = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(dim, dim // 4, 3, padding=d, dilation=d, bias=False, **dd)
                for d in (1, 2, 3)
            )
            for _ in range(2)
        )
        self.expand = nn.ModuleList(nn.Conv2d(dim // 4, dim, 1, **dd) for _ in range(2))
        self.drop = nn.Dropout(drop_rate)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_in")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [x]
        for reduce, expand in zip(self.reduce, self.expand):
            dilated = [conv(x) for conv in reduce]
            branches.append(expand(F.relu((dilated[0] + dilated[1] + dilated[2]) / self.divisor)))
        return self.drop(torch.cat(branches))


class CNL(nn.Module):
    """Channel non-local block: attention between the channels of two stages.

    ``high`` (N, high, h, w) is the stage's output, ``low`` (N, low, H, W) its input. The paper has
    a softmax where the reference divides by the number of positions. The reference gives ``g``
    stride 1 and ``W`` stride 2; a 1x1 convolution with a stride reads only what ``g`` with that
    stride computes, so here ``g`` has it.
    """

    def __init__(
        self,
        high_dim: int,
        low_dim: int,
        stride: int,
        softmax: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.softmax = softmax
        self.g = nn.Conv2d(low_dim, low_dim, 1, stride=stride, **dd)
        self.theta = nn.Conv2d(high_dim, low_dim, 1, **dd)
        self.phi = nn.Conv2d(low_dim, low_dim, 1, stride=stride, **dd)
        self.proj = ConvBN(low_dim, high_dim, **dd)

    def forward(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        theta = self.theta(high).flatten(2)  # (N, low, hw)
        phi = self.phi(low).flatten(2).transpose(1, 2)  # (N, hw, low)
        g = self.g(low)  # (N, low, h, w)
        energy = theta @ phi  # (N, low, low)
        attention = energy.softmax(2) if self.softmax else energy / phi.shape[2]
        return self.proj((attention @ g.flatten(2)).reshape(g.shape)) + high


class PNL(nn.Module):
    """Position non-local block: attention between the positions of two stages.

    Maps of low/2 channels are read as (low, positions/2): half of the positions become channels.
    The trained weights rely on this view of the reference, which a textbook block does not have.
    Without the paper's softmax the three factors may be multiplied in either order.
    """

    def __init__(
        self,
        high_dim: int,
        low_dim: int,
        softmax: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.softmax = softmax
        self.low_dim = low_dim
        self.g = nn.Conv2d(low_dim, low_dim // 2, 1, **dd)
        self.theta = nn.Conv2d(high_dim, low_dim // 2, 1, **dd)
        self.phi = nn.Conv2d(low_dim, low_dim // 2, 1, **dd)
        self.proj = ConvBN(low_dim // 2, high_dim, **dd)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], self.low_dim, -1)  # (N, low/2, H, W) -> (N, low, HW/2)

    def forward(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        theta = self.theta(high)  # (N, low/2, h, w)
        phi = self._rows(self.phi(low))
        g = self._rows(self.g(low)).transpose(1, 2)  # (N, HW/2, low)
        theta_rows = self._rows(theta).transpose(1, 2)  # (N, hw/2, low)
        if self.softmax:
            y = (theta_rows @ phi).softmax(2) @ g  # (N, hw/2, low)
        else:
            y = triple_product(theta_rows, phi, g) / phi.shape[2]
        return self.proj(y.transpose(1, 2).reshape(theta.shape)) + high


@register_notrace_function
def triple_product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``a @ b @ c`` of (N, i, j), (N, j, k), (N, k, l), bracketed for the fewer multiplications."""
    i, j, k, l = a.shape[1], a.shape[2], c.shape[1], c.shape[2]  # noqa: E741, as in the docstring
    if i * j * k + i * k * l <= j * k * l + i * j * l:
        return a @ b @ c
    return a @ (b @ c)


@register_notrace_function
def check_even(x: torch.Tensor) -> None:
    """PNL reads two channels as one row, so a fused map needs an even number of positions."""
    if x.shape[2] * x.shape[3] % 2 == 1:
        raise UserError(
            f"MFA needs an even number of positions in each map, and these images give one of "
            f"{x.shape[2]} x {x.shape[3]}: make their height or width a multiple of 32, "
            f"e.g. 384 x 144"
        )


class SideBySide(nn.Module):
    """Branches from the batch to the channels: (B*N, C, H, W), branch-major, -> (N, B*C, H, W)."""

    def __init__(self, branches: int):
        super().__init__()
        self.branches = branches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Three dimensions at a time: OpenVINO cannot convert a transposition of five here.
        channels, height, width = x.shape[1], x.shape[2], x.shape[3]
        x = x.reshape(self.branches, -1, channels * height * width).transpose(0, 1)
        return x.reshape(-1, self.branches * channels, height, width)


class FusedStage(nn.Module):
    """A ResNet stage followed by MFA: CNL then PNL fuse the stage's input into its output."""

    def __init__(self, blocks: nn.Module, cnl: CNL, pnl: PNL):
        super().__init__()
        self.blocks, self.cnl, self.pnl = blocks, cnl, pnl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.blocks(x)
        check_even(high)
        return self.pnl(self.cnl(high, x), x)


class DEEN(ReidModel):
    """Two-stem ResNet with DEE and MFA, a BN neck and one classifier shared by the branches.

    C is the width of the last stage (2048 for ResNet-50, 1024 with ``num_stages=3``), B the number
    of branches (3, or 1 without ``dee``). Images are (N, in_chans, H, W), ImageNet-normalised.
    The final maps are (N, B*C, H/16, W/16); channels ``b*C:(b+1)*C`` are branch b. What
    ``forward_train`` gives is branch-major: ``pool`` and ``bn`` (B*N, C), neither normalised, and
    ``logits`` (B*N, num_classes).

    Descriptors: ``"official"`` is (2, B, C) laid out flat, the pooled features of each branch and
    then those after the BN neck, each of the 2B vectors L2-normalised, so that the dot product of
    two descriptors is the sum of the reference's six similarities (between -2B and 2B). ``"pool"``
    and ``"bn"`` are its halves. ``"original"`` is the original branch's part of it (2, C), for
    which the generated branches are not computed, most of the work in a ResNet-50. As in the
    reference's test, the descriptor of the mirrored image is added and not normalised again.

    :class:`ReidModel` describes the arguments of all families.

    Args:
        num_stages: ResNet stages used: 4, or 3 as the reference does for RegDB.
        dee: Generate the two extra branches.
        mfa: Fuse the stages.
        dee_mean: Average DEE's dilated convolutions as the reference does; False sums them as the
            paper does.
        mfa_softmax: Softmax on MFA's attention as in the paper; the reference has none.
        drop_rate: Dropout on DEE's output, as in the reference.
    """

    method = "DEEN"
    task = "deen_zoo.training.tasks:DEENTask"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        backbone: str = "resnet50.tv_in1k",
        backbone_args: dict[str, Any] | None = None,
        pretrained_backbone: bool = False,
        num_stages: int = 4,
        dee: bool = True,
        mfa: bool = True,
        dee_mean: bool = True,
        mfa_softmax: bool = False,
        flip: bool = True,
        modality: str | None = None,
        drop_rate: float = 0.01,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        output_stride: int = 16,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(in_chans, modality, drop_rate, output_stride)
        self.model_args = kept_args(locals())
        if num_stages not in (3, 4):
            raise ValueError(f"num_stages must be 3 (RegDB) or 4: got {num_stages!r}")
        dd = {"device": device, "dtype": dtype}
        drop = dict(drop_path_rate=drop_path_rate, drop_block_rate=drop_block_rate)
        self.flip = flip
        self.num_branches = 3 if dee else 1
        self.visible_stem, self.infrared_stem, trunk, dims = resnet_parts(
            backbone, backbone_args, pretrained_backbone, drop, num_stages, in_chans=in_chans, **dd
        )
        stages: list[nn.Module] = []
        for i, blocks in enumerate(trunk):
            low, high, last = dims[i], dims[i + 1], i == num_stages - 1
            if mfa and not last:
                cnl = CNL(high, low, 1 if i == 0 else 2, mfa_softmax, **dd)
                stages.append(FusedStage(blocks, cnl, PNL(high, low, mfa_softmax, **dd)))
            elif dee and last:
                parts = dict(dee=DEE(low, drop_rate, dee_mean, **dd), blocks=blocks)
                stages.append(nn.Sequential(OrderedDict(parts, branches=SideBySide(3))))
            else:
                stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
        self.branch_features = width = dims[-1]
        self.num_features = self.head_hidden_size = self.num_branches * width
        self.set_stages(stages, [*dims[:-1], self.num_features])
        features = self.num_features
        self.descriptors = dict(official=2 * features, bn=features, pool=features)
        self.descriptors["original"] = 2 * width
        self.head_drop = nn.Identity()  # drop_rate is that of DEE
        self.bottleneck = BNNeck(width, **dd)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names, for timm's layer-wise learning rates and freezing."""
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"].insert(0, (r"^stages\.(\d+)\.dee", (-1,)))
        return groups

    def forward_pool(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, B*C, h, w) -> pooled features (B*N, C), branch-major as the reference's."""
        x = x.mean((2, 3)).reshape(x.shape[0], self.num_branches, self.branch_features)
        return x.transpose(0, 1).flatten(0, 1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps (N, B*C, h, w) -> mean of the branches' logits (N, num_classes).

        With ``pre_logits``, or without a classifier, the BN-neck features (N, B*C).
        """
        if self.global_pool == "":
            return x
        bn = self.bottleneck(self.forward_pool(x))
        bn = bn.reshape(self.num_branches, -1, bn.shape[1])  # (B, N, C)
        if pre_logits or self.num_classes == 0:
            return bn.transpose(0, 1).flatten(1)
        return self.classifier(bn.mean(0))

    def describe(self, x: torch.Tensor, modality: Modality, descriptor: str) -> torch.Tensor:
        """Images -> (N, descriptors[descriptor]); see the class."""
        if descriptor == "original":
            pool = self._original_maps(x, modality).mean((2, 3))  # (N, C)
        else:
            pool = self.forward_pool(self.forward_features(x, modality))  # (B*N, C)
        parts = []
        if descriptor != "bn":
            parts.append(F.normalize(pool))
        if descriptor != "pool":
            parts.append(F.normalize(self.bottleneck(pool)))
        rows = torch.stack(parts).reshape(-1, x.shape[0], pool.shape[1])  # (2*B, N, C)
        return rows.transpose(0, 1).flatten(1)

    def _original_maps(self, x: torch.Tensor, modality: Modality) -> torch.Tensor:
        """Images -> the original branch's maps (N, C, h, w)."""
        x = self.forward_stems(x, modality)
        for i, stage in enumerate(self.stages):
            x = stage(x) if i + 1 < len(self.stages) else stage.blocks(x)  # type: ignore[operator]
        return x


def _cfg(num_classes: int, height: int = 384, width: int = 144, **kwargs: Any) -> dict[str, Any]:
    return reid_cfg(
        num_classes,
        height,
        width,
        paper_ids="arXiv:2303.14481",
        paper_name="Diverse Embedding Expansion Network",
        origin_url="https://github.com/ZYK100/LLCM",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "deen_resnet50_sysu": _cfg(395),
        "deen_resnet50_regdb": _cfg(206),
        "deen_resnet50_llcm": _cfg(713),
        "test_deen_resnet": _cfg(
            64,
            128,
            64,
            file=TINY_WEIGHTS,
            license="apache-2.0",
            first_conv=("visible_stem.conv1.0", "infrared_stem.conv1.0"),
        ),
    }
)


@register_reid_model(imagenet=True)
def deen_resnet50_sysu(pretrained: bool = False, **kwargs: Any) -> DEEN:
    """DEEN for SYSU-MM01: 395 training identities."""
    return build_model(DEEN, "deen_resnet50_sysu", pretrained, **kwargs)


@register_reid_model(imagenet=True)
def deen_resnet50_regdb(pretrained: bool = False, **kwargs: Any) -> DEEN:
    """DEEN for RegDB: 206 training identities, no fourth stage, C = 1024."""
    return build_model(DEEN, "deen_resnet50_regdb", pretrained, **{"num_stages": 3, **kwargs})


@register_reid_model(imagenet=True)
def deen_resnet50_llcm(pretrained: bool = False, **kwargs: Any) -> DEEN:
    """DEEN for LLCM: 713 training identities."""
    return build_model(DEEN, "deen_resnet50_llcm", pretrained, **kwargs)


@register_reid_model
def test_deen_resnet(pretrained: bool = False, **kwargs: Any) -> DEEN:
    """A tiny DEEN for tests and demonstrations, trained on synthetic people only."""
    kwargs = kwargs if "backbone" in kwargs else {**TINY, **kwargs}
    return build_model(DEEN, "test_deen_resnet", pretrained, **kwargs)
