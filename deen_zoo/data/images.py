"""From image files to uint8 arrays of the network's size: the one way every image takes."""

from __future__ import annotations

import functools
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import UserError

__all__ = ["IMAGE_EXTENSIONS", "Intensity", "Pixels", "check_intensity", "deep_colour"]
__all__ += ["is_foreign_name", "is_image_name", "one_channel", "open_image", "resize", "to_rgb"]

Pixels = npt.NDArray[np.uint8]
Intensity = str | tuple[float, float]

# The formats that image names promise. Pillow is asked for no other: it would start Ghostscript
# for a PostScript file that calls itself .jpg.
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "AVIF", "GIF", "JPEG2000", "PPM")
IMAGE_EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
_ORIENTATION = 0x0112  # the EXIF tag
_INTENSITIES = ("full", "minmax", "percentile")
_PERCENTILES = (1, 99)
_DEEP_COLOUR = ("RGB;16", "RGBA;16", "RGBX;16", "LA;16")  # Pillow's raw modes


def is_image_name(name: str) -> bool:
    """Whether a file of this name is meant as an image.

    Hidden files are not, which drops the ``._x.jpg`` that macOS leaves on foreign disks.

    >>> [is_image_name(name) for name in ("0001.jpg", "0001.JPG", "._0001.jpg", "Thumbs.db")]
    [True, True, False, False]
    """
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)


def is_foreign_name(name: str) -> bool:
    """Whether a file of this name may be an image of a kind that is not read.

    Hidden files and those that systems leave in every folder are not.

    >>> [is_foreign_name(name) for name in ("0001.heic", "0001.jpg", "Thumbs.db", ".DS_Store")]
    [True, False, False, False]
    """
    usual = name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")
    return not usual and not is_image_name(name)


def check_intensity(intensity: Intensity) -> Intensity:
    """A way to scale 16-bit pixels, as :func:`open_image` takes it, or ``"LOW,HIGH"``, in
    parentheses or not.

    Raises:
        UserError: It is neither a known name nor two counts.

    >>> check_intensity("7000,9000"), check_intensity("minmax")
    ((7000.0, 9000.0), 'minmax')
    """
    if isinstance(intensity, str) and intensity in _INTENSITIES:
        return intensity
    try:
        given = intensity.strip("()").split(",") if isinstance(intensity, str) else intensity
        low, high = map(float, given)
        if 0 <= low < high <= 65535:
            return low, high
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"intensity {intensity!r}: choose {', '.join(_INTENSITIES)}, or give two counts LOW,HIGH "
        "from 0 to 65535"
    )


def resize(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """Squash an RGB image to size = (height, width) by LANCZOS: uint8 (H, W, 3)."""
    return np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS))


def open_image(path: str | os.PathLike[str], intensity: Intensity = "full") -> Image.Image:
    """Decode an image file fully, to 8-bit RGB.

    The EXIF orientation is applied; one channel becomes three equal ones; transparent pixels are
    laid over black; of an animation the first frame counts.

    Args:
        path: A file in one of the formats of :data:`IMAGE_EXTENSIONS`.
        intensity: How one channel of 16 bits is scaled to 8, nothing else is changed by it:
            ``"full"`` maps 0..65535 to 0..255, ``"minmax"`` the image's own extremes,
            ``"percentile"`` its 1st to 99th percentile, and ``(low, high)`` these two counts. With
            ``"full"`` one warning in a run says when an image's 1st to 99th percentile is less than
            a quarter of the range, as of raw thermal cameras.

    Raises:
        UserError: The file is missing, empty, truncated, not an image, or of float pixels, which
            have no range that all programs agree on.
    """
    with _opened(path) as image:
        # Pillow keeps the high byte alone of colour with 16 bits per channel.
        reduced = any(mode in str(tile[-1]) for tile in image.tile for mode in _DEEP_COLOUR)
        image.load()
        if reduced:  # only the full range can be had of the high bytes
            _check_full(intensity)
            _warn_if_narrow(256 * np.asarray(image.convert("RGB")).astype(np.int64), str(path))
        return to_rgb(image, intensity, os.fspath(path))


def one_channel(path: str | os.PathLike[str]) -> bool:
    """Whether an image file has a single channel; reads its header alone."""
    with _opened(path) as image:
        return len(image.getbands()) == 1 and image.mode != "P"


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[ImageFile.ImageFile]:
    """An opened image file, with every failure as a UserError that names it."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError("not a file")
        if status.st_size == 0:
            raise UserError("an empty file; copy it again from the source")
        with Image.open(path, formats=_formats(os.fspath(path).lower().endswith(".tga"))) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image; copy it again from the source") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        what = "truncated" if "truncated" in str(error).lower() else f"broken ({error})"
        raise UserError(f"{path}: {what}; copy it again from the source") from error


@functools.cache
def _formats(tga: bool) -> tuple[str, ...]:
    """The formats to try that this Pillow supports."""
    Image.init()
    # A TGA file has no signature: anything might be one, so the name decides.
    return tuple(kind for kind in (*_FORMATS, *(("TGA",) if tga else ())) if kind in Image.OPEN)


def to_rgb(image: Image.Image, intensity: Intensity = "full", name: str = "") -> Image.Image:
    """A decoded image of any mode as RGB, upright; ``name`` is for the warning."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UserError("pixels are floats; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # I;16, I;16B, and I, as older Pillow reads 16-bit PNG
        image = Image.fromarray(_eight_bits(np.asarray(image).astype(np.int64), intensity, name))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(pixels: npt.NDArray[np.int64], intensity: Intensity, name: str) -> Pixels:
    """Counts of 0..65535 to 0..255."""
    least, most = int(pixels.min()), int(pixels.max())
    if least < 0 or most > 65535:
        raise UserError("pixels exceed 16 bits; save it with 8 or 16 bits a channel")
    intensity = check_intensity(intensity)
    if intensity == "full":
        _warn_if_narrow(pixels, name)
        return ((pixels + 128) // 257).astype(np.uint8)
    extremes = {"minmax": (0, 100), "percentile": _PERCENTILES}
    low, high = (
        intensity if isinstance(intensity, tuple) else np.percentile(pixels, extremes[intensity])
    )
    scaled = (pixels - low) * (255 / ((high - low) or 1))
    rounded: Pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return rounded


def deep_colour(
    pixels: npt.NDArray[np.uint16], intensity: Intensity = "full", name: str = ""
) -> npt.NDArray[Any]:
    """An array (H, W, 3) or (H, W, 4) of 16 bits as Pillow can take it.

    Three equal channels become the one (H, W), which any ``intensity`` scales; others become
    uint8 by the full range. ``name`` is for the warning.

    Raises:
        UserError: Channels differ, and the intensity is not ``"full"``.
    """
    if pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
        return pixels[..., 0]
    _check_full(intensity)
    _warn_if_narrow(pixels[..., :3].astype(np.int64), name)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _check_full(intensity: Intensity) -> None:
    if intensity != "full":
        raise UserError("16 bits of several channels; save it with one channel to scale it")


_warned = False


def _warn_if_narrow(pixels: npt.NDArray[np.int64], name: str) -> None:
    """Warn once per process, by percentiles, since a raw sensor has dead pixels."""
    global _warned
    if _warned:
        return
    least, most = np.percentile(pixels, _PERCENTILES)
    if most - least < 65536 // 4:
        _warned = True
        warnings.warn(
            f"{name or 'an image'} holds 16-bit counts from {least:.0f} to {most:.0f} (but for 1 % "
            "at either end), less than a quarter of the range, and is nearly flat when scaled by "
            "the full range: choose intensity='minmax', 'percentile' or (low, high); further "
            "images are not named",
            stacklevel=2,
        )
