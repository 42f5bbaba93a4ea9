"""Faster kernels for the deploy form on a CPU: opt-in, and never a default.

``float32`` and ``bfloat16`` run oneDNN's convolutions with the addition and the ReLU inside, and
the widest 3x3 ones by Winograd's minimal filtering (arXiv:1509.09308), which multiplies less.
``int8`` has most convolutions between the stem and the last pooling read bytes, with scales taken
from the images that it is calibrated on.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor

from ..device import keep_freed_memory
from ..errors import UserError
from .blocks import infrared_rows_of
from .deen import DEEN
from .fuse import Conv, _Block
from .int8 import Kernel, Ranges, check_quantizable, quantize_stages

__all__ = ["INFERENCE_PRECISIONS", "optimize_for_inference"]

INFERENCE_PRECISIONS = ("float32", "bfloat16", "int8")

_TILES = 144  # in one matrix product of Winograd's

Calibration = Sequence[tuple[Tensor, str | Tensor]]


@torch.no_grad()
def optimize_for_inference(
    model: DEEN, precision: str = "float32", calibration: Calibration | None = None
) -> DEEN:
    """A copy of a model that does the same work faster, with the same calls.

    ``float32`` equals the model to 1e-5; ``bfloat16`` and ``int8`` are approximations. All take and
    give float32. Off the CPU it is the deploy form in that precision, to be compiled; on it
    ``forward_embedding`` takes a few images of a large batch at a time, so any size is as fast, and
    the process keeps freed memory (:func:`deen_zoo.device.keep_freed_memory`).

    Args:
        model: In either form.
        precision: ``"float32"``, ``"bfloat16"`` or ``"int8"``; the latter on a CPU only, and
            without the stages' own outputs (``forward_intermediates``).
        calibration: For int8: some hundreds of preprocessed images of both modalities, like those
            to come, as ``[(images, "visible"), (images, "infrared")]``; tens will do, less well.

    Raises:
        UserError: No such precision; a CPU that has no bfloat16; int8 without calibration, off the
            CPU, with a torch that is too old for it, of a backbone that is not made of plain ResNet
            blocks, or of ``form="paper"``.
    """
    if precision not in INFERENCE_PRECISIONS:
        raise UserError(f"precision {precision!r}: choose from {', '.join(INFERENCE_PRECISIONS)}")
    on_cpu = next(model.parameters()).device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and precision != "float32" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UserError(f"{precision} needs a CPU with AVX-512 or better: take float32")
    fast: DEEN = reparameterize_model(copy.deepcopy(model).eval(), inplace=True)
    if precision == "int8":
        if not on_cpu:
            raise UserError("int8 is for a CPU with oneDNN: move the model there, or take bfloat16")
        check_quantizable(fast)
        fast.stages = quantize_stages(fast, Ranges(fast, calibration or []))
    if precision == "bfloat16":  # but for the stems, where rounding costs most and work least
        fast.stages.to(torch.bfloat16)
    if on_cpu:
        keep_freed_memory()
        fast.__class__ = _InParts
        _replace_convolutions(fast)
    if precision == "bfloat16":
        for name in ("visible_stem", "infrared_stem"):
            setattr(fast, name, nn.Sequential(getattr(fast, name), _To(torch.bfloat16)))
    if precision != "float32":
        fast.stages[-1] = nn.Sequential(fast.stages[-1], _To(torch.float32))
    return fast


class _InParts(DEEN):
    """Describes large batches a few images at a time: their maps then stay in the CPU's cache."""

    def forward_embedding(
        self, x: Tensor, modality: str | Tensor | None = None, flip: bool = False
    ) -> Tensor:
        most = max(1, 8 * 384 * 144 // (x.shape[-2] * x.shape[-1])) if x.ndim == 4 else len(x)
        if len(x) <= most:
            return super().forward_embedding(x, modality, flip)
        step = -(-len(x) // -(-len(x) // most))  # parts of equal size
        infrared_rows_of(x, modality, self.modality)  # a wrong mask shows before it is split
        return torch.cat(
            [
                super(_InParts, self).forward_embedding(
                    x[i : i + step],
                    modality[i : i + step] if isinstance(modality, Tensor) else modality,
                    flip,
                )
                for i in range(0, len(x), step)
            ]
        )


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


class _FusedConv(Kernel):
    """The operation of :class:`Conv` as one oneDNN kernel, ``in_place`` in the map that it adds."""

    def __init__(self, conv: Conv, in_place: bool = True):
        super().__init__()
        self.weight, self.bias = conv.weight.detach(), conv.bias
        self.relu, self.in_place, self.packed = conv.relu, in_place, False
        self.where = [list(v) for v in (conv.padding, conv.stride, conv.dilation)]
        self.groups = conv.groups

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if not self.packed:  # the best layout depends on the size; any is right for all
            self.packed, self.weight = (
                True,
                torch.ops.mkldnn._reorder_convolution_weight(
                    self.weight, *self.where, self.groups, list(x.shape)
                ),
            )
        weights = (self.weight, self.bias, *self.where, self.groups)
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, *weights, "relu" if self.relu else "none", [], ""
            )
        end = (*weights, "add", 1.0, "relu" if self.relu else None, [], None)
        if self.in_place:
            return torch.ops.mkldnn._convolution_pointwise_.binary(other, x, *end)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, other, *end)


class _Winograd(Kernel):
    """:class:`_FusedConv` of a 3x3 kernel in F(m, 3) x F(3, 3): outputs in tiles of m x 3 for
    ``5 * (m + 2)`` products each in place of ``27 * m``; a dilated one does so for each phase."""

    def __init__(self, conv: Conv, rows: int):
        super().__init__()
        self.direct, self.rows, self.dilation = _FusedConv(conv), rows, conv.dilation[0]
        (out_h, kernel_h, in_h), (out_w, kernel_w, in_w) = _minimal_filter(rows), _minimal_filter(3)
        kernels = torch.einsum(
            "xa,ocab,yb->xyoc", kernel_h, conv.weight.double(), kernel_w
        ).flatten(0, 1)
        dtype = conv.weight.dtype
        self.enter = torch.kron(in_h, in_w).to(dtype)  # (tile in, tile in), integers
        self.leave = torch.kron(out_h, out_w).to(dtype)  # (tile out, tile in)
        self.kernels = [
            torch.ops.mkldnn._reorder_linear_weight(k.to(dtype).contiguous(), _TILES)
            for k in kernels
        ]

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        n, c, h, w = x.shape
        d, mh, mw = self.dilation, self.rows, 3
        th, tw = -(-h // (mh * d)), -(-w // (mw * d))  # tiles of each phase
        if h * w < 0.9 * (th * mh * tw * mw * d * d):
            out: Tensor = self.direct(x, other)
            return out
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, d, d + tw * mw * d - w, d, d + th * mh * d - h))
        image, row = x.stride(0), x.stride(1)
        strides = (d * row, d * c, image, row, d * mh * row, c, d * mw * c, 1)
        out = x.new_empty(n, th, mh, d, tw, mw, d, self.direct.weight.shape[0])
        step = max(1, _TILES // (d * d * th * tw))  # images at a time: they stay in the cache
        for i in range(0, n, step):
            part = x[i : i + step]
            size = (mh + 2, mw + 2, len(part), d, th, d, tw, c)
            tiles = part.as_strided(size, strides, part.storage_offset())
            tiles = (self.enter @ tiles.reshape(len(self.enter), -1)).view(len(self.enter), -1, c)
            products = torch.stack(
                [
                    torch.ops.mkldnn._linear_pointwise(tile, kernel, None, "none", [], "")
                    for tile, kernel in zip(tiles, self.kernels, strict=True)
                ]
            )
            done = self.leave @ products.flatten(1)  # (mh*mw, tiles*O)
            out[i : i + step] = done.view(mh, mw, *size[2:7], -1).permute(2, 4, 0, 3, 6, 1, 5, 7)
        out = out.view(n, th * mh * d, tw * mw * d, -1)[:, :h, :w].permute(0, 3, 1, 2)
        out = out + self.direct.bias.view(-1, 1, 1)
        if other is not None:
            out = out.add_(other)
        return out.relu_() if self.direct.relu else out


def _minimal_filter(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices (A, G, B) with ``A @ ((G @ g) * (B @ d))`` the m outputs of a filter g of 3 taps on
    m + 2 inputs d: by Tellegen's principle the transpose of multiplying polynomials at m + 1 points
    and infinity. Scaled so that B is integer."""
    points = torch.tensor([0.0, 1, -1, 2, -2], dtype=torch.float64)[: m + 1]

    def evaluate(terms: int) -> Tensor:
        at_infinity = torch.eye(terms, dtype=torch.float64)[-1:]
        return torch.cat([points[:, None] ** torch.arange(terms), at_infinity])

    gaps = points[:, None] - points
    scale = torch.cat([(gaps + torch.eye(m + 1)).prod(1), torch.ones(1)])[:, None]
    return evaluate(m).T, evaluate(3) / scale, (torch.linalg.inv(evaluate(m + 2)).T * scale).round()


def _replace_convolutions(model: DEEN) -> None:
    # A map that is added may be overwritten, unless it is a stage's input, which MFA reads later.
    first = [stage.blocks[0] for stage in model.stages if hasattr(stage, "blocks")]
    keep = {block.last for block in first if isinstance(block, _Block) and not len(block.shortcut)}
    for parent in list(model.modules()):
        for name, conv in parent.named_children():
            if type(conv) is not Conv or conv.padding_mode != "zeros":
                continue
            wide = (
                conv.kernel_size == (3, 3)
                and conv.stride == (1, 1)
                and conv.groups == 1
                and conv.dilation == conv.padding
                and conv.dilation[0] == conv.dilation[1]
                and conv.in_channels >= 512
            )
            # In bfloat16 the larger tile would cost four times the rounding error.
            rows = 4 if conv.weight.dtype == torch.float32 else 2
            fused = _Winograd(conv, rows) if wide else _FusedConv(conv, conv not in keep)
            setattr(parent, name, fused)
