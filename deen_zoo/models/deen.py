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
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices

from .checkpoint import checkpoint_filter_fn
from .weights import HUB_ORGANISATION, TINY_WEIGHTS, backbone_weights, safe_source

__all__ = ["DEEN"]

MODALITIES = ("visible", "infrared")
Modality = Union[str, torch.Tensor, None]


@register_notrace_function
def triple_product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``a @ b @ c`` of (N, i, j), (N, j, k), (N, k, l), bracketed for the fewer multiplications."""
    i, j, k, l = a.shape[1], a.shape[2], c.shape[1], c.shape[2]  # noqa: E741
    if i * j * k + i * k * l <= j * k * l + i * j * l:
        return a @ b @ c
    return a @ (b @ c)


@register_notrace_function
def infrared_rows_of(x: torch.Tensor, modality: Modality, default: str) -> torch.Tensor:
    """The rows of ``x`` that are infrared, as a bool tensor (N,); checks what was said."""
    if modality is None:
        modality = default
    if isinstance(modality, torch.Tensor):
        if modality.dtype != torch.bool or modality.dim() != 1 or modality.shape[0] != x.shape[0]:
            raise ValueError(
                f"a modality tensor must be bool, one entry an image, True for infrared: "
                f"got {modality.dtype} {modality.shape} for {x.shape[0]} images")
        return modality
    if modality not in ("visible", "infrared"):
        raise ValueError(
            f"modality must be 'visible', 'infrared' or a bool tensor (N,), True for infrared: "
            f"got {modality}")
    return torch.full((x.shape[0],), modality == "infrared", dtype=torch.bool, device=x.device)


@register_notrace_function
def check_images(x: torch.Tensor, in_chans: int, fused: int) -> None:
    """PNL reads two channels as one row, so each fused stage needs an even number of positions."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must be (N, {in_chans}, H, W): got {x.shape}")
    for stage in range(fused):
        stride = 4 * 2 ** stage
        height, width = (x.shape[2] + stride - 1) // stride, (x.shape[3] + stride - 1) // stride
        if height * width % 2 == 1:
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]} give a {height} x {width} map at stride "
                f"{stride}, and MFA needs an even number of positions: make height or width a "
                f"multiple of {8 * 2 ** (fused - 1)}, e.g. 384 x 144")


class DEE(nn.Module):
    """Diverse embedding expansion: (N, C, H, W) -> (3N, C, H, W), branch-major.

    The first N rows are the input; each generated branch is three dilated 3x3 convolutions to C/4,
    averaged, ReLU and a 1x1 convolution back (the paper sums, the reference averages).
    """

    def __init__(self, dim: int, drop_rate: float, generated: int = 2, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduce = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(dim, dim // 4, 3, padding=d, dilation=d, bias=False, **dd)
                for d in (1, 2, 3))
            for _ in range(generated))
        self.expand = nn.ModuleList(nn.Conv2d(dim // 4, dim, 1, **dd) for _ in range(generated))
        self.drop = nn.Dropout(drop_rate)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_in")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [x]
        for reduce, expand in zip(self.reduce, self.expand):
            dilated = [conv(x) for conv in reduce]
            branches.append(expand(F.relu((dilated[0] + dilated[1] + dilated[2]) / 3)))
        return self.drop(torch.cat(branches))


class ConvBN(nn.Sequential):
    """1x1 convolution and a BN that starts at zero, so that a fresh block is the identity."""

    def __init__(self, in_dim: int, out_dim: int, device=None, dtype=None):
        conv = nn.Conv2d(in_dim, out_dim, 1, device=device, dtype=dtype)
        bn = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
        nn.init.zeros_(bn.weight)
        super().__init__(OrderedDict(conv=conv, bn=bn))


class CNL(nn.Module):
    """Channel non-local block: attention between the channels of two stages, no softmax.

    ``high`` (N, high, h, w) is the stage's output, ``low`` (N, low, H, W) its input. The reference
    gives ``g`` stride 1 and ``W`` stride 2; a 1x1 convolution with a stride reads only what ``g``
    with that stride computes, so here ``g`` has it.
    """

    def __init__(self, high_dim: int, low_dim: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.g = nn.Conv2d(low_dim, low_dim, 1, stride=stride, **dd)
        self.theta = nn.Conv2d(high_dim, low_dim, 1, **dd)
        self.phi = nn.Conv2d(low_dim, low_dim, 1, stride=stride, **dd)
        self.proj = ConvBN(low_dim, high_dim, **dd)

    def forward(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        theta = self.theta(high).flatten(2)  # (N, low, hw)
        phi = self.phi(low).flatten(2).transpose(1, 2)  # (N, hw, low)
        g = self.g(low)  # (N, low, h, w)
        attention = theta @ phi / phi.shape[2]  # (N, low, low)
        return self.proj((attention @ g.flatten(2)).reshape(g.shape)) + high


class PNL(nn.Module):
    """Position non-local block: attention between the positions of two stages, no softmax.

    Maps of low/2 channels are read as (low, positions/2): half of the positions become channels.
    The trained weights rely on this view of the reference, which a textbook block does not have.
    Without a softmax the three factors may be multiplied in either order.
    """

    def __init__(self, high_dim: int, low_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
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
        y = triple_product(self._rows(theta).transpose(1, 2), phi, g) / phi.shape[2]  # (N, hw/2, low)
        return self.proj(y.transpose(1, 2).reshape(theta.shape)) + high


class Deployable:
    """A part that ``timm.utils.reparameterize_model`` replaces by its deploy form."""

    def fuse(self) -> nn.Module:
        from .deploy import deploy
        return deploy(self)


class Stem(Deployable, nn.Sequential):
    """A ResNet's first convolution to its max-pooling."""


class Stage(Deployable, nn.Sequential):
    """A ResNet stage as ``blocks``, after ``dee`` if it is the last."""


class FusedStage(Deployable, nn.Module):
    """A ResNet stage followed by MFA: CNL then PNL fuse the stage's input into its output."""

    def __init__(self, blocks: nn.Module, cnl: CNL, pnl: PNL):
        super().__init__()
        self.blocks, self.cnl, self.pnl = blocks, cnl, pnl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pnl(self.cnl(self.blocks(x), x), x)


@register_notrace_module
class BNNeck(nn.BatchNorm1d):
    """BatchNorm1d whose bias is a buffer frozen at zero; weight ~ N(1, 0.01)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, device=device, dtype=dtype)
        bias = self.bias.detach()
        del self.bias
        self.register_buffer("bias", bias)
        nn.init.normal_(self.weight, 1.0, 0.01)


def _without_stride(blocks: nn.Module, backbone: str) -> nn.Module:
    """Take the stride out of a ResNet stage; timm's ``output_stride=16`` would also dilate it."""
    for name, module in list(blocks.named_modules()):
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            parent, _, child = name.rpartition(".")
            setattr(blocks.get_submodule(parent), child, nn.Identity())
        elif getattr(module, "stride", 1) not in (1, 2, (1, 1)) or hasattr(module, "filt"):
            raise ValueError(f"backbone {backbone} strides by {type(module).__name__}, which DEEN "
                             f"cannot undo: choose a plain ResNet such as resnet50")
    return blocks


class DEEN(nn.Module):
    """Two-stem ResNet with DEE and MFA, a BN neck and one classifier shared by the branches.

    C is the width of the last stage (2048 for ResNet-50, 1024 with ``num_stages=3``), B the number
    of branches (3, or 1 without ``dee``). Images are (N, in_chans, H, W), ImageNet-normalised.

    Args:
        num_classes: Training identities; 0 for none: ``forward`` then gives BN-neck features.
        in_chans: Channels of the images of either modality.
        global_pool: ``"avg"``, or ``""`` for unpooled maps (with ``num_classes=0``).
        backbone: Any timm ResNet by name, with its weight tag (``resnet50.tv_in1k``).
        backbone_args: Keyword arguments for that ResNet, such as ``channels``.
        pretrained_backbone: Start both stems and the trunk from the backbone's own weights.
        num_stages: ResNet stages used: 4, or 3 as the reference does for RegDB.
        dee: Generate the two extra branches.
        mfa: Fuse the stages.
        modality: What ``modality=None`` means in the calls, ``"visible"`` or ``"infrared"``.
        drop_rate: Dropout on DEE's output.
    """

    def __init__(
            self,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = "avg",
            backbone: str = "resnet50.tv_in1k",
            backbone_args: Optional[Dict[str, Any]] = None,
            pretrained_backbone: bool = False,
            num_stages: int = 4,
            dee: bool = True,
            mfa: bool = True,
            modality: str = "visible",
            drop_rate: float = 0.01,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if modality not in MODALITIES:
            raise ValueError(f"modality must be 'visible' or 'infrared': got {modality}")
        if num_stages not in (3, 4):
            raise ValueError(f"num_stages must be 3 (RegDB) or 4: got {num_stages}")
        dd = {"device": device, "dtype": dtype}
        self.modality = modality
        self.in_chans = in_chans
        self.num_branches = 3 if dee else 1
        self.num_fused = num_stages - 1 if mfa else 0
        self.grad_checkpointing = False
        self.model_args = dict(
            backbone=backbone, backbone_args=backbone_args, num_stages=num_stages, dee=dee, mfa=mfa,
            modality=modality, drop_rate=drop_rate)

        overlay = dict(file=backbone_weights(backbone)) if pretrained_backbone else None

        def resnet() -> nn.Module:
            net = timm.create_model(
                backbone, pretrained=pretrained_backbone, pretrained_cfg_overlay=overlay,
                in_chans=in_chans, num_classes=0, **(backbone_args or {}), **dd)
            if not isinstance(net, timm.models.ResNet):
                raise ValueError(f"backbone must be a timm ResNet such as 'resnet50': {backbone} is "
                                 f"a {type(net).__name__}")
            return net

        def stem(net: nn.Module) -> Stem:
            names = ("conv1", "bn1", "act1", "maxpool")
            return Stem(OrderedDict((name, getattr(net, name)) for name in names))

        trunk = resnet()
        self.visible_stem, self.infrared_stem = stem(trunk), stem(resnet())
        if pretrained_backbone:
            self.infrared_stem.load_state_dict(self.visible_stem.state_dict())

        dims = [trunk.feature_info[i]["num_chs"] for i in range(num_stages + 1)]
        self.feature_info = [dict(num_chs=dims[0], reduction=4, module="visible_stem")]
        stages: List[nn.Module] = []
        for i in range(1, num_stages + 1):
            blocks = getattr(trunk, f"layer{i}")
            reduction, low, high = min(2 ** (i + 1), 16), dims[i - 1], dims[i]
            if i == num_stages:
                blocks = _without_stride(blocks, backbone) if i == 4 else blocks
                expand = [("dee", DEE(low, drop_rate, **dd))] if dee else []
                stages.append(Stage(OrderedDict([*expand, ("blocks", blocks)])))
                high *= self.num_branches
            elif mfa:
                cnl = CNL(high, low, stride=1 if i == 1 else 2, **dd)
                stages.append(FusedStage(blocks, cnl, PNL(high, low, **dd)))
            else:
                stages.append(Stage(OrderedDict(blocks=blocks)))
            self.feature_info.append(
                dict(num_chs=high, reduction=reduction, module=f"stages.{i - 1}"))
        self.stages = nn.Sequential(*stages)

        self.branch_features = dims[-1]
        self.num_features = self.head_hidden_size = self.num_branches * self.branch_features
        self.bottleneck = BNNeck(self.branch_features, **dd)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        if coarse:
            blocks = [(r"^stages\.(\d+)", None), (r"^bottleneck", (99999,))]
        else:
            blocks = [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.dee", (-1,)),
                (r"^stages\.(\d+)\.[cp]nl", (99999,)), (r"^bottleneck", (99999,))]
        return dict(stem=r"^(visible|infrared)_stem", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a fresh one, ~ N(0, 0.001) without bias; 0 removes it."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"global_pool must be 'avg' or '' (none): got {global_pool!r}")
            self.global_pool = global_pool
        if num_classes and not self.global_pool:
            raise ValueError("a classifier needs pooled features: give global_pool='avg'")
        self.num_classes = num_classes
        self.classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.bottleneck.weight
            self.classifier = nn.Linear(
                self.branch_features, num_classes, bias=False,
                device=weight.device, dtype=weight.dtype)
            nn.init.normal_(self.classifier.weight, std=0.001)

    def forward_stems(self, x: torch.Tensor, modality: Modality = None) -> torch.Tensor:
        """Images (N, in_chans, H, W) -> (N, stem, H/4, W/4), each row through its own stem.

        In training a stem sees only its own rows, so that its batch statistics are its own (a stem
        without rows gets zero gradients). In eval a named modality runs one stem; a tensor runs
        both and chooses, which keeps shapes static.
        """
        check_images(x, self.in_chans, self.num_fused)
        infrared = infrared_rows_of(x, modality, self.modality)
        if self.training:
            visible_rows, infrared_rows = (~infrared).nonzero()[:, 0], infrared.nonzero()[:, 0]
            out = torch.cat([
                self.visible_stem(x[visible_rows]), self.infrared_stem(x[infrared_rows])])
            return out[torch.cat([visible_rows, infrared_rows]).argsort()]
        if modality is None:
            modality = self.modality
        if isinstance(modality, str):
            return self.infrared_stem(x) if modality == "infrared" else self.visible_stem(x)
        infrared = infrared.to(x.device).reshape(-1, 1, 1, 1)
        return torch.where(infrared, self.infrared_stem(x), self.visible_stem(x))

    def _side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """(B*N, C, H, W), branch-major, -> (N, B*C, H, W)."""
        if self.num_branches == 1:
            return x
        return torch.cat(x.chunk(self.num_branches), dim=1)

    def _branch_major(self, x: torch.Tensor) -> torch.Tensor:
        """(N, B*C) -> (B*N, C), branch-major as the reference orders them."""
        return torch.cat(x.chunk(self.num_branches, dim=1))

    def forward_features(self, x: torch.Tensor, modality: Modality = None) -> torch.Tensor:
        """Images (N, in_chans, H, W) -> (N, B*C, H/16, W/16); channels b*C:(b+1)*C are branch b."""
        x = self.forward_stems(x, modality)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x)
        else:
            x = self.stages(x)
        return self._side_by_side(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps (N, B*C, h, w) -> mean of the branches' logits (N, num_classes).

        With ``pre_logits``, or without a classifier, the BN-neck features (N, B*C).
        """
        if self.global_pool == "":
            return x
        bn = self.bottleneck(self._branch_major(x.mean((2, 3)))).chunk(self.num_branches)
        if pre_logits or self.num_classes == 0:
            return torch.cat(bn, dim=1)
        return self.classifier(torch.stack(bn).mean(0))

    def forward(self, x: torch.Tensor, modality: Modality = None) -> torch.Tensor:
        """Images (N, in_chans, H, W) -> logits (N, num_classes), or BN-neck features (N, B*C)."""
        return self.forward_head(self.forward_features(x, modality))

    def forward_branches(
            self, x: torch.Tensor, modality: Modality = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Images -> ``(pool, bn)``, each (B*N, C), branch-major: what the losses read.

        ``pool`` are average-pooled maps before the BN neck, ``bn`` after it; neither is normalised.
        """
        pool = self._branch_major(self.forward_features(x, modality).mean((2, 3)))
        return pool, self.bottleneck(pool)

    def forward_embedding(
            self, x: torch.Tensor, modality: Modality = None, flip: bool = False,
    ) -> torch.Tensor:
        """Images -> the official descriptor (N, 2*B*C), laid out as (2, B, C): pool, then bn.

        Each of the 2B vectors is L2-normalised, so the dot product of two descriptors is the sum of
        the reference's six similarities (between -2B and 2B). With ``flip`` the descriptor of the
        mirrored images is added and, as in the reference's test, not normalised again.
        """
        parts = torch.cat([F.normalize(part) for part in self.forward_branches(x, modality)])
        out = torch.cat(parts.chunk(2 * self.num_branches), dim=1)
        return out + self.forward_embedding(x.flip(3), modality) if flip else out

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
            modality: Modality = None,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """The stems' output and each stage's, after MFA; the last as ``forward_features``.

        Args:
            x: Images (N, in_chans, H, W).
            indices: The last n if int, all if None, else those of a sequence.
            norm: No effect, as in timm's ResNet: no norm applies to maps.
            stop_early: Do not run stages that are not needed.
            output_fmt: ``"NCHW"`` only.
            intermediates_only: Leave out the final features.
            modality: As in ``forward``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW': got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        x = self.forward_stems(x, modality)
        intermediates = [x] if 0 in take else []
        for i, stage in enumerate(self.stages[:last] if stop_early else self.stages, start=1):
            x = checkpoint_seq([stage], x) if self.grad_checkpointing else stage(x)
            if self.feature_info[i]["num_chs"] != x.shape[1]:  # the last stage, after DEE
                x = self._side_by_side(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the stages that the given intermediates do not need, and the classifier."""
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        self.stages = self.stages[:last]
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _cfg(num_classes: int, **kwargs: Any) -> Dict[str, Any]:
    return {
        "num_classes": num_classes, "input_size": (3, 384, 144), "pool_size": (24, 9),
        "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "lanczos",
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": ("visible_stem.conv1", "infrared_stem.conv1"), "classifier": "classifier",
        "hf_hub_filename": "model.safetensors", "license": "apache-2.0",
        "paper_ids": "arXiv:2303.14481", "paper_name": "Diverse Embedding Expansion Network",
        "origin_url": "https://github.com/ZYK100/LLCM", **kwargs,
    }


default_cfgs = generate_default_cfgs({
    "deen_resnet50_sysu": _cfg(395, hf_hub_id=f"{HUB_ORGANISATION}/deen_resnet50_sysu"),
    "deen_resnet50_regdb": _cfg(206, hf_hub_id=f"{HUB_ORGANISATION}/deen_resnet50_regdb"),
    "deen_resnet50_llcm": _cfg(713, hf_hub_id=f"{HUB_ORGANISATION}/deen_resnet50_llcm"),
    "test_deen_resnet": _cfg(
        64, file=TINY_WEIGHTS, input_size=(3, 128, 64), pool_size=(8, 4),
        first_conv=("visible_stem.conv1.0", "infrared_stem.conv1.0")),
})


def _create_deen(variant: str, pretrained: bool = False, **kwargs: Any) -> DEEN:
    out_indices = tuple(range(kwargs.get("num_stages", 4) + 1))
    return build_model_with_cfg(
        DEEN, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **safe_source(variant, pretrained, kwargs))


@register_model
def deen_resnet50_sysu(pretrained: bool = False, **kwargs: Any) -> DEEN:
    """DEEN for SYSU-MM01: 395 training identities."""
    return _create_deen("deen_resnet50_sysu", pretrained, **kwargs)


@register_model
def deen_resnet50_regdb(pretrained: bool = False, **kwargs: Any) -> DEEN:
    """DEEN for RegDB: 206 training identities, no fourth stage, C = 1024."""
    return _create_deen("deen_resnet50_regdb", pretrained, **{"num_stages": 3, **kwargs})


@register_model
def deen_resnet50_llcm(pretrained: bool = False, **kwargs: Any) -> DEEN:
    """DEEN for LLCM: 713 training identities."""
    return _create_deen("deen_resnet50_llcm", pretrained, **kwargs)


@register_model
def test_deen_resnet(pretrained: bool = False, **kwargs: Any) -> DEEN:
    """A tiny DEEN for tests and demonstrations, trained on synthetic people only."""
    backbone_args = dict(stem_width=16, stem_type="deep", channels=(32, 48, 64, 128))
    model_args = dict(backbone="resnet10t", backbone_args=backbone_args)
    return _create_deen("test_deen_resnet", pretrained, **dict(model_args, **kwargs))
