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
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices

from .blocks import (
    CNL,
    DEE,
    PNL,
    BNNeck,
    FusedStage,
    Modality,
    Stage,
    Stem,
    check_images,
    infrared_rows_of,
    recomputed,
    without_stride,
)
from .checkpoint import checkpoint_filter_fn
from .pretrained import HUB_ORGANISATION, TINY_WEIGHTS, backbone_weights, safe_source

__all__ = ["DEEN"]

MODALITIES = ("visible", "infrared")


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
        form: ``"official"`` as the reference computes DEE and MFA, or ``"paper"``: dilated
            convolutions summed, not averaged, and a softmax on MFA's attention.
        modality: What ``modality=None`` means in the calls, ``"visible"`` or ``"infrared"``.
        drop_rate: Dropout on DEE's output.
        device: Of the parameters, as for torch's own modules.
        dtype: Of the parameters.
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
        form: str = "official",
        modality: str = "visible",
        drop_rate: float = 0.01,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if modality not in MODALITIES:
            raise ValueError(f"modality must be 'visible' or 'infrared': got {modality}")
        if form not in ("official", "paper"):
            raise ValueError(f"form must be 'official' or 'paper': got {form!r}")
        if num_stages not in (3, 4):
            raise ValueError(f"num_stages must be 3 (RegDB) or 4: got {num_stages}")
        dd = {"device": device, "dtype": dtype}
        paper = form == "paper"
        self.modality = modality
        self.in_chans = in_chans
        self.num_branches = 3 if dee else 1
        self.num_fused = num_stages - 1 if mfa else 0
        self.num_recomputed = 0
        self.model_args = dict(
            backbone=backbone,
            backbone_args=backbone_args,
            num_stages=num_stages,
            dee=dee,
            mfa=mfa,
            form=form,
            modality=modality,
            drop_rate=drop_rate,
        )

        own_args = dict(backbone_args or {})
        if pretrained_backbone and "pretrained_cfg_overlay" not in own_args:
            own_args["pretrained_cfg_overlay"] = dict(file=backbone_weights(backbone))

        def resnet() -> nn.Module:
            net = timm.create_model(
                backbone,
                pretrained=pretrained_backbone,
                in_chans=in_chans,
                num_classes=0,
                **own_args,
                **dd,
            )
            if not isinstance(net, timm.models.ResNet):
                raise ValueError(
                    f"backbone must be a timm ResNet such as 'resnet50': "
                    f"{backbone} is a {type(net).__name__}"
                )
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
                blocks = without_stride(blocks, backbone) if i == 4 else blocks
                expand = [("dee", DEE(low, drop_rate, paper, **dd))] if dee else []
                stages.append(Stage(OrderedDict([*expand, ("blocks", blocks)])))
                high *= self.num_branches
            elif mfa:
                cnl = CNL(high, low, 1 if i == 1 else 2, paper, **dd)
                stages.append(FusedStage(blocks, cnl, PNL(high, low, paper, **dd)))
            else:
                stages.append(Stage(OrderedDict(blocks=blocks)))
            self.feature_info.append(
                dict(num_chs=high, reduction=reduction, module=f"stages.{i - 1}")
            )
        self.stages = nn.Sequential(*stages)

        self.branch_features = dims[-1]
        self.num_features = self.head_hidden_size = self.num_branches * self.branch_features
        self.bottleneck = BNNeck(self.branch_features, **dd)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters without weight decay besides biases and norms: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns of parameter names, for timm's layer-wise learning rates and freezing."""
        if coarse:
            blocks = [(r"^stages\.(\d+)", None), (r"^bottleneck", (99999,))]
        else:
            blocks = [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.dee", (-1,)),
                (r"^stages\.(\d+)\.[cp]nl", (99999,)),
                (r"^bottleneck", (99999,)),
            ]
        return dict(stem=r"^(?:visible|infrared)_stem", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, stages: Optional[int] = None) -> None:
        """Recompute stages in the backward pass instead of keeping their activations.

        The numbers stay the same, to the bit, those of running statistics too.

        Args:
            enable: False for none.
            stages: So many of the first ones, which hold the largest maps; None for all.
        """
        if stages is not None and not 0 <= stages <= len(self.stages):
            raise ValueError(f"stages must be None or up to {len(self.stages)}: got {stages}")
        self.num_recomputed = (len(self.stages) if stages is None else stages) if enable else 0

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier of one branch's BN-neck features; Identity without classes."""
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
                self.branch_features,
                num_classes,
                bias=False,
                device=weight.device,
                dtype=weight.dtype,
            )
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
            out = torch.cat(
                [self.visible_stem(x[visible_rows]), self.infrared_stem(x[infrared_rows])]
            )
            return out[torch.cat([visible_rows, infrared_rows]).argsort()]
        if modality is None:
            modality = self.modality
        if isinstance(modality, str):
            return self.infrared_stem(x) if modality == "infrared" else self.visible_stem(x)
        infrared = infrared.to(x.device).reshape(-1, 1, 1, 1)
        return torch.where(infrared, self.infrared_stem(x), self.visible_stem(x))

    def _side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """(B*N, C, H, W), branch-major, -> (N, B*C, H, W)."""
        x = x.reshape(self.num_branches, -1, x.shape[1], x.shape[2], x.shape[3])
        return x.transpose(0, 1).flatten(1, 2)

    def _branch_major(self, x: torch.Tensor) -> torch.Tensor:
        """(N, B*C) -> (B*N, C), branch-major as the reference orders them."""
        x = x.reshape(-1, self.num_branches, self.branch_features)
        return x.transpose(0, 1).flatten(0, 1)

    def _forward_stages(self, x: torch.Tensor, modality: Modality) -> torch.Tensor:
        """Images (N, in_chans, H, W) -> (B*N, C, H/16, W/16), branch-major."""
        x = self.forward_stems(x, modality)
        for i, stage in enumerate(self.stages):
            if i < self.num_recomputed and not torch.jit.is_scripting():
                x = recomputed(stage, x)
            else:
                x = stage(x)
        return x

    def forward_features(self, x: torch.Tensor, modality: Modality = None) -> torch.Tensor:
        """Images (N, in_chans, H, W) -> (N, B*C, H/16, W/16); channels b*C:(b+1)*C are branch b."""
        return self._side_by_side(self._forward_stages(x, modality))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps (N, B*C, h, w) -> mean of the branches' logits (N, num_classes).

        With ``pre_logits``, or without a classifier, the BN-neck features (N, B*C).
        """
        if self.global_pool == "":
            return x
        bn = self.bottleneck(self._branch_major(x.mean((2, 3))))
        bn = bn.reshape(self.num_branches, -1, bn.shape[1])  # (B, N, C)
        if pre_logits or self.num_classes == 0:
            return bn.transpose(0, 1).flatten(1)
        return self.classifier(bn.mean(0))

    def forward(self, x: torch.Tensor, modality: Modality = None) -> torch.Tensor:
        """Images (N, in_chans, H, W) -> logits (N, num_classes), or BN-neck features (N, B*C)."""
        return self.forward_head(self.forward_features(x, modality))

    def forward_branches(
        self,
        x: torch.Tensor,
        modality: Modality = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Images -> ``(pool, bn)``, each (B*N, C), branch-major: what the losses read.

        ``pool`` are average-pooled maps before the BN neck, ``bn`` after it; neither is normalised.
        """
        pool = self._forward_stages(x, modality).mean((2, 3))
        return pool, self.bottleneck(pool)

    def forward_embedding(
        self,
        x: torch.Tensor,
        modality: Modality = None,
        flip: bool = False,
    ) -> torch.Tensor:
        """Images -> the official descriptor (N, 2*B*C), laid out as (2, B, C): pool, then bn.

        Each of the 2B vectors is L2-normalised, so the dot product of two descriptors is the sum of
        the reference's six similarities (between -2B and 2B). With ``flip`` the descriptor of the
        mirrored images is added and, as in the reference's test, not normalised again.
        """
        parts = torch.cat([F.normalize(part) for part in self.forward_branches(x, modality)])
        out = parts.reshape(2 * self.num_branches, -1, parts.shape[1]).transpose(0, 1).flatten(1)
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
            x = recomputed(stage, x) if i <= self.num_recomputed else stage(x)
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
        "num_classes": num_classes,
        "input_size": (3, 384, 144),
        "pool_size": (24, 9),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "lanczos",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": ("visible_stem.conv1", "infrared_stem.conv1"),
        "classifier": "classifier",
        "hf_hub_filename": "model.safetensors",
        "license": "other",
        "paper_ids": "arXiv:2303.14481",
        "paper_name": "Diverse Embedding Expansion Network",
        "origin_url": "https://github.com/ZYK100/LLCM",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "deen_resnet50_sysu": _cfg(395, hf_hub_id=f"{HUB_ORGANISATION}/deen_resnet50_sysu"),
        "deen_resnet50_regdb": _cfg(206, hf_hub_id=f"{HUB_ORGANISATION}/deen_resnet50_regdb"),
        "deen_resnet50_llcm": _cfg(713, hf_hub_id=f"{HUB_ORGANISATION}/deen_resnet50_llcm"),
        "test_deen_resnet": _cfg(
            64,
            file=TINY_WEIGHTS,
            license="apache-2.0",
            input_size=(3, 128, 64),
            pool_size=(8, 4),
            first_conv=("visible_stem.conv1.0", "infrared_stem.conv1.0"),
        ),
    }
)


def _create_deen(variant: str, pretrained: bool = False, **kwargs: Any) -> DEEN:
    out_indices = tuple(range(kwargs.get("num_stages", 4) + 1))
    return build_model_with_cfg(
        DEEN,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **safe_source(variant, pretrained, kwargs),
    )


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
    tiny = dict(stem_width=16, stem_type="deep", channels=(32, 48, 64, 128))
    model_args = {} if "backbone" in kwargs else dict(backbone="resnet10t", backbone_args=tiny)
    return _create_deen("test_deen_resnet", pretrained, **dict(model_args, **kwargs))
