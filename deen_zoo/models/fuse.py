"""The deploy form: the same numbers from fewer operations, for inference alone.

``timm.utils.reparameterize_model(model)`` calls ``fuse()`` of the stems and stages of a DEEN, which
ends here. Every step is exact but for rounding:

- a BN is folded into the convolution before it;
- the convolutions of the two generated branches run side by side, three in place of six, and their
  mean is in the weights;
- DEE's last 1x1 convolutions are composed with the two 1x1 convolutions that read their output,
  the first of the next block and that of its shortcut, so that the wide map between them vanishes;
- in MFA, ``g`` and ``phi`` are one convolution, and the three factors, between which there is no
  softmax, are multiplied in the cheaper order.
"""

import itertools

import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck

from ..errors import UserError
from .deen import check_even, triple_product

__all__ = ["deploy", "is_deployed"]


def deploy(module: nn.Module) -> nn.Module:
    """What replaces a stem or a stage of a DEEN; its parts are moved there and changed."""
    if not hasattr(module, "blocks"):
        return _Stem(module)
    return _FusedStage(module) if hasattr(module, "cnl") else _Stage(module)


def is_deployed(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is in the deploy form."""
    return any(isinstance(module, _InferenceOnly) for module in model.modules())


class _InferenceOnly(nn.Module):
    def train(self, mode: bool = True) -> "_InferenceOnly":
        if mode:
            raise UserError(
                "the deploy form is for inference only, its batch norms are folded: "
                "train the model that it was made from"
            )
        return super().train(False)


class Conv(nn.Conv2d):
    """``relu(conv(x) + other)``, the one operation that all the work of the deploy form is done by,
    so that a back end which has a kernel for it need only replace these modules."""

    relu: bool = False

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        x = self._conv_forward(x, self.weight, self.bias)
        if other is not None:
            x = x.add_(other)
        return x.relu_() if self.relu else x


def _conv(like: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor, relu: bool = False) -> Conv:
    """A convolution as ``like``, with other weights (computed in float64)."""
    with torch.device("meta"):
        conv = Conv(
            weight.shape[1] * like.groups,
            weight.shape[0],
            like.kernel_size,
            like.stride,
            like.padding,
            like.dilation,
            like.groups,
            padding_mode=like.padding_mode,
        )
    weight = weight.to(like.weight.dtype).to(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(bias.to(like.weight.dtype), requires_grad=False)
    conv.relu = relu
    return conv


def _bias(conv: nn.Conv2d) -> torch.Tensor:
    if conv.bias is None:
        return conv.weight.new_zeros(conv.out_channels, dtype=torch.float64)
    return conv.bias.detach().double()


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: bool = False) -> Conv:
    """``bn(conv(x))`` of a BN that uses its running statistics, as one convolution."""
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    shift = -bn.running_mean.double() * scale
    if bn.weight is not None:
        scale, shift = scale * bn.weight.detach(), shift * bn.weight.detach() + bn.bias.detach()
    weight = conv.weight.detach().double() * scale.reshape(-1, 1, 1, 1)
    return _conv(conv, weight, _bias(conv) * scale + shift, relu)


def _folds(conv: nn.Module, bn: nn.Module) -> bool:
    return type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d and bn.running_mean is not None


def _fold_all(module: nn.Module) -> nn.Module:
    """Fold, in place, each BN whose only input is the convolution before it."""
    for parent in list(module.modules()):
        names = [name for name, _ in parent.named_children()]
        if isinstance(parent, (BasicBlock, Bottleneck)):
            pairs = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]
        elif isinstance(parent, nn.Sequential):
            pairs = list(itertools.pairwise(names))
        else:
            continue
        for first, second in pairs:
            bn = getattr(parent, second, None)
            owner, name = parent, first
            while isinstance(getattr(owner, name, None), nn.Sequential):  # a deep stem's conv1
                owner = getattr(owner, name)
                name = [child for child, _ in owner.named_children()][-1]
            conv = getattr(owner, name, None)
            if _folds(conv, bn):
                setattr(owner, name, _fold(conv, bn))
                setattr(parent, second, nn.Identity())
    return module


def _side_by_side(convs: list[nn.Conv2d], scale: float = 1.0, relu: bool = False) -> Conv:
    """Convolutions of one input as one, their outputs one after the other, times ``scale``."""
    weight = torch.cat([conv.weight.detach().double() for conv in convs])
    return _conv(convs[0], weight * scale, torch.cat([_bias(conv) for conv in convs]) * scale, relu)


class _Stem(_InferenceOnly):
    def __init__(self, stem: nn.Module):
        super().__init__()
        self.layers = _fold_all(nn.Sequential(*stem.children()))
        self.training = stem.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise ValueError("the deploy form is for inference only: call eval() on the model")
        return self.layers(x)


def channel_product(theta: torch.Tensor, phi_g: torch.Tensor) -> torch.Tensor:
    """CNL between its convolutions: (N, low, h, w) and phi over g (N, 2*low, h, w) -> as theta."""
    phi, g = phi_g.flatten(2).transpose(1, 2).chunk(2, 2)  # (N, hw, low): channels_last's order
    y = triple_product(g, phi.transpose(1, 2), theta.flatten(2).transpose(1, 2))  # (N, hw, low)
    return y.transpose(1, 2).reshape(theta.shape)


def position_product(theta: torch.Tensor, phi_g: torch.Tensor, low_dim: int) -> torch.Tensor:
    """PNL's: (N, low/2, h, w) and phi over g (N, low, H, W), in rows of half the positions."""
    phi, g = phi_g.reshape(phi_g.shape[0], 2 * low_dim, -1).chunk(2, 1)  # (N, low, HW/2)
    rows = theta.reshape(theta.shape[0], low_dim, -1)  # (N, low, hw/2)
    return triple_product(g, phi.transpose(1, 2), rows / phi.shape[2]).reshape(theta.shape)


class _CNL(_InferenceOnly):
    def __init__(self, cnl: nn.Module):
        super().__init__()
        self.phi_g = _side_by_side([cnl.phi, cnl.g])
        self.theta = _side_by_side([cnl.theta], 1 / cnl.theta.out_channels)  # of attention's rows
        self.proj = _fold(cnl.proj.conv, cnl.proj.bn)

    def forward(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return self.proj(channel_product(self.theta(high), self.phi_g(low)), high)


class _PNL(_InferenceOnly):
    def __init__(self, pnl: nn.Module):
        super().__init__()
        self.low_dim = pnl.low_dim
        self.phi_g = _side_by_side([pnl.phi, pnl.g])
        self.theta = _side_by_side([pnl.theta])
        self.proj = _fold(pnl.proj.conv, pnl.proj.bn)

    def forward(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return self.proj(position_product(self.theta(high), self.phi_g(low), self.low_dim), high)


class _DEE(_InferenceOnly):
    """``expand``: (N, C, h, w) -> (3N, C, h, w), as DEE. Else, for :class:`_BranchConv`,
    (N, C + 2*C/4, h, w): the input and what the last convolutions would have read."""

    def __init__(self, dee: nn.Module, expand: bool):
        super().__init__()
        dilated = [list(convs) for convs in zip(*dee.reduce)]  # of one dilation, a branch each
        self.reduce = nn.ModuleList(_side_by_side(c, 1 / dee.divisor) for c in dilated[:-1])
        self.reduce_last = _side_by_side(dilated[-1], 1 / dee.divisor, relu=True)
        self.expand = nn.ModuleList(_side_by_side([conv]) for conv in dee.expand if expand)
        self.branches = len(dee.expand)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor | None = None
        for conv in self.reduce:
            total = conv(x, total)
        hidden = self.reduce_last(x, total)
        if len(self.expand) == 0:
            return torch.cat([x, hidden], dim=1)
        parts, out = hidden.chunk(self.branches, dim=1), [x]
        for i, conv in enumerate(self.expand):
            out.append(conv(parts[i]))
        return torch.cat(out)


class _BranchConv(_InferenceOnly):
    """A 1x1 convolution of every branch: (N, C + 2*C/4, h, w) -> (3N, out, h', w')."""

    def __init__(self, conv: Conv, expand: nn.ModuleList):
        super().__init__()
        outer = conv.weight.detach().double().flatten(1)  # (out, C)
        self.convs = nn.ModuleList([conv])
        for inner in expand:
            weight = outer @ inner.weight.detach().double().flatten(1)  # (out, C/4)
            bias = _bias(conv) + outer @ _bias(inner)
            self.convs.append(_conv(conv, weight[:, :, None, None], bias, conv.relu))
        self.widths = [c.in_channels for c in self.convs]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.split(self.widths, dim=1)
        out: list[torch.Tensor] = []
        for i, conv in enumerate(self.convs):
            out.append(conv(parts[i]))
        return torch.cat(out)


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is convolutions, BNs and ReLUs only (drop paths do nothing in inference)."""
    if type(block) not in (BasicBlock, Bottleneck):
        return False
    numbers = (1, 2, 3) if type(block) is Bottleneck else (1, 2)
    return (
        block.se is None
        and isinstance(block.aa, (nn.Identity, type(None)))
        and all(type(getattr(block, f"act{i}")) is nn.ReLU for i in numbers)
        and all(_folds(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in numbers)
    )


class _Block(_InferenceOnly):
    """A BasicBlock or Bottleneck that is plain."""

    def __init__(self, block: nn.Module):
        super().__init__()
        numbers = (1, 2, 3) if type(block) is Bottleneck else (1, 2)
        *convs, self.last = [
            _fold(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), relu=True) for i in numbers
        ]
        self.convs = nn.ModuleList(convs)
        shortcut = [] if block.downsample is None else _fold_all(block.downsample)
        self.shortcut = nn.Sequential(*(m for m in shortcut if type(m) is not nn.Identity))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for conv in self.convs:
            y = conv(y)
        return self.last(y, self.shortcut(x))

    def compose(self, expand: nn.ModuleList) -> bool:
        """Read DEE's hidden maps, if each way into the block is a 1x1 convolution, which the
        shortcut may have an average pooling before."""
        if len(self.shortcut) == 0 or not all(
            type(m) is nn.AvgPool2d and not m.count_include_pad for m in self.shortcut[:-1]
        ):
            return False
        for conv in (self.convs[0], self.shortcut[-1]):
            if not isinstance(conv, Conv) or conv.kernel_size != (1, 1) or conv.groups != 1:
                return False
        self.convs[0] = _BranchConv(self.convs[0], expand)
        self.shortcut[-1] = _BranchConv(self.shortcut[-1], expand)
        return True


def _blocks(blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(_Block(b) if _is_plain(b) else _fold_all(b) for b in blocks))


class _Stage(_InferenceOnly):
    def __init__(self, stage: nn.Module):
        super().__init__()
        self.blocks = _blocks(stage.blocks)
        self.dee: nn.Module = nn.Identity()
        self.branches = getattr(stage, "branches", nn.Identity())
        dee = getattr(stage, "dee", None)
        if dee is not None:
            first = self.blocks[0]
            composed = isinstance(first, _Block) and first.compose(dee.expand)
            self.dee = _DEE(dee, expand=not composed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branches(self.blocks(self.dee(x)))


class _FusedStage(_InferenceOnly):
    def __init__(self, stage: nn.Module):
        super().__init__()
        self.blocks = _blocks(stage.blocks)
        if stage.cnl.softmax:  # its softmax leaves nothing to reorder
            self.cnl, self.pnl = _fold_all(stage.cnl), _fold_all(stage.pnl)
        else:
            self.cnl, self.pnl = _CNL(stage.cnl), _PNL(stage.pnl)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.blocks(x)
        check_even(high)
        return self.pnl(self.cnl(high, x), x)
