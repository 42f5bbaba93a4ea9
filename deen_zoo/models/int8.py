"""A DEEN in bytes, for a CPU with oneDNN: what ``optimize_for_inference(model, "int8")`` builds.

Activations have one scale a tensor, weights one an output channel. Everything between the stems,
which stay in bfloat16, and the last pooling is uint8, but for the three factors of MFA (bfloat16)
and the sums of DEE's dilated convolutions.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from .deen import DEEN
from .deploy import (
    _DEE,
    _PNL,
    Conv,
    _Block,
    _BranchConv,
    _FusedStage,
    channel_product,
    position_product,
)

__all__ = ["Ranges", "check_plain", "quantize_stages"]


class _Scale(NamedTuple):
    """What a byte b stands for: ``scale * (b - zero)``."""

    scale: float
    zero: int

    def quantize(self, x: Tensor) -> Tensor:
        """To uint8, channels_last."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = x.mul(1 / self.scale).add_(self.zero).round_().clamp_(0, 255)
        return x.to(torch.uint8)

    def dequantize(self, x: Tensor) -> Tensor:
        return x.float().sub_(self.zero).mul_(self.scale)


def check_plain(model: DEEN) -> None:
    """Raise unless every block of a deployed model is convolutions and ReLUs only."""
    if not all(isinstance(block, _Block) for stage in model.stages for block in stage.blocks):
        raise UserError("int8 takes a backbone of plain ResNet blocks, such as resnet50")


class Ranges:
    """Ranges of what modules put out and take in: mean over images of each one's extremes."""

    def __init__(self, model: DEEN, calibration: Sequence[tuple[Tensor, str | Tensor]]):
        self.seen: dict[tuple[nn.Module, str], list[Tensor]] = {}
        hooks = [
            module.register_forward_hook(self._record) for module in model.modules()
            if isinstance(module, (Conv, _BranchConv, _DEE, type(model.visible_stem)))]
        for images, modality in calibration:
            model.forward_features(images, modality)
        for hook in hooks:
            hook.remove()
        stems = (model.visible_stem, model.infrared_stem)
        if not all((stem, "out") in self.seen for stem in stems):
            raise UserError(
                "int8 needs calibration=[(images, 'visible'), (images, 'infrared')]: some tens of "
                "preprocessed images of both modalities")

    def _record(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        for side, x in (("in", args[0]), ("out", out)):
            flat = x.flatten(1).float()
            self.seen.setdefault((module, side), []).append(
                torch.stack([flat.amin(1), flat.amax(1)]))

    def of(self, *modules: nn.Module, side: str = "out") -> _Scale:
        each = [torch.cat(self.seen[module, side], dim=1).mean(1) for module in modules]
        low = min(0.0, *(float(r[0]) for r in each))
        high = max(1e-6, *(float(r[1]) for r in each))
        scale = (high - low) / 255
        return _Scale(scale, round(-low / scale))


class _Int8Conv(nn.Module):
    """The operation of :class:`Conv` on bytes, with a scale for each output channel's weights.

    ``out`` is the scale of the bytes it gives, or None for bfloat16. ``other`` is overwritten.
    """

    def __init__(
            self, conv: Conv, x: _Scale, out: _Scale | None, other: _Scale | None = None):
        super().__init__()
        weight = conv.weight.detach().float()
        scales = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        values = (weight / scales[:, None, None, None]).round().to(torch.int8).contiguous()
        self.where = [list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups]
        self.x, self.values, self.scales = x, values, scales
        self.bias = conv.bias.detach().float()
        self.zeros = torch.zeros(len(scales), dtype=torch.int64)
        dtype = torch.bfloat16 if out is None else torch.uint8
        self.output = (*(out or (1.0, 0)), dtype)
        self.other = other or (1.0, 0)
        self.relu = "relu" if conv.relu else "none"
        self.packed: Tensor | None = None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.packed is None:  # the best layout depends on the size; any is right for all
            self.packed = torch.ops.onednn.qconv_prepack(
                self.values, self.scales, *self.x, *self.where, list(x.shape))
        weights = (*self.x, self.packed, self.scales, self.zeros)
        if other is None:
            return torch.ops.onednn.qconv2d_pointwise(
                x, *weights, self.bias, *self.where, *self.output, self.relu, [], "")
        return torch.ops.onednn.qconv2d_pointwise.binary(
            x, *weights, other, self.bias, *self.where, *self.output, *self.other,
            "sum", 1.0, self.relu, [], "")


class _Int8Branches(nn.Module):
    """:class:`_BranchConv` on bytes: (N, C + 2*C/4, h, w) -> (3N, out, h', w')."""

    def __init__(self, branches: _BranchConv, parts: list[_Scale], out: _Scale):
        super().__init__()
        self.widths = branches.widths
        self.convs = nn.ModuleList(
            _Int8Conv(conv, part, out) for conv, part in zip(branches.convs, parts, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.widths, dim=1)
        return torch.cat([
            conv(part.contiguous(memory_format=torch.channels_last))
            for conv, part in zip(self.convs, parts, strict=True)])


class _BytePool(nn.Module):
    """An average of bytes, which have the same scale."""

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x.float()).round_().to(torch.uint8)


class _Int8Block(nn.Module):
    def __init__(self, block: _Block, x: list[_Scale], ranges: Ranges):
        super().__init__()
        self.out = ranges.of(block.last)
        self.convs, scales = nn.ModuleList(), x
        for conv in block.convs:
            out = ranges.of(conv)
            self.convs.append(_int8(conv, scales, out))
            scales = [out]
        shortcut = list(block.shortcut)
        other = ranges.of(shortcut[-1]) if shortcut else x[0]
        self.shortcut = nn.Sequential(
            *(_BytePool(pool) for pool in shortcut[:-1]),
            *(_int8(conv, x, other) for conv in shortcut[-1:]))
        self.last = _Int8Conv(block.last, scales[0], self.out, other)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(y)
        return self.last(y, self.shortcut(x) if len(self.shortcut) else x.clone())


def _int8(conv: nn.Module, x: list[_Scale], out: _Scale) -> nn.Module:
    if isinstance(conv, _BranchConv):
        return _Int8Branches(conv, x, out)
    return _Int8Conv(conv, x[0], out)


class _Int8MFA(nn.Module):
    """CNL or PNL: convolutions in int8, the three factors in bfloat16."""

    def __init__(self, part: nn.Module, high: _Scale, low: _Scale, ranges: Ranges):
        super().__init__()
        self.low_dim = part.low_dim if isinstance(part, _PNL) else 0
        self.phi_g = _Int8Conv(part.phi_g, low, None)
        self.theta = _Int8Conv(part.theta, high, None)
        self.y, self.out = ranges.of(part.proj, side="in"), ranges.of(part.proj)
        self.proj = _Int8Conv(part.proj, self.y, self.out, high)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        theta, phi_g = self.theta(high), self.phi_g(low)
        if self.low_dim:
            y = position_product(theta, phi_g, self.low_dim)
        else:
            y = channel_product(theta, phi_g)
        return self.proj(self.y.quantize(y), high)


class _Int8DEE(nn.Module):
    """Gives what :class:`_DEE` gives, in bytes; ``out`` are the scales of its parts."""

    def __init__(self, dee: _DEE, x: _Scale, ranges: Ranges):
        super().__init__()
        self.x, self.branches = x, dee.branches
        self.reduce = nn.ModuleList(_Int8Conv(conv, x, None) for conv in dee.reduce)
        self.reduce_last = _Int8Conv(dee.reduce_last, x, None)
        self.hidden = ranges.of(dee.reduce_last)
        self.out = [x, *[self.hidden] * dee.branches]
        if len(dee.expand):
            self.out = [ranges.of(dee)]
        self.expand = nn.ModuleList(_Int8Conv(c, self.hidden, self.out[0]) for c in dee.expand)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for conv in self.reduce:
            total = conv(x, total)
        hidden = self.hidden.quantize(self.reduce_last(x, total))
        if not len(self.expand):
            return torch.cat([x, hidden], dim=1)
        parts = hidden.chunk(self.branches, dim=1)
        return torch.cat([
            self.out[0].quantize(self.x.dequantize(x)),
            *(conv(part.contiguous(memory_format=torch.channels_last))
              for conv, part in zip(self.expand, parts, strict=True))])


class _Int8Trunk(nn.Module):
    """All stages on bytes: the stems' output to the last stage's, both in floating point."""

    def __init__(self, model: DEEN, ranges: Ranges):
        super().__init__()
        self.enter = x = ranges.of(model.visible_stem, model.infrared_stem)
        self.stages = nn.ModuleList()
        for stage in model.stages:
            low, inputs = x, [x]
            layers = nn.ModuleDict()
            if isinstance(getattr(stage, "dee", None), _DEE):
                layers["dee"] = _Int8DEE(stage.dee, x, ranges)
                inputs = layers["dee"].out
            blocks = []
            for block in stage.blocks:
                blocks.append(_Int8Block(block, inputs, ranges))
                x = blocks[-1].out
                inputs = [x]
            layers["blocks"] = nn.Sequential(*blocks)
            if isinstance(stage, _FusedStage):
                layers["cnl"] = _Int8MFA(stage.cnl, x, low, ranges)
                layers["pnl"] = _Int8MFA(stage.pnl, layers["cnl"].out, low, ranges)
                x = layers["pnl"].out
            self.stages.append(layers)
        self.leave = x

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter.quantize(x)
        for stage in self.stages:
            low = x
            for name in ("dee", "blocks"):
                x = stage[name](x) if name in stage else x
            for name in ("cnl", "pnl"):
                x = stage[name](x, low) if name in stage else x
        return self.leave.dequantize(x)


def quantize_stages(model: DEEN, ranges: Ranges) -> nn.Module:
    """The stages of a deployed model on bytes: a stem's output in, the last maps out."""
    return nn.Sequential(_Int8Trunk(model, ranges))
