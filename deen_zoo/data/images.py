"""Image files: which names are images, and how one is read."""

from __future__ import annotations

import os
import stat

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError

__all__ = ["IMAGE_EXTENSIONS", "is_image_name", "open_image", "to_rgb"]

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_ORIENTATION = 0x0112  # the EXIF tag


def is_image_name(name: str) -> bool:
    """Whether a file of this name is meant as an image.

    Hidden files are not, which drops the ``._x.jpg`` that macOS leaves on foreign disks.

    >>> [is_image_name(name) for name in ("0001.jpg", "0001.JPG", "._0001.jpg", "Thumbs.db")]
    [True, True, False, False]
    """
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file fully, to 8-bit RGB.

    The EXIF orientation is applied; one channel becomes three equal ones; 16 bits are scaled to 8
    by the full range (65535 becomes 255); transparent pixels are laid over black; of an animation
    the first frame counts.

    Raises:
        UserError: The file is missing, empty, truncated, not an image, or of float pixels, which
            have no range that all programs agree on.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError("not a file")
        if status.st_size == 0:
            raise UserError("an empty file; copy it again from the source")
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
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


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as RGB, upright."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UserError("pixels are floats; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # I;16, I;16B, and I, as older Pillow reads 16-bit PNG
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise UserError("pixels exceed 16 bits; save it with 8 or 16 bits a channel")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")
