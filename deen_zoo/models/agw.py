"""AGW: two-stem ResNet with non-local blocks and generalised-mean pooling.

Paper: `Deep Learning for Person Re-identification: A Survey and Outlook` (TPAMI 2022),
https://arxiv.org/abs/2001.04193
Reference: https://github.com/mangye16/Cross-Modal-Re-ID-baseline (MIT).

CAJ (`Channel Augmented Joint Learning for Visible-Infrared Recognition`, ICCV 2021; folder
ICCV21_CAJ of that repository) trains the same network and tests it with mirrored images. The
visible-infrared base models of TVI-LFM (NeurIPS 2024, https://github.com/WHU-HZY/TVI-LFM, MIT) are
its plain relative: no non-local blocks, no ReLU in the stems, a learned pooling exponent, a BN neck
with a bias. Switches name the differences. Written from the papers and from the references'
behaviour, on top of timm's ResNet; outputs and gradients agree to rounding.
"""

from collections import OrderedDict
from typing import Any, Dict, List, Optional

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module

from .blocks import BNNeck, ConvBN, Modality, Stage, Stem, check_images, infrared_rows_of, without_stride

__all__ = ["AGW", "GeM", "NonLocal"]

NON_LOCAL = {2: 2, 3: 3}  # stage, counted from 1: after how many of its last blocks
POOLS = ("gem", "gem_learned", "avg", "")


class NonLocal(nn.Module):
    """Non-local block without softmax and with one inner channel: (N, C, H, W) to the same.

    The attention of position i to j is ``theta_i * phi_j / HW``. With one channel it factors: every
    position reads the same mean of ``phi * g``, so no (HW, HW) matrix is needed.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.theta = nn.Conv2d(dim, 1, 1, **dd)
        self.phi = nn.Conv2d(dim, 1, 1, **dd)
        self.g = nn.Conv2d(dim, 1, 1, **dd)
        self.proj = ConvBN(1, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        context = (self.phi(x) * self.g(x)).mean((2, 3), keepdim=True)  # (N, 1, 1, 1)
        return x + self.proj(self.theta(x) * context)


class GeM(nn.Module):
    """Generalised-mean pooling, (N, C, H, W) -> (N, C): ``mean(x ** p) ** (1 / p)``.

    Args:
        learned: Learn ``p`` from 3 on and clamp the maps at 1e-6, as TVI-LFM does. Without it ``p``
            stays 3 and the maps are not clamped: AGW.
    """

    def __init__(self, learned: bool, device: Any = None, dtype: Any = None):
        super().__init__()
        self.learned = learned
        self.p = nn.Parameter(torch.full((1,), 3.0, device=device, dtype=dtype)) if learned else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.p is not None:
            return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)
        return ((x**3.0).mean((2, 3)) + 1e-12) ** (1 / 3.0)
