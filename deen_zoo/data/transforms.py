"""From an image to the network's input: resizing, the recipes' augmentation, normalisation.

Between reading and augmenting, an image is a uint8 array (H, W, 3), RGB, already of the network's
size: what the decoded cache stores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .images import Pixels, resize

__all__ = [
    "TRANSFORMS",
    "ChannelTransform",
    "EvalTransform",
    "TrainTransform",
    "eval_transform",
    "mix_channels",
    "random_erasing",
    "to_tensor",
]

RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
CIFAR_MEAN: RGB = (0.4914, 0.4822, 0.4465)  # what CAJ erases with
GREY: RGB = (0.2989, 0.5870, 0.1140)  # of red, green, blue


def to_tensor(image: Pixels, mean: RGB = IMAGENET_MEAN, std: RGB = IMAGENET_STD) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W): ``(image / 255 - mean) / std``."""
    # In NumPy, as it runs in the loader's threads, where torch's own threads would get in the way.
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)  # (3, H, W)
    pixels /= 255
    pixels -= np.asarray(mean, np.float32).reshape(3, 1, 1)
    pixels /= np.asarray(std, np.float32).reshape(3, 1, 1)
    return torch.from_numpy(pixels)


def random_erasing(
    image: Tensor,
    rng: np.random.Generator,
    area: tuple[float, float],
    probability: float = 0.5,
    fill: RGB = IMAGENET_MEAN,
) -> Tensor:
    """Cover a random rectangle of a (3, H, W) image, in place (Zhong et al., arXiv:1708.04896).

    The rectangle has a share of the image in ``area`` and a height/width in [0.3, 1/0.3],
    both uniform; up to 100 are drawn until one is smaller than the image in both directions
    (the reference's ``random_erasing.py``, which also fills a *normalised* image with the mean).
    """
    if rng.uniform(0, 1) > probability:
        return image
    height, width = image.shape[1:]
    for _ in range(100):
        target = rng.uniform(*area) * height * width
        ratio = rng.uniform(0.3, 1 / 0.3)
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if h < height and w < width:
            top = rng.integers(0, height - h, endpoint=True)
            left = rng.integers(0, width - w, endpoint=True)
            box = image.numpy()[:, top : top + h, left : left + w]  # shares the tensor's memory
            box[:] = np.asarray(fill, np.float32).reshape(3, 1, 1)
            break
    return image


@dataclass(frozen=True)
class TrainTransform:
    """Augment one image with a random state of its own: uint8 (H, W, 3) to float32 (3, H, W).

    Attributes:
        pad: Pixels of black added on each side before a crop of the original size; 0 is neither.
        grayscale: Probability of dropping the colour, in either modality.
        flip: Probability of mirroring.
        erasing: Probability of :func:`random_erasing`, which covers a share ``erasing_area``.
        mean: Subtracted after the division by 255.
        std: Divided by after that.
    """

    pad: int = 10
    grayscale: float = 0.5
    flip: float = 0.5
    erasing: float = 0.5
    erasing_area: tuple[float, float] = (0.2, 0.8)
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Tensor:
        height, width, _ = image.shape
        if rng.random() < self.grayscale:
            gray = np.asarray(Image.fromarray(image).convert("L"))
            image = np.repeat(gray[:, :, None], 3, axis=2)
        if self.pad:
            image = np.pad(image, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))
            top, left = rng.integers(0, 2 * self.pad, size=2, endpoint=True)
            image = image[top : top + height, left : left + width]
        if rng.random() < self.flip:
            image = image[:, ::-1]
        tensor = to_tensor(image, self.mean, self.std)
        return random_erasing(tensor, rng, self.erasing_area, self.erasing)

    def views(self, image: Pixels, rng: np.random.Generator, infrared: bool) -> list[Tensor]:
        """uint8 (H, W, 3) to the float32 (3, H, W) that a batch holds of it: here, one."""
        return [self(image, rng)]


def mix_channels(image: Tensor, choice: int) -> Tensor:
    """Make the channels of a (3, H, W) image equal, in place: channel augmentation (CAJ).

    Args:
        image: Normalised, on the CPU.
        choice: 0, 1, 2 copy that channel to the others; 3 takes the grey value of all.
    """
    channels = image.numpy()  # shares the tensor's memory
    if choice < 3:
        channels[:] = channels[choice].copy()
    else:
        channels[:] = np.tensordot(np.asarray(GREY, np.float32), channels, 1)
    return image


@dataclass(frozen=True)
class ChannelTransform(TrainTransform):
    """CAJ's augmentation: two views of a visible image, one of an infrared one.

    Each view is padded, cropped, mirrored, normalised and erased by itself. One random channel of
    the second visible view is then copied to the other two. Of an infrared image a channel is
    copied with probability 3/4; otherwise it becomes grey with probability ``grayscale``. As in
    the reference, the rectangle is filled with CIFAR's mean after the normalisation, and channels
    are mixed after that.
    """

    erasing_area: tuple[float, float] = (0.02, 0.4)

    def views(self, image: Pixels, rng: np.random.Generator, infrared: bool) -> list[Tensor]:
        def view() -> Tensor:
            plain = replace(self, grayscale=0.0, erasing=0.0)(image, rng)
            return random_erasing(plain, rng, self.erasing_area, self.erasing, fill=CIFAR_MEAN)

        if not infrared:
            return [view(), mix_channels(view(), int(rng.integers(3)))]
        only, choice = view(), int(rng.integers(4))
        if choice < 3 or rng.random() < self.grayscale:
            mix_channels(only, choice)
        return [only]


TRANSFORMS = {"deen": TrainTransform, "caj": ChannelTransform}  # as recipes name them


@dataclass(frozen=True)
class EvalTransform:
    """Squash to ``size`` = (height, width) and normalise: float32 (3, H, W).

    Takes a PIL image, or a uint8 array that already has the size (a row of the decoded cache).
    """

    size: tuple[int, int]
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD

    def __call__(self, image: Image.Image | Pixels) -> Tensor:
        if isinstance(image, Image.Image):
            image = resize(image.convert("RGB"), self.size)
        return to_tensor(image, self.mean, self.std)


def eval_transform(config: Mapping[str, Any]) -> EvalTransform:
    """The transform of a model's data config, as ``timm.data.resolve_model_data_config`` gives it.

    Bit for bit ``timm.data.create_transform(**config)``, but for the images of the decoded cache
    as well. Only the way these models are evaluated is on offer: squashed whole by LANCZOS.

    >>> eval_transform({"input_size": (3, 384, 144)}).size
    (384, 144)
    """
    for key, value in (("crop_mode", "squash"), ("crop_pct", 1.0), ("interpolation", "lanczos")):
        if config.get(key, value) != value:
            raise UserError(
                f"{key}={config[key]!r} in the model's data config: only {value!r} is supported "
                "here; timm.data.create_transform(**config) makes any other transform"
            )
    _, height, width = config["input_size"]
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return EvalTransform((height, width), tuple(mean), tuple(std))
