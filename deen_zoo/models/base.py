"""The model contract: two stems chosen by modality, shared stages, a BN neck and a classifier.

Training, extraction, search, export and publishing rely on :class:`ReidModel` and on nothing of a
single family, whose entrypoints are registered with :func:`register_reid_model`.
"""

import contextlib
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model, register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch.utils.checkpoint import checkpoint

__all__ = ["MODALITIES", "BNNeck", "ReidModel", "kept_args", "register_reid_model", "reid_cfg"]

MODALITIES = ("visible", "infrared")
Modality = str | torch.Tensor | None
NAMES: dict[str, bool] = {}  # of all registered models: trained from ImageNet's weights or not
NOT_KEPT = {"self", "__class__", "num_classes", "in_chans", "global_pool", "output_stride"}
NOT_KEPT |= {"pretrained_backbone", "device", "dtype"}
# The backbone of the tiny models of the tests and demonstrations.
TINY = dict(
    backbone="resnet10t",
    backbone_args=dict(stem_width=16, stem_type="deep", channels=(32, 48, 64, 128)),
)


def register_reid_model(
    entrypoint: Callable[..., Any] | None = None, *, imagenet: bool = False
) -> Callable[..., Any]:
    """Register a model with timm, and with this package's ``create_model`` and ``list_models``.

    The entrypoint returns a :class:`ReidModel`, and its module has ``default_cfgs``. With
    ``imagenet`` it takes ``pretrained_backbone``, and is trained from ImageNet's weights.
    """
    if entrypoint is None:
        return functools.partial(register_reid_model, imagenet=imagenet)
    NAMES[entrypoint.__name__] = imagenet
    return register_model(entrypoint)


def reid_cfg(num_classes: int, height: int, width: int, **more: Any) -> dict[str, Any]:
    """An entry of ``default_cfgs``: images squashed to (height, width), ImageNet-normalised."""
    return {
        "num_classes": num_classes,
        "input_size": (3, height, width),
        "pool_size": (height // 16, width // 16),
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "lanczos",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": ("visible_stem.conv1", "infrared_stem.conv1"),
        "classifier": "classifier",
        "license": "other",
        **more,
    }


def kept_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """``model_args`` from the ``locals()`` of a constructor that has only called its parent's."""
    return {name: value for name, value in given.items() if name not in NOT_KEPT}


class ReidModel(nn.Module):
    """What every model of the zoo offers; a family subclasses it.

    N images are (N, in_chans, H, W), normalised as ``pretrained_cfg`` says. ``modality`` is
    ``"visible"``, ``"infrared"`` or a bool tensor (N,), True for infrared. None means the modality
    that the model was given in its constructor; a model without one warns and takes ``"visible"``.

    A family's constructor builds the stems, the ``stages`` with their ``feature_info``
    (:meth:`set_stages`) and the ``bottleneck``, sets ``model_args`` and ``descriptors``, and ends
    with ``reset_classifier``.

    The families made of a ResNet share these arguments: ``num_classes`` (0 for none: ``forward``
    then gives BN-neck features), ``in_chans`` (channels of the images of either modality),
    ``global_pool`` (``"avg"``, or ``""`` for unpooled maps, with ``num_classes=0``), ``backbone``
    (any timm ResNet by name, with its weight tag: ``resnet50.tv_in1k``), ``backbone_args`` (keyword
    arguments for it, such as ``channels``), ``pretrained_backbone`` (start both stems and the trunk
    from its own weights), ``flip`` and ``modality`` (see the attributes), ``drop_path_rate`` and
    ``drop_block_rate`` (of the trunk, as in timm's ResNet), ``output_stride`` (16 only), ``device``
    and ``dtype`` (of the parameters).

    Attributes:
        modality: What ``modality=None`` means in the calls.
        num_features: Channels of the final maps.
        descriptors: Width of each descriptor by name; the first, ``"official"``, is the one that
            the family's results were published with.
        flip: Whether the published results add the descriptor of the mirrored image.
        method: The method whose published numbers are of such a model; empty if there are none.
        num_branches: How many branches the channels of the final maps hold, one after another.
        task: ``"module:Class"`` of the family's training task; None for DEEN's, whose terms that
            need branches vanish without them.
        model_args: What ``config.json`` keeps to build the model again.
        trained_on: What the weights were trained on and where they are from, where that is known:
            ``source``, ``dataset``, ``split``, ...; kept in ``config.json``.
    """

    flip = True
    method: str = ""
    num_branches: int = 1
    task: str | None = None
    trained_on: dict[str, Any] | None = None
    modality: str | None  # TorchScript reads this

    if TYPE_CHECKING:
        in_chans: int
        num_classes: int
        num_features: int
        global_pool: str
        descriptors: dict[str, int]
        model_args: dict[str, Any]
        pretrained_cfg: dict[str, Any]
        feature_info: list[dict[str, Any]]
        visible_stem: nn.Module
        infrared_stem: nn.Module
        stages: nn.Sequential
        bottleneck: nn.BatchNorm1d

    def __init__(
        self,
        in_chans: int = 3,
        modality: str | None = None,
        drop_rate: float = 0.0,
        output_stride: int = 16,
    ):
        super().__init__()
        if output_stride != 16:
            raise ValueError(f"output_stride must be 16, there is no other: got {output_stride!r}")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1): got {drop_rate!r}")
        self.drop_rate = drop_rate
        self.head_drop: nn.Module = nn.Dropout(drop_rate)
        if modality not in (None, *MODALITIES):
            raise ValueError(f"modality must be 'visible', 'infrared' or None: got {modality!r}")
        self.in_chans = in_chans
        self.modality = modality
        self.grad_checkpointing = False

    @property
    def embed_dim(self) -> int:
        """Width of the official descriptor."""
        return self.descriptors["official"]

    def set_stages(self, stages: Sequence[nn.Module], channels: Sequence[int]) -> None:
        """Set ``stages``; ``channels`` are those of the stems' maps and of each stage's."""
        self.stages = nn.Sequential(*stages)
        names = ["visible_stem", *(f"stages.{i}" for i in range(len(stages)))]
        self.feature_info = [
            dict(num_chs=width, reduction=min(2 ** max(i + 1, 2), 16), module=name)
            for i, (name, width) in enumerate(zip(names, channels))
        ]

    # what a family defines

    def forward_pool(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, num_features, h, w) -> what the BN neck takes, (N, num_features)."""
        return x.mean((2, 3))

    def forward_train(self, x: torch.Tensor, modality: Modality = None) -> dict[str, torch.Tensor]:
        """Images -> what the family's losses read: ``pool``, ``bn`` and ``logits``."""
        pool = self.forward_pool(self.forward_features(x, modality))
        bn = self.bottleneck(pool)
        return {"pool": pool, "bn": bn, "logits": self.classifier(self.head_drop(bn))}

    def describe(self, x: torch.Tensor, modality: Modality, descriptor: str) -> torch.Tensor:
        """Images -> (N, descriptors[descriptor]), of the images as they are."""
        raise NotImplementedError

    # timm's calls

    def forward_stems(self, x: torch.Tensor, modality: Modality = None) -> torch.Tensor:
        """Images (N, in_chans, H, W) -> (N, stem, H/4, W/4), each row through its own stem.

        In training a stem sees only its own rows, so that its batch statistics are its own (a stem
        without rows gets zero gradients). In eval a named modality runs one stem; a tensor runs
        both and chooses, which keeps shapes static.
        """
        check_images(x, self.in_chans)
        modality = known_modality(x, modality, self.modality)
        if self.training:
            infrared = infrared_rows(x, modality)
            visible_at, infrared_at = (~infrared).nonzero()[:, 0], infrared.nonzero()[:, 0]
            out = torch.cat([self.visible_stem(x[visible_at]), self.infrared_stem(x[infrared_at])])
            return out[torch.cat([visible_at, infrared_at]).argsort()]
        if isinstance(modality, str):
            return self.infrared_stem(x) if modality == "infrared" else self.visible_stem(x)
        infrared = infrared_rows(x, modality).to(x.device).reshape(-1, 1, 1, 1)
        return torch.where(infrared, self.infrared_stem(x), self.visible_stem(x))

    def forward_features(self, x: torch.Tensor, modality: Modality = None) -> torch.Tensor:
        """Images (N, in_chans, H, W) -> maps (N, num_features, h, w)."""
        x = self.forward_stems(x, modality)
        for stage in self.stages:
            if torch.jit.is_scripting():
                x = stage(x)
            else:
                x = recomputed(stage, x) if self.grad_checkpointing else stage(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps -> logits (N, num_classes); with ``pre_logits`` or no classifier, BN features."""
        if self.global_pool == "":
            return x
        bn = self.bottleneck(self.forward_pool(x))
        if pre_logits or self.num_classes == 0:
            return bn
        return self.classifier(self.head_drop(bn))

    def forward(self, x: torch.Tensor, modality: Modality = None) -> torch.Tensor:
        """Images -> logits (N, num_classes), or BN-neck features (N, num_features)."""
        return self.forward_head(self.forward_features(x, modality))

    @torch.jit.export
    def forward_embedding(
        self,
        x: torch.Tensor,
        modality: Modality = None,
        flip: bool = False,
        descriptor: str = "official",
    ) -> torch.Tensor:
        """Images -> descriptors (N, descriptors[descriptor]), to be compared by dot product.

        Args:
            x: Images (N, in_chans, H, W).
            modality: See the class.
            flip: Add the descriptor of the mirrored images.
            descriptor: One of ``descriptors``.
        """
        if descriptor not in self.descriptors:
            raise ValueError(f"descriptor must be one of {self.descriptors}: got {descriptor}")
        if not flip:
            return self.describe(x, modality, descriptor)
        # A graph of one pass has half the nodes of two; without a graph, two need less memory.
        if not torch.jit.is_scripting() and in_graph():
            both = torch.cat([x, x.flip(3)])
            told = modality if not isinstance(modality, torch.Tensor) else modality.repeat(2)
            rows = self.describe(both, told, descriptor)
            return self.add_mirrored(rows[: x.shape[0]], rows[x.shape[0] :])
        out = self.describe(x, modality, descriptor)
        return self.add_mirrored(out, self.describe(x.flip(3), modality, descriptor))

    def add_mirrored(self, out: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """Combine the descriptors of images and of mirrored images, (N, D) each: their sum."""
        return out + mirrored

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        modality: Modality = None,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Images -> the stems' maps and each stage's, as timm's ResNet gives its own; NCHW only."""
        if isinstance(indices, str):
            raise ValueError(f"indices {indices!r}: give the modality by its name, modality=")
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW': got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        x = self.forward_stems(x, modality)
        intermediates = [x] if 0 in take else []
        for i, stage in enumerate(self.stages[:last] if stop_early else self.stages, start=1):
            x = recomputed(stage, x) if self.grad_checkpointing else stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages that the given intermediates do not need, and the classifier."""
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        self.stages = self.stages[:last]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names, for timm's layer-wise learning rates and freezing."""
        whole = r"^stages\.(\d+)"
        parts = [whole + r"\.blocks\.(\d+)", whole + r"\.(?!blocks)"]
        blocks: list[Any] = [(whole, None)] if coarse else [(parts[0], None), (parts[1], (99999,))]
        blocks.append((r"^bottleneck", (99999,)))
        return dict(stem=r"^(?:visible|infrared)_stem", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of keeping their activations.

        The numbers stay the same, to the bit, those of running statistics too.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier of BN-neck features; Identity without classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, ~ N(0, 0.001) without bias; 0 removes it."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"global_pool must be 'avg' or '' (none): got {global_pool!r}")
            self.global_pool = global_pool
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more: got {num_classes!r}")
        if num_classes and not self.global_pool:
            raise ValueError("a classifier needs pooled features: give global_pool='avg'")
        self.num_classes = num_classes
        self.classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            weight = self.bottleneck.weight
            width, like = weight.shape[0], dict(device=weight.device, dtype=weight.dtype)
            self.classifier = nn.Linear(width, num_classes, bias=False, **like)
            nn.init.normal_(self.classifier.weight, std=0.001)

    # what training and deployment call

    @torch.jit.ignore
    def param_groups(self) -> list[dict[str, Any]]:
        """All parameters in two groups, ``"rest"`` and then ``"head"``, for an optimiser.

        The head (BN neck and classifier) is trained at the full learning rate, the rest at a
        fraction of it.
        """
        head = [*self.bottleneck.parameters(), *self.classifier.parameters()]
        ids = {id(parameter) for parameter in head}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in ids]
        return [{"name": "rest", "params": rest}, {"name": "head", "params": head}]

    @torch.jit.ignore
    def for_modality(
        self,
        modality: str,
        flip: bool | None = None,
        normalize: bool = True,
        descriptor: str = "official",
    ) -> nn.Module:
        """A plain module for images of one modality: (N, in_chans, H, W) -> (N, width).

        It shares this model's weights, puts it into eval mode, and can be traced, scripted and
        exported: what trackers and other toolboxes take. ``flip`` and ``descriptor`` are those of
        :meth:`forward_embedding` (None: as the model's results were published); ``normalize``
        scales each descriptor to length 1.
        """
        if modality not in MODALITIES:
            raise ValueError(f"modality must be 'visible' or 'infrared': got {modality!r}")
        flip = self.flip if flip is None else flip
        return _OneModality(self, modality, flip, normalize, descriptor).eval()


class _OneModality(nn.Module):
    def __init__(
        self, model: ReidModel, modality: str, flip: bool, normalize: bool, descriptor: str
    ):
        super().__init__()
        self.model, self.modality, self.descriptor = model, modality, descriptor
        self.flip, self.normalize = flip, normalize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.model.forward_embedding(x, self.modality, self.flip, self.descriptor)
        return nn.functional.normalize(out) if self.normalize else out


# modality and images


@functools.cache
def _warn_of_no_modality() -> None:
    warnings.warn(
        "no modality was given, so the images are taken for visible ones: pass "
        "modality='visible', 'infrared' or a bool tensor (N,), or build the model with one, "
        "create_model(..., modality='infrared')",
        stacklevel=2,
    )


@register_notrace_function
def known_modality(x: torch.Tensor, modality: Modality, default: str | None) -> str | torch.Tensor:
    """The modality of the rows of ``x``, checked; ``default`` if none is given."""
    if modality is None:
        if default is not None:
            return default
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            _warn_of_no_modality()
        return "visible"
    if isinstance(modality, torch.Tensor):
        if modality.dtype != torch.bool or modality.dim() != 1 or modality.shape[0] != x.shape[0]:
            raise ValueError(
                f"a modality tensor must be bool, one entry per image, True for infrared: "
                f"got {modality.dtype} {modality.shape} for {x.shape[0]} images"
            )
        return modality
    if modality != "visible" and modality != "infrared":
        raise ValueError(
            f"modality must be 'visible', 'infrared' or a bool tensor (N,), True for infrared, as "
            f"of torch.tensor([m == 'infrared' for m in modalities]): got {modality}"[:220]
        )
    return modality


def in_graph() -> bool:
    """Whether what runs is recorded, by ``torch.jit.trace``, ``torch.export`` or ``compile``."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    return tracing or torch.compiler.is_compiling()


@register_notrace_function
def infrared_rows(x: torch.Tensor, modality: str | torch.Tensor) -> torch.Tensor:
    """Which rows of ``x`` are infrared, as a bool tensor (N,)."""
    if isinstance(modality, torch.Tensor):
        return modality
    if modality == "infrared":
        return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    return torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)


@register_notrace_function
def check_images(x: torch.Tensor, in_chans: int) -> None:
    """Raise ValueError unless ``x`` is (N, in_chans, H, W)."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must be (N, {in_chans}, H, W): got {x.shape}")


# parts


class ConvBN(nn.Sequential):
    """1x1 convolution and a BN that starts at zero, so that a fresh block is the identity."""

    def __init__(self, in_dim: int, out_dim: int, device: Any = None, dtype: Any = None):
        conv = nn.Conv2d(in_dim, out_dim, 1, device=device, dtype=dtype)
        bn = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
        nn.init.zeros_(bn.weight)
        super().__init__(OrderedDict(conv=conv, bn=bn))


@register_notrace_module
class BNNeck(nn.BatchNorm1d):
    """BatchNorm1d whose bias is a buffer frozen at zero; weight ~ N(1, 0.01)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None):
        super().__init__(dim, device=device, dtype=dtype)
        bias = self.bias.detach()
        del self.bias
        self.register_buffer("bias", bias)
        nn.init.normal_(self.weight, 1.0, 0.01)


# gradient checkpointing


def recomputed(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``stage(x)`` without keeping its maps for the backward pass, which computes them again.

    The second time, batch norms leave their running statistics alone: each batch counts once.
    """
    if torch.compiler.is_compiling():  # it updates them once by itself, and takes no context
        return checkpoint(stage, x, use_reentrant=False)
    norms = [m for m in stage.modules() if getattr(m, "num_batches_tracked", None) is not None]
    return checkpoint(
        stage,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _Uncounted(norms)),
    )


class _Uncounted:
    """A context in which batch norms leave their running statistics alone. Each backward pass
    through a retained graph enters it again."""

    def __init__(self, norms: list[Any]):
        self.norms = norms

    def __enter__(self) -> None:
        self.momentums = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum in zip(self.norms, self.momentums):
            norm.momentum = momentum
            norm.num_batches_tracked -= int(norm.training)
