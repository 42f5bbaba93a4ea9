"""A DEEN in bytes, for a CPU with oneDNN: what ``optimize_for_inference(model, "int8")`` builds.

Activations have a scale for each channel, and so have weights for each output channel. Between the
stems, which stay in bfloat16, and the last maps all is uint8 but for what MFA adds, the sums of
DEE's dilated convolutions and the last block's output, which are bfloat16.
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
    Conv,
    _Block,
    _BranchConv,
    _FusedStage,
    channel_product,
    position_product,
)

__all__ = ["Ranges", "check_plain", "quantize_stages"]


MARGIN = 1.2  # for images that go beyond those of the calibration


class _Scale(NamedTuple):
    """What a byte b of channel c stands for: ``scale[c] * (b - zero)``.

    A convolution that reads bytes has the scales of their channels in its weights, and one that
    writes them in those of its outputs, so that a scale for each channel costs nothing.
    """

    scale: Tensor
    zero: int

    def quantize(self, x: Tensor) -> Tensor:
        """To uint8, channels_last."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = x.mul((1 / self.scale).to(x.dtype).view(-1, 1, 1)).add_(self.zero)
        return x.round_().clamp_(0, 255).to(torch.uint8)

    def dequantize(self, x: Tensor) -> Tensor:
        return x.bfloat16().sub_(self.zero).mul_(self.scale.bfloat16().view(-1, 1, 1))


def check_plain(model: DEEN) -> None:
    """Raise unless every block of a deployed model is convolutions and ReLUs only."""
    if not all(isinstance(block, _Block) for stage in model.stages for block in stage.blocks):
        raise UserError("int8 takes a backbone of plain ResNet blocks, such as resnet50")


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
        extremes = torch.stack([out.amin((2, 3)), out.amax((2, 3))]).float()  # (2, N, C)
        self.seen.setdefault(module, []).append(extremes)

    def extremes(self, *modules: nn.Module) -> tuple[Tensor, Tensor]:
        """(C,) lowest and (C,) highest values over the modules."""
        low = torch.cat([extremes[0] for module in modules for extremes in self.seen[module]])
        high = torch.cat([extremes[1] for module in modules for extremes in self.seen[module]])
        return MARGIN * low.amin(0), MARGIN * high.amax(0)

    def spread(self, *modules: nn.Module) -> Tensor:
        """(C,) greatest magnitudes; that of a channel that is nearly dead is not taken as it is."""
        low, high = self.extremes(*modules)
        spread = torch.maximum(-low, high)
        return spread.clamp(min=max(1e-6, 0.02 * float(spread.max())))

    def of(self, *modules: nn.Module, along: Tensor | None = None) -> _Scale:
        """The scale of bytes that hold these outputs, in proportion to ``along`` if given."""
        return _cover(*self.extremes(*modules), self.spread(*modules) if along is None else along)


def _cover(low: Tensor, high: Tensor, along: Tensor) -> _Scale:
    lowest, highest = min(0.0, float((low / along).min())), float((high / along).max())
    step = max(1e-6, highest - lowest) / 255
    return _Scale(along * step, round(-lowest / step))


class _Int8Conv(nn.Module):
    """The operation of :class:`Conv` on bytes, with a scale for each output channel's weights.

    ``out`` is the scale of the bytes it gives, or None for bfloat16. ``other``, of the same type
    and in proportion to ``out``, is overwritten.
    """

    def __init__(
            self, conv: Conv, x: _Scale, out: _Scale | None, other: _Scale | None = None):
        super().__init__()
        weight = conv.weight.detach().float()
        groups, (rows, columns) = conv.groups, weight.shape[:2]
        read = x.scale.view(groups, 1, columns).expand(-1, rows // groups, -1)
        weight = weight * read.reshape(rows, columns, 1, 1)
        scales = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        self.values = (weight / scales[:, None, None, None]).round().to(torch.int8).contiguous()
        written = torch.ones(rows) if out is None else out.scale
        self.scales, self.bias = scales / written, conv.bias.detach().float() / written
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
    """``along`` are the proportions of the channels of the residual stream; None for the very last
    block, which gives bfloat16."""

    def __init__(
            self, block: _Block, x: list[_Scale], along: Tensor | None, first: bool,
            ranges: Ranges):
        super().__init__()
        self.x, self.out = x[0], ranges.of(block.last, along=along)
        self.convs, scales = nn.ModuleList(), x
        for conv in block.convs:
            out = ranges.of(conv)
            self.convs.append(_int8(conv, scales, out))
            scales = [out]
        shortcut, self.bytes = list(block.shortcut), along is not None
        self.other = self.x
        if self.bytes and shortcut:
            self.other = ranges.of(shortcut[-1], along=along)
        elif self.bytes and first:  # the stage's input has proportions of its own
            low, high = (self.x.scale * (end - self.x.zero) for end in (0, 255))
            self.other = _cover(low, high, along)
        out, other = (self.out, self.other) if self.bytes else (None, None)
        self.shortcut = nn.Sequential(
            *(_BytePool(pool) for pool in shortcut[:-1]),
            *(_int8(conv, x, other) for conv in shortcut[-1:]))
        self.last = _Int8Conv(block.last, scales[0], out, other)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(y)
        if len(self.shortcut):
            x = self.shortcut(x)
        elif not self.bytes:
            x = self.x.dequantize(x)
        elif self.other is self.x:
            x = x.clone()
        else:
            x = self.other.quantize(self.x.dequantize(x))
        return self.last(y, x)


def _int8(conv: nn.Module, x: list[_Scale], out: _Scale | None) -> nn.Module:
    if isinstance(conv, _BranchConv):
        return _Int8Branches(conv, x, out)
    return _Int8Conv(conv, x[0], out)


class _Int8MFA(nn.Module):
    """CNL and PNL. They are cubic in their inputs, with tails that eight bits cannot hold: what
    they add is computed from int8 convolutions of bytes, and from then on in bfloat16."""

    def __init__(self, stage: _FusedStage, high: _Scale, low: _Scale, ranges: Ranges):
        super().__init__()
        cnl, pnl = stage.cnl, stage.pnl
        self.high, self.out, self.low_dim = high, ranges.of(pnl.proj), pnl.low_dim
        self.low_convs = nn.ModuleList(_Int8Conv(part.phi_g, low, None) for part in (cnl, pnl))
        self.theta = _Int8Conv(cnl.theta, high, None)
        self.projs = nn.ModuleList([cnl.proj, pnl.theta, pnl.proj]).to(torch.bfloat16)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        cnl_phi_g, pnl_phi_g = [conv(low) for conv in self.low_convs]
        cnl_proj, pnl_theta, pnl_proj = self.projs
        y = channel_product(self.theta(high), cnl_phi_g)
        z = cnl_proj(y, self.high.dequantize(high))
        y = position_product(pnl_theta(z), pnl_phi_g, self.low_dim)
        return self.out.quantize(pnl_proj(y, z))


class _Int8DEE(nn.Module):
    """Gives what :class:`_DEE` gives, in bytes; ``out`` are the scales of its parts."""

    def __init__(self, dee: _DEE, x: _Scale, ranges: Ranges):
        super().__init__()
        self.x, self.branches = x, dee.branches
        self.reduce = nn.ModuleList(_Int8Conv(conv, x, None) for conv in dee.reduce)
        self.reduce_last = _Int8Conv(dee.reduce_last, x, None)
        self.hidden = ranges.of(dee.reduce_last)
        parts = self.hidden.scale.chunk(dee.branches)
        self.out = [x, *(_Scale(part, self.hidden.zero) for part in parts)]
        if len(dee.expand):
            self.out = [ranges.of(dee)]
        self.expand = nn.ModuleList(
            _Int8Conv(conv, _Scale(part, self.hidden.zero), self.out[0])
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
            stream = [m for block in stage.blocks for m in (block.last, *block.shortcut[-1:])]
            along = ranges.spread(*stream)
            blocks: list[_Int8Block] = []
            for block in stage.blocks:
                last = block is model.stages[-1].blocks[-1]
                blocks.append(
                    _Int8Block(block, inputs, None if last else along, not blocks, ranges))
                x = blocks[-1].out
                inputs = [x]
            layers["blocks"] = nn.Sequential(*blocks)
            if isinstance(stage, _FusedStage):
                layers["mfa"] = _Int8MFA(stage, x, low, ranges)
                x = layers["mfa"].out
            self.stages.append(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter.quantize(x)
        for stage in self.stages:
            low = x
            for name in ("dee", "blocks"):
                x = stage[name](x) if name in stage else x
            if "mfa" in stage:
                x = stage["mfa"](x, low)
        return x.float()


def quantize_stages(model: DEEN, ranges: Ranges) -> nn.Module:
    """The stages of a deployed model on bytes: a stem's output in, the last maps out."""
    return nn.Sequential(_Int8Trunk(model, ranges))
