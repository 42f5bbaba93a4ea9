"""What turns a batch of pixels into descriptors: plain PyTorch, or OpenVINO on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..device import autocast

__all__ = ["TorchEngine"]


class TorchEngine:
    """The model itself, in PyTorch; safe to call from several threads.

    Args:
        model: In eval mode, on ``device``.
        mean: RGB means of the normalisation.
        std: RGB standard deviations.
        flip: Add the descriptor of the mirrored image.
        descriptor: One of ``model.descriptors``.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: str,
        flip: bool,
        descriptor: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.model, self.device, self.precision = model, device, precision
        self.flip, self.descriptor = flip, descriptor
        # Tensors on the device: a GPU multiplies by the inverse of a plain number, which rounds.
        self._scale, self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device)
            for values in ((255.0,), mean, std)
        )

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, infrared: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) and bool (n,) to float32 (n, D) on the CPU, not normalised."""
        images = pixels.to(self.device).float()
        images = images.div_(self._scale).sub_(self._mean).div_(self._std)
        return self.embed(images.permute(0, 3, 1, 2), infrared)

    @torch.inference_mode()
    def embed(self, images: Tensor, infrared: Tensor) -> Tensor:
        """The same for normalised images (n, 3, H, W); a batch of one modality runs one stem."""
        modality: Tensor | str = infrared
        if infrared.all() or not infrared.any():
            modality = "infrared" if infrared[0] else "visible"
        images = images.to(self.device, memory_format=torch.channels_last)
        with autocast(self.device, self.precision):
            rows: Tensor = self.model.forward_embedding(  # type: ignore[operator]
                images, modality, self.flip, self.descriptor
            )
        return rows.float().cpu()
