"""The parts of DEEN: DEE, MFA's two non-local blocks, the BN neck, and the stages they form."""

import contextlib
from collections import OrderedDict
from typing import Any, List, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch.utils.checkpoint import checkpoint

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
                f"got {modality.dtype} {modality.shape} for {x.shape[0]} images"
            )
        return modality
    if modality not in ("visible", "infrared"):
        raise ValueError(
            f"modality must be 'visible', 'infrared' or a bool tensor (N,), True for infrared: "
            f"got {modality}"
        )
    return torch.full((x.shape[0],), modality == "infrared", dtype=torch.bool, device=x.device)


@register_notrace_function
def check_images(x: torch.Tensor, in_chans: int, fused: int) -> None:
    """PNL reads two channels as one row, so each fused stage needs an even number of positions."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must be (N, {in_chans}, H, W): got {x.shape}")
    for stage in range(fused):
        stride = 4 * 2**stage
        height, width = (x.shape[2] + stride - 1) // stride, (x.shape[3] + stride - 1) // stride
        if height * width % 2 == 1:
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]} give a {height} x {width} map at stride "
                f"{stride}, and MFA needs an even number of positions: make height or width a "
                f"multiple of {8 * 2 ** (fused - 1)}, e.g. 384 x 144"
            )


class DEE(nn.Module):
    """Diverse embedding expansion: (N, C, H, W) -> (3N, C, H, W), branch-major.

    The first N rows are the input; each generated branch is three dilated 3x3 convolutions to C/4,
    averaged (summed in the ``paper`` form), ReLU and a 1x1 convolution back.
    """

    def __init__(
        self, dim: int, drop_rate: float, paper: bool = False, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.divisor = 1 if paper else 3
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


class ConvBN(nn.Sequential):
    """1x1 convolution and a BN that starts at zero, so that a fresh block is the identity."""

    def __init__(self, in_dim: int, out_dim: int, device: Any = None, dtype: Any = None):
        conv = nn.Conv2d(in_dim, out_dim, 1, device=device, dtype=dtype)
        bn = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)
        nn.init.zeros_(bn.weight)
        super().__init__(OrderedDict(conv=conv, bn=bn))


class CNL(nn.Module):
    """Channel non-local block: attention between the channels of two stages.

    The reference divides by the number of positions where the ``paper`` form has a softmax.

    ``high`` (N, high, h, w) is the stage's output, ``low`` (N, low, H, W) its input. The reference
    gives ``g`` stride 1 and ``W`` stride 2; a 1x1 convolution with a stride reads only what ``g``
    with that stride computes, so here ``g`` has it.
    """

    def __init__(
        self,
        high_dim: int,
        low_dim: int,
        stride: int,
        paper: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.paper = paper
        self.g = nn.Conv2d(low_dim, low_dim, 1, stride=stride, **dd)
        self.theta = nn.Conv2d(high_dim, low_dim, 1, **dd)
        self.phi = nn.Conv2d(low_dim, low_dim, 1, stride=stride, **dd)
        self.proj = ConvBN(low_dim, high_dim, **dd)

    def forward(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        theta = self.theta(high).flatten(2)  # (N, low, hw)
        phi = self.phi(low).flatten(2).transpose(1, 2)  # (N, hw, low)
        g = self.g(low)  # (N, low, h, w)
        energy = theta @ phi  # (N, low, low)
        attention = energy.softmax(2) if self.paper else energy / phi.shape[2]
        return self.proj((attention @ g.flatten(2)).reshape(g.shape)) + high


class PNL(nn.Module):
    """Position non-local block: attention between the positions of two stages.

    Maps of low/2 channels are read as (low, positions/2): half of the positions become channels.
    The trained weights rely on this view of the reference, which a textbook block does not have.
    Without the softmax of the ``paper`` form the three factors may be multiplied in either order.
    """

    def __init__(
        self,
        high_dim: int,
        low_dim: int,
        paper: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.paper = paper
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
        if self.paper:
            y = (theta_rows @ phi).softmax(2) @ g  # (N, hw/2, low)
        else:
            y = triple_product(theta_rows, phi, g) / phi.shape[2]
        return self.proj(y.transpose(1, 2).reshape(theta.shape)) + high


class Deployable:
    """A part that ``timm.utils.reparameterize_model`` replaces by its deploy form."""

    def fuse(self) -> nn.Module:
        from .fuse import deploy

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

    def __init__(self, dim: int, device: Any = None, dtype: Any = None):
        super().__init__(dim, device=device, dtype=dtype)
        bias = self.bias.detach()
        del self.bias
        self.register_buffer("bias", bias)
        nn.init.normal_(self.weight, 1.0, 0.01)


def without_stride(blocks: nn.Module, backbone: str) -> nn.Module:
    """Take the stride out of a ResNet stage; timm's ``output_stride=16`` would also dilate it."""
    for name, module in list(blocks.named_modules()):
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            parent, _, child = name.rpartition(".")
            setattr(blocks.get_submodule(parent), child, nn.Identity())
        elif getattr(module, "stride", 1) not in (1, 2, (1, 1)) or hasattr(module, "filt"):
            raise ValueError(
                f"backbone {backbone} strides by {type(module).__name__}, which DEEN "
                f"cannot undo: choose a plain ResNet such as resnet50"
            )
    return blocks


@torch.jit.ignore
def recomputed(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``stage(x)`` without keeping its maps for the backward pass, which computes them again.

    The second time, batch norms leave their running statistics alone: each batch counts once.
    """
    if torch.compiler.is_compiling():  # which updates them once by itself, and takes no context
        return checkpoint(stage, x, use_reentrant=False)
    norms = [m for m in stage.modules() if getattr(m, "num_batches_tracked", None) is not None]
    return checkpoint(
        stage,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _Uncounted(norms)),
    )


class _Uncounted:
    """Within it batch norms see a batch that does not count. It can be entered again, as each
    backward pass through a graph that is retained does."""

    def __init__(self, norms: List[nn.Module]):
        self.norms = norms

    def __enter__(self) -> None:
        self.momentums = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum in zip(self.norms, self.momentums):
            norm.momentum = momentum
            norm.num_batches_tracked -= int(norm.training)
