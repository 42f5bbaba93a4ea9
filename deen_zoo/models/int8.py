"""A DEEN in bytes, for a CPU with oneDNN: what ``optimize_for_inference(model, "int8")`` builds.

Activations have a scale for each channel, and so have weights for each output channel. Between the
stems, which stay in float32, and the last maps all is uint8 but for the output of each stage's last
block and what MFA adds to it, and the sums of DEE's dilated convolutions, which are bfloat16.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from .deen import DEEN
from .deploy import (
    _CNL,
    _DEE,
    Conv,
    _Block,
    _BranchConv,
    _FusedStage,
    channel_product,
    position_product,
)

__all__ = ["Kernel", "Ranges", "check_plain", "quantize_stages"]


MARGIN = 1.2  # for images that go beyond those of the calibration; clipping costs much more


class _Scale(NamedTuple):
    """What a byte b of channel c stands for, ``scale[c] * (b - zero)``, and what it is on average.

    A convolution that reads bytes has the scales of their channels in its weights, and one that
    writes them in those of its outputs, so that a scale for each channel costs nothing.
    """

    scale: Tensor
    zero: int
    mean: Tensor

    def quantize(self, x: Tensor) -> Tensor:
        """To uint8, channels_last."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = x.mul((1 / self.scale).view(-1, 1, 1)).add_(self.zero)
        return x.round_().clamp_(0, 255).to(torch.uint8)

    def dequantize(self, x: Tensor) -> Tensor:
        return x.bfloat16().sub_(self.zero).mul_(self.scale.bfloat16().view(-1, 1, 1))


def check_plain(model: DEEN) -> None:
    """Raise unless every block of a deployed model is convolutions and ReLUs only, with MFA, if
    any, in the official form."""
    if not all(isinstance(block, _Block) for stage in model.stages for block in stage.blocks):
        raise UserError("int8 takes a backbone of plain ResNet blocks, such as resnet50")
    if not all(isinstance(s.cnl, _CNL) for s in model.stages if isinstance(s, _FusedStage)):
        raise UserError("int8 takes form='official', not 'paper'")


class Ranges:
    """Ranges of what modules put out, by channel, over all images, and a margin."""

    def __init__(self, model: DEEN, calibration: Sequence[tuple[Tensor, str | Tensor]]):
        self.seen: dict[nn.Module, list[Tensor]] = {}
        hooks = [
            module.register_forward_hook(self._record) for module in model.modules()
            if isinstance(module, (Conv, _BranchConv, _DEE, type(model.visible_stem)))]
        for images, modality in calibration:
            model.forward_features(images, modality)
        for hook in hooks:
            hook.remove()
        if not {model.visible_stem, model.infrared_stem} <= set(self.seen):
            raise UserError(
                "int8 needs calibration=[(images, 'visible'), (images, 'infrared')]: some tens of "
                "preprocessed images of both modalities")

    def _record(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        statistics = torch.stack([out.amin((2, 3)), out.amax((2, 3)), out.mean((2, 3))])
        self.seen.setdefault(module, []).append(statistics.float())  # (3, N, C)

    def extremes(self, *modules: nn.Module) -> tuple[Tensor, Tensor]:
        """(C,) lowest and (C,) highest values over the modules."""
        low, high, _ = self._all(modules)
        return MARGIN * low.amin(0), MARGIN * high.amax(0)

    def _all(self, modules: Sequence[nn.Module]) -> Tensor:
        return torch.cat([seen for module in modules for seen in self.seen[module]], dim=1)

    def spread(self, *modules: nn.Module) -> Tensor:
        """(C,) proportions of the channels, so that with the same zero for all their steps are
        small; that of a channel that is nearly dead is not taken as it is."""
        low, high = self.extremes(*modules)
        widest = torch.maximum(-low, high)
        widest = widest.clamp(min=max(1e-6, 0.02 * float(widest.max())))
        ratios = torch.linspace(0.1, 1, 19)[:, None]  # of how far bytes reach below and above 0
        spread = torch.maximum(torch.maximum(-low / ratios, high), 0.02 * widest.max())
        steps = (1 + ratios * (low < 0).any()) * spread / widest
        return spread[steps.square().sum(1).argmin()]

    def of(self, *modules: nn.Module, along: Tensor | None = None) -> _Scale:
        """The scale of bytes that hold these outputs, in proportion to ``along`` if given."""
        along = self.spread(*modules) if along is None else along
        low, high = (extremes / along for extremes in self.extremes(*modules))
        lowest, highest = min(0.0, float(low.min())), float(high.max())
        step = max(1e-6, highest - lowest) / 255
        return _Scale(along * step, round(-lowest / step), self._all(modules)[2].mean(0))


class Kernel(nn.Module):
    """A layer of constants, which copies of a model share: packed weights cannot be copied."""

    def __deepcopy__(self, memo: dict[int, object]) -> "Kernel":
        return self


class _Int8Conv(Kernel):
    """The operation of :class:`Conv` on bytes, with a scale for each output channel's weights. What
    their rounding adds to an output on average is taken from the bias.

    ``out`` is the scale of the bytes it gives, or None for bfloat16. ``other``, of the same type
    and in proportion to ``out``, is overwritten.
    """

    def __init__(
            self, conv: Conv, x: _Scale, out: _Scale | None, other: _Scale | None = None):
        super().__init__()
        weight = conv.weight.detach().float()
        groups, (rows, columns) = conv.groups, weight.shape[:2]
        read, mean = (
            v.view(groups, 1, columns).expand(-1, rows // groups, -1).reshape(rows, columns, 1, 1)
            for v in (x.scale, x.mean / x.scale))
        weight = weight * read
        scales = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        values = (weight / scales[:, None, None, None]).round()
        added = ((values * scales[:, None, None, None] - weight) * mean).flatten(1).sum(1)
        self.values = values.to(torch.int8).contiguous()
        written = torch.ones(rows) if out is None else out.scale
        self.scales, self.bias = scales / written, (conv.bias.detach().float() - added) / written
        self.zeros = torch.zeros(rows, dtype=torch.int64)
        self.where = [list(conv.stride), list(conv.padding), list(conv.dilation), groups]
        self.x = (1.0, x.zero)
        self.output = (1.0, 0, torch.bfloat16) if out is None else (1.0, out.zero, torch.uint8)
        self.other = (1.0, 0)
        if other is not None:
            self.other = (float((other.scale / written).mean()), other.zero)
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

    def __init__(self, branches: _BranchConv, parts: list[_Scale], out: _Scale | None):
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
    """``along`` are the proportions of the channels of the stage's residual stream; None for its
    last block, which gives bfloat16."""

    def __init__(
            self, block: _Block, x: list[_Scale], along: Tensor | None, ranges: Ranges):
        super().__init__()
        self.x, self.convs, scales = x[0], nn.ModuleList(), x
        for conv in block.convs:
            out = ranges.of(conv)
            self.convs.append(_int8(conv, scales, out))
            scales = [out]
        shortcut = list(block.shortcut)
        self.out = self.other = None
        if along is not None:
            self.out = ranges.of(block.last, along=along)
            self.other = ranges.of(shortcut[-1], along=along) if shortcut else self.x
        self.shortcut = nn.Sequential(
            *(_BytePool(pool) for pool in shortcut[:-1]),
            *(_int8(conv, x, self.other) for conv in shortcut[-1:]))
        self.last = _Int8Conv(block.last, scales[0], self.out, self.other)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(y)
        if len(self.shortcut):
            x = self.shortcut(x)
        elif self.other is None:
            x = self.x.dequantize(x)
        return self.last(y, x)


def _int8(conv: nn.Module, x: list[_Scale], out: _Scale | None) -> nn.Module:
    if isinstance(conv, _BranchConv):
        return _Int8Branches(conv, x, out)
    return _Int8Conv(conv, x[0], out)


class _Int8MFA(nn.Module):
    """CNL and PNL. They are cubic in their inputs, with tails that eight bits cannot hold: all is
    in bfloat16 but for the convolutions of the stage's input, which is in bytes."""

    def __init__(self, stage: _FusedStage, low: _Scale):
        super().__init__()
        cnl, pnl = stage.cnl, stage.pnl
        self.low_dim = pnl.low_dim
        self.low_convs = nn.ModuleList(_Int8Conv(part.phi_g, low, None) for part in (cnl, pnl))
        self.high_convs = nn.ModuleList([cnl.theta, cnl.proj, pnl.theta, pnl.proj]).bfloat16()

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        cnl_phi_g, pnl_phi_g = [conv(low) for conv in self.low_convs]
        cnl_theta, cnl_proj, pnl_theta, pnl_proj = self.high_convs
        z = cnl_proj(channel_product(cnl_theta(high), cnl_phi_g), high)
        return pnl_proj(position_product(pnl_theta(z), pnl_phi_g, self.low_dim), z)


class _Int8DEE(nn.Module):
    """Gives what :class:`_DEE` gives, in bytes; ``out`` are the scales of its parts."""

    def __init__(self, dee: _DEE, x: _Scale, ranges: Ranges):
        super().__init__()
        self.x, self.branches = x, dee.branches
        self.reduce = nn.ModuleList(_Int8Conv(conv, x, None) for conv in dee.reduce)
        self.reduce_last = _Int8Conv(dee.reduce_last, x, None)
        self.hidden = ranges.of(dee.reduce_last)
        scales, means = (v.chunk(dee.branches) for v in (self.hidden.scale, self.hidden.mean))
        parts = [
            _Scale(scale, self.hidden.zero, mean)
            for scale, mean in zip(scales, means, strict=True)]
        self.out = [x, *parts]
        if len(dee.expand):
            self.out = [ranges.of(dee)]
        self.expand = nn.ModuleList(
            _Int8Conv(conv, part, self.out[0])
            for conv, part in zip(dee.expand, parts, strict=False))  # none when composed

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


class _Int8Stage(nn.Module):
    """Floating point in, bfloat16 out. ``before`` are the modules that put out what comes in."""

    def __init__(self, stage: nn.Module, before: Sequence[nn.Module], ranges: Ranges):
        super().__init__()
        stream = [m for block in stage.blocks for m in (block.last, *block.shortcut[-1:])]
        self.added = len(stage.blocks) > 1 and not len(stage.blocks[0].shortcut)
        along = ranges.spread(*stream, *(before if self.added else []))
        self.enter = ranges.of(*before, along=along if self.added else None)
        inputs = [self.enter]
        self.dee = None
        if isinstance(getattr(stage, "dee", None), _DEE):
            self.dee = _Int8DEE(stage.dee, self.enter, ranges)
            inputs = self.dee.out
        self.blocks = nn.Sequential()
        for block in stage.blocks:
            last = len(self.blocks) + 1 == len(stage.blocks)
            self.blocks.append(_Int8Block(block, inputs, None if last else along, ranges))
            inputs = [self.blocks[-1].out]
        self.mfa = _Int8MFA(stage, self.enter) if isinstance(stage, _FusedStage) else None

    def forward(self, x: Tensor) -> Tensor:
        low = x = self.enter.quantize(x)
        if self.dee is not None:
            x = self.dee(x)
        x = self.blocks(x.clone() if self.added else x)  # which overwrites what it adds to
        return x if self.mfa is None else self.mfa(x, low)


def quantize_stages(model: DEEN, ranges: Ranges) -> nn.Sequential:
    """The stages of a deployed model on bytes: a stem's output in, the last maps out."""
    before, stages = [model.visible_stem, model.infrared_stem], nn.Sequential()
    for stage in model.stages:
        stages.append(_Int8Stage(stage, before, ranges))
        before = [stage.pnl.proj if isinstance(stage, _FusedStage) else stage.blocks[-1].last]
    return stages
