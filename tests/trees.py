"""Tiny dataset trees in the three layouts, for tests: flat images of 8 x 16 pixels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image

TRAIN, TEST = (1, 2, 4), (3, 6, 10)
NIR_CAMERAS = (1, 2, 4, 5, 6, 7, 8, 9)


@cache
def picture(suffix: str, modality: str, tone: int = 0) -> bytes:
    """The bytes of an image; infrared ones have one channel."""
    buffer = BytesIO()
    rng = random.Random(tone)
    mode, pixels = ("RGB", 3) if modality == "visible" else ("L", 1)
    image = Image.frombytes(mode, (8, 16), rng.randbytes(8 * 16 * pixels))
    image.save(buffer, {"jpg": "JPEG", "bmp": "BMP"}[suffix])
    return buffer.getvalue()


def write(path: Path, modality: str, tone: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(path.suffix[1:], modality, tone))
    return path


def write_index(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def sysu(
    root: Path, train: Sequence[int] = TRAIN, test: Sequence[int] = TEST, images: int = 3
) -> Path:
    """SYSU-MM01 with ``images`` to 2 * ``images`` images of each identity in each camera."""
    *first, last = train
    write_index(root / "exp/train_id.txt", ",".join(map(str, first)))
    write_index(root / "exp/val_id.txt", str(last))
    write_index(root / "exp/test_id.txt", ",".join(map(str, test)))
    for camera in range(1, 7):
        for identity in (*train, *test):
            for n in range(1, images + 1 + (identity * camera) % (images + 1)):
                path = root / f"cam{camera}/{identity:04d}/{n:04d}.jpg"
                write(path, "infrared" if camera in (3, 6) else "visible", n)
    return root


def regdb(root: Path, identities: int = 6, images: int = 2) -> Path:
    """RegDB with ten splits of its identities into halves."""
    names: dict[tuple[str, int], list[str]] = {}
    for side, letter, modality in (("Visible", "v", "visible"), ("Thermal", "t", "infrared")):
        for identity in range(1, identities + 1):
            for n in range(images):
                name = f"{side}/{identity}/male_back_{letter}_{n:05d}_{identity}.bmp"
                write(root / name, modality, n)
                names.setdefault((side.lower(), identity), []).append(name)
    for trial in range(1, 11):
        order = list(range(1, identities + 1))
        random.Random(trial).shuffle(order)
        half = identities // 2
        for split, chosen in (("train", order[:half]), ("test", order[half:])):
            for side in ("visible", "thermal"):
                lines = [
                    f"{name} {label}\n"
                    for label, identity in enumerate(chosen)
                    for name in names[side, identity]
                ]
                write_index(root / f"idx/{split}_{side}_{trial}.txt", "".join(lines))
    return root


def llcm(
    root: Path, train: Sequence[int] = TRAIN, test: Sequence[int] = TEST, images: int = 2
) -> Path:
    """LLCM with ``images`` to 2 * ``images`` images of each identity in three cameras or more."""
    cameras = {"vis": range(1, 10), "nir": NIR_CAMERAS}
    for side, modality in (("vis", "visible"), ("nir", "infrared")):
        lines = []
        for label, identity in enumerate(train):
            for camera in cameras[side][:3]:
                name = f"{side}/{identity:04d}/{identity:04d}_c{camera:02d}_s1_f{camera}_{side}.jpg"
                write(root / name, modality, camera)
                lines.append(f"{name} {label}\n")
        write_index(root / f"idx/train_{side}.txt", "".join(lines))
        for camera in cameras[side]:
            (root / f"test_{side}/cam{camera}").mkdir(parents=True, exist_ok=True)
            for identity in test:
                if (identity + camera) % 3:
                    for n in range(images + (identity * camera) % (images + 1)):
                        name = f"{identity:04d}_c{camera:02d}_s1_f{n}_{side}.jpg"
                        write(root / f"test_{side}/cam{camera}/{identity:04d}/{name}", modality, n)
    write_index(root / "idx/test_id.txt", ",".join(map(str, test)))
    return root


MAKERS = {"sysu": sysu, "regdb": regdb, "llcm": llcm}
