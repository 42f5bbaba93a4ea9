"""A DEEN in bytes, for a CPU with oneDNN: what ``optimize_for_inference(model, "int8")`` builds.

In blocks, and wherever MFA and DEE read a stage's input, convolutions read uint8 with a scale for
each channel, and their weights have one for each output channel. What is added up, and so all
between blocks, is bfloat16, as are the shortcuts, where rounding costs most and work least. The
stems stay in float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from .deen import DEEN
from .fuse import (
    _CNL,
    _DEE,
    Conv,
    _Block,
    _BranchConv,
    _FusedStage,
    channel_product,
    position_product,
)

__all__ = ["Kernel", "Ranges", "check_quantizable", "has_kernels", "quantize_stages"]


MARGIN = 1.2  # for images that go beyond those of the calibration; clipping costs much more


class _Scale(NamedTuple):
    """What a byte b of channel c stands for, ``scale[c] * (b - zero)``, and what it is on average.

    A convolution that reads bytes has the scales of their channels in its weights, and one that
    writes them in those of its outputs, so that a scale for each channel costs nothing. Their
    inverses are bfloat16 numbers, which maps are multiplied by.
    """

    scale: Tensor
    zero: int
    mean: Tensor

    def quantize(self, x: Tensor) -> Tensor:
        """To uint8, channels_last."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = x.mul((1 / self.scale).to(x.dtype).view(-1, 1, 1))
        x = x.round_().clamp_(-self.zero, 255 - self.zero)
        # There is no fast kernel from floats to uint8, but there is by way of int16.
        return x.to(torch.int16).add_(self.zero).to(torch.uint8)

    def split(self, widths: Sequence[int]) -> "list[_Scale]":
        """Those of so many channels each."""
        parts = zip(self.scale.split(widths), self.mean.split(widths), strict=True)
        return [_Scale(scale, self.zero, mean) for scale, mean in parts]


def has_kernels() -> bool:
    """Whether this torch has the convolutions that are called here; torch 2.4 has other ones."""
    return "Tensor(a!) qaccum" in str(torch.ops.onednn.qconv2d_pointwise.binary._schema)


def check_quantizable(model: DEEN) -> None:
    """Raise unless this torch has the kernels, every block of a deployed model is convolutions and
    ReLUs only, and its MFA, if any, is in the official form."""
    if not has_kernels():
        raise UserError(f"int8 needs a newer torch than {torch.__version__}: take bfloat16")
    if not all(isinstance(block, _Block) for stage in model.stages for block in stage.blocks):
        raise UserError("int8 takes a backbone of plain ResNet blocks, such as resnet50")
    if not all(isinstance(s.cnl, _CNL) for s in model.stages if isinstance(s, _FusedStage)):
        raise UserError("int8 takes form='official', not 'paper'")


class Ranges:
    """Ranges of what modules put out, by channel, over all images, and a margin."""

    def __init__(self, model: DEEN, calibration: Sequence[tuple[Tensor, str | Tensor]]):
        self.seen: dict[nn.Module, list[Tensor]] = {}
        hooks = [
            module.register_forward_hook(self._record)
            for module in model.modules()
            if isinstance(module, (Conv, _BranchConv, _DEE, type(model.visible_stem)))
        ]
        for images, modality in calibration:
            model.forward_features(images, modality)
        for hook in hooks:
            hook.remove()
        if not {model.visible_stem, model.infrared_stem} <= set(self.seen):
            raise UserError(
                "int8 needs calibration=[(images, 'visible'), (images, 'infrared')]: some tens of "
                "preprocessed images of both modalities"
            )

    def _record(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        statistics = torch.stack([out.amin((2, 3)), out.amax((2, 3)), out.mean((2, 3))])
        self.seen.setdefault(module, []).append(statistics.float())  # (3, N, C)

    def of(self, *modules: nn.Module) -> _Scale:
        """The scale of bytes that hold these outputs: with the same zero for all channels their
        steps are small, but a channel that is nearly dead is not taken as it is."""
        seen = torch.cat([seen for module in modules for seen in self.seen[module]], dim=1)
        low, high = MARGIN * seen[0].amin(0), MARGIN * seen[1].amax(0)
        widest = torch.maximum(-low, high)
        widest = widest.clamp(min=max(1e-6, 0.02 * float(widest.max())))
        below = torch.linspace(0, 1, 21).clamp(min=1e-6)[:, None]  # how far bytes reach below 0,
        above = torch.maximum(torch.maximum(-low / below, high), 0.02 * widest.max())  # and above
        steps = (1 + below) * above / 255
        best = int((steps / widest).square().sum(1).argmin())
        zero = round(255 * float(below[best] / (1 + below[best])))
        return _Scale(1 / (1 / steps[best]).bfloat16().float(), zero, seen[2].mean(0))


class Kernel(nn.Module):
    """A layer of constants, which copies of a model share: packed weights cannot be copied."""

    def __deepcopy__(self, memo: dict[int, object]) -> "Kernel":
        return self


class _Int8Conv(Kernel):
    """The operation of :class:`Conv` on bytes, with a scale for each output channel's weights. What
    their rounding adds to an output on average is taken from the bias.

    ``out`` is the scale of the bytes it gives, or None for bfloat16, when ``other``, which is
    bfloat16 too, may be added; it is overwritten.
    """

    def __init__(self, conv: Conv, x: _Scale, out: _Scale | None):
        super().__init__()
        weight = conv.weight.detach().float()
        groups, (rows, columns) = conv.groups, weight.shape[:2]
        read, mean = (
            v.view(groups, 1, columns).expand(-1, rows // groups, -1).reshape(rows, columns, 1, 1)
            for v in (x.scale, x.mean / x.scale)
        )
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
        self.relu = "relu" if conv.relu else "none"
        self.packed: Tensor | None = None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.packed is None:  # the best layout depends on the size; any is right for all
            self.packed = torch.ops.onednn.qconv_prepack(
                self.values, self.scales, *self.x, *self.where, list(x.shape)
            )
        weights = (*self.x, self.packed, self.scales, self.zeros)
        if other is None:
            return torch.ops.onednn.qconv2d_pointwise(
                x, *weights, self.bias, *self.where, *self.output, self.relu, [], ""
            )
        return torch.ops.onednn.qconv2d_pointwise.binary(
            x,
            *weights,
            other,
            self.bias,
            *self.where,
            *self.output,
            1.0,
            0,
            "sum",
            1.0,
            self.relu,
            [],
            "",
        )


class _Int8Branches(nn.Module):
    """:class:`_BranchConv` on bytes: (N, C + 2*C/4, h, w) -> (3N, out, h', w')."""

    def __init__(self, branches: _BranchConv, x: _Scale, out: _Scale):
        super().__init__()
        self.widths = branches.widths
        self.convs = nn.ModuleList(
            _Int8Conv(conv, part, out)
            for conv, part in zip(branches.convs, x.split(self.widths), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.widths, dim=1)
        return torch.cat(
            [
                conv(part.contiguous(memory_format=torch.channels_last))
                for conv, part in zip(self.convs, parts, strict=True)
            ]
        )


class _Int8Block(nn.Module):
    """bfloat16 in and out, and so is the shortcut; ``read`` is the input in bytes."""

    def __init__(self, block: _Block, x: _Scale, ranges: Ranges):
        super().__init__()
        self.x, self.convs, self.shortcut = x, nn.ModuleList(), block.shortcut.bfloat16()
        for conv in block.convs:
            kind = _Int8Branches if isinstance(conv, _BranchConv) else _Int8Conv
            self.convs.append(kind(conv, x, out := ranges.of(conv)))
            x = out
        self.last = _Int8Conv(block.last, x, None)

    def forward(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        y = self.x.quantize(x) if read is None else read
        for conv in self.convs:
            y = conv(y)
        return self.last(y, self.shortcut(x))


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
    """Gives what :class:`_DEE` gives; ``read`` is the input in bytes."""

    def __init__(self, dee: _DEE, x: _Scale):
        super().__init__()
        self.reduce = nn.ModuleList(
            _Int8Conv(conv, x, None) for conv in [*dee.reduce, dee.reduce_last]
        )
        self.expand = dee.expand.bfloat16()

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        hidden: Tensor | None = None
        for conv in self.reduce:
            hidden = conv(read, hidden)
        if not len(self.expand):
            return torch.cat([x, hidden], dim=1)
        parts = hidden.chunk(len(self.expand), dim=1)
        return torch.cat([x, *(conv(part) for conv, part in zip(self.expand, parts, strict=True))])


class _Int8Stage(nn.Module):
    """Floating point in, bfloat16 out. ``before`` are the modules that put out what comes in."""

    def __init__(self, stage: nn.Module, before: Sequence[nn.Module], ranges: Ranges):
        super().__init__()
        self.enter = x = ranges.of(*before)
        self.dee = None
        if isinstance(getattr(stage, "dee", None), _DEE):
            self.dee, x = _Int8DEE(stage.dee, x), ranges.of(stage.dee)
        self.blocks = nn.ModuleList()
        for block in stage.blocks:
            self.blocks.append(_Int8Block(block, x, ranges))
            x = ranges.of(block.last)
        self.mfa = _Int8MFA(stage, self.enter) if isinstance(stage, _FusedStage) else None

    def forward(self, x: Tensor) -> Tensor:
        low, x = self.enter.quantize(x), x.bfloat16()
        read: Tensor | None = low
        if self.dee is not None:
            x, read = self.dee(x, low), None
        for block in self.blocks:
            x, read = block(x, read), None
        return x if self.mfa is None else self.mfa(x, low)


def quantize_stages(model: DEEN, ranges: Ranges) -> nn.Sequential:
    """The stages of a deployed model on bytes: a stem's output in, the last maps out."""
    before, stages = [model.visible_stem, model.infrared_stem], nn.Sequential()
    for stage in model.stages:
        stages.append(_Int8Stage(stage, before, ranges))
        before = [stage.pnl.proj if isinstance(stage, _FusedStage) else stage.blocks[-1].last]
    return stages
