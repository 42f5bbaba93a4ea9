"""Whatever may be given as images, as one list with known modalities, and how each is decoded."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.cache import DecodedCache, read_image
from ..data.folder import UNKNOWN, list_images, read_csv
from ..data.images import Intensity, Pixels, deep_colour, resize, to_rgb
from ..data.protocols import Label, Sample
from ..errors import UserError
from .files import label_column

__all__ = ["Decoded", "ImageList", "infrared_of", "resolve_sources", "three_equal_channels"]

Item = Image.Image | np.ndarray[Any, Any] | str
Labels = tuple[Label, Label]  # identity, camera
UNLABELLED = UNKNOWN, UNKNOWN


def three_equal_channels(image: Pixels) -> bool:
    """Whether no pixel's channels differ by more than 2 of 255: how ``modality="auto"`` decides.

    >>> three_equal_channels(np.full((4, 4, 3), 90, np.uint8))
    True
    """
    return bool((image.max(axis=2) - image.min(axis=2)).max() <= 2)


class Decoded(NamedTuple):
    """One image, or why it cannot be read."""

    place: int  # in the source
    pixels: Pixels | None  # uint8 (H, W, 3)
    infrared: bool
    reason: str = ""


@dataclass(frozen=True)
class ImageList:
    """Images to extract; ``infrared`` is None where the pixels decide (``modality="auto"``).

    ``others`` are the files of its folders that are no images by their names.
    """

    items: Sequence[Item]
    infrared: Sequence[bool | None]
    labels: Sequence[Labels]
    others: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """The path of an image, or ``image 3`` for one in memory."""
        item = self.items[index]
        return item if isinstance(item, str) else f"image {index}"

    def decode(
        self,
        index: int,
        size: tuple[int, int],
        cache: DecodedCache | None = None,
        intensity: Intensity = "full",
    ) -> Decoded:
        """Read one image at size = (height, width)."""
        item, infrared = self.items[index], self.infrared[index]
        try:
            if isinstance(item, str):
                pixels = read_image(item, size, cache, intensity)
            else:
                pixels = resize(_in_memory(item, f"image {index}", intensity), size)
        except UserError as error:
            return Decoded(index, None, False, str(error))
        return Decoded(
            index, pixels, three_equal_channels(pixels) if infrared is None else infrared
        )

    def say_others(self) -> None:
        """Say on stderr how many files of the folders are left out, and of which kinds."""
        kinds = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in self.others)
        if kinds:
            listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
            print(f"left out, not named like an image: {listed}", file=sys.stderr)

    def say_auto(self, paths: Sequence[str], infrared: Sequence[bool]) -> None:
        """Say on stderr what ``modality="auto"`` made of the readable images."""
        undecided = {self.name(i) for i, kind in enumerate(self.infrared) if kind is None}
        if undecided:
            kinds = [x for p, x in zip(paths, infrared, strict=True) if p in undecided]
            print(
                f"modality auto: {sum(kinds)} of {len(kinds)} images have three equal channels and "
                "were taken as infrared, the others as visible",
                file=sys.stderr,
            )


def _in_memory(
    item: Image.Image | np.ndarray[Any, Any], name: str, intensity: Intensity
) -> Image.Image:
    if isinstance(item, np.ndarray):
        shape, kind = item.shape, item.dtype
        item = item[..., 0] if shape[2:] == (1,) else item
        deep = kind == np.uint16
        if deep and shape[2:] in ((3,), (4,)) and item.size:  # Pillow has no such colour
            try:
                item = deep_colour(item, intensity, name)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
        if not (item.dtype == np.uint8 or deep) or not (
            item.ndim == 2 or shape[2:] in ((3,), (4,))
        ):
            raise UserError(
                f"{name}: an array {shape} of {kind}; images are (H, W), (H, W, 3) or (H, W, 4), "
                "in RGB order, of uint8 or uint16; preprocessed batches are tensors"
            )
        item = Image.fromarray(item)
    if not (item.width and item.height):
        raise UserError(f"{name}: no pixels, {item.height} x {item.width}")
    try:
        item.load()
        return to_rgb(item, intensity, name)
    except (UserError, OSError) as error:  # OSError: Pillow had not decoded it yet
        raise UserError(f"{name}: {error}") from None


def _flatten(
    source: Any, modality: Any, others: list[str]
) -> Iterator[tuple[Item, str | None, Labels]]:
    """(image, its own modality if it has one, its labels) of whatever a source may be; files of
    folders that are no images are added to ``others``."""
    if isinstance(source, Sample):
        yield source.path, source.modality, (source.identity, source.camera)
    elif isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if os.path.isdir(path):
            images, foreign = list_images(path)
            if not images:
                raise UserError(f"{path}: no image in this folder")
            others += foreign
            yield from ((image, None, UNLABELLED) for image in images)
        elif path.lower().endswith(".csv"):
            said = modality if isinstance(modality, str) else None
            for sample in read_csv(path, said):
                own = None if sample.modality == "auto" else sample.modality
                yield sample.path, own, (sample.identity, sample.camera)
        else:
            yield path, None, UNLABELLED
    elif isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim != 4):
        yield source, None, UNLABELLED
    elif isinstance(source, Iterable) and not isinstance(source, Tensor):
        for one in source:
            yield from _flatten(one, modality, others)
    else:
        raise UserError(
            f"a {type(source).__name__} is no source of images; give paths, folders, CSV files, "
            "PIL images, uint8 arrays in RGB order, or samples"
        )


def resolve_sources(source: Any, modality: Any) -> ImageList:
    """Images, folders, CSV files and samples, however nested, as one list.

    Args:
        source: One of these or an iterable of them, which may be empty; samples and CSV rows know
            their modality.
        modality: ``"visible"``, ``"infrared"``, ``"auto"`` or one per image; may be None where
            every image knows its own.

    Raises:
        UserError: Something else, an empty folder, a modality that is missing or contradicts, or an
            identity or camera that is neither a whole number nor a word.
    """
    others: list[str] = []
    found = list(_flatten(source, modality, others))
    own = [None if kind is None else kind == "infrared" for _, kind, _ in found]
    if modality is not None or None in own:
        said = infrared_of(modality, len(found))
        for (item, kind, _), mine, theirs in zip(found, own, said, strict=True):
            if None not in (mine, theirs) and mine != theirs:
                raise UserError(f"{item} is {kind} by its own label; modality says otherwise")
        own = [a if a is not None else b for a, b in zip(own, said, strict=True)]
    labels = [labels for _, _, labels in found]
    for column in zip(*labels, strict=True):
        label_column(column)  # a wrong one is said before the work
    return ImageList([item for item, _, _ in found], own, labels, others)


def infrared_of(modality: Any, count: int) -> list[bool | None]:
    """What ``modality`` says of each image: True for infrared, None for "auto"."""
    kinds = {"visible": False, "infrared": True, "auto": None}
    said: Any = str(modality) if modality is None else modality
    if isinstance(said, str):
        said = [said] * count
    if isinstance(said, Tensor) and said.dtype == torch.bool:
        said = ["infrared" if x else "visible" for x in said.tolist()]
    wrong = [x for x in said if str(x) not in kinds] if isinstance(said, (list, tuple)) else [said]
    if wrong:
        what = f"modality {wrong[0]!r}" if modality is not None else "no modality"
        raise UserError(
            f"{what}; say 'visible', 'infrared' or 'auto' (three equal channels are "
            "infrared), or in Python a list with one for each image"
        )
    if len(said) != count:
        raise UserError(f"{len(said)} modalities for {count} images; give one for each")
    return [kinds[str(kind)] for kind in said]
