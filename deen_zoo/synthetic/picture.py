"""A picture: the figure in its place, lit, through a lens, on a sensor."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .figure import Figure
from .paint import SUPERSAMPLING, Painter
from .world import Array, Camera, Person, Pose, stream

_SCENE = 4  # name of the random stream of places


def draw(person: Person, camera: Camera, pose: Pose, rng: np.random.Generator) -> Image.Image:
    """The picture that ``camera`` takes of ``person``; ``rng`` moves the crop and makes the grain.

    Returns:
        An RGB image of ``camera.size``. An infrared one has three equal channels: the datasets'
        files have three, and the reference's scripts cannot read one.
    """
    width, height = camera.size
    painter = Painter(camera, pose, rng)
    Figure(painter, person, pose).paint()
    mask = painter.mask.reduce(SUPERSAMPLING)
    figure = _array(painter.canvas.reduce(SUPERSAMPLING))
    scene = _scene(camera)
    dy, dx = (
        int(rng.integers(s - p + 1)) for s, p in zip(scene.shape, (height, width), strict=False)
    )
    place = scene[dy : dy + height, dx : dx + width]

    feet = (painter.origin + (0, 0.985 * painter.scale)) / SUPERSAMPLING
    shadow = np.outer(_bump(height, feet[1], 0.02 * height), _bump(width, feet[0], 0.2 * height))
    soft = _array(mask.filter(ImageFilter.BoxBlur(height * 0.025)))
    rim = np.roll(soft, -2, 1) - np.roll(soft, 2, 1)  # the lamp is on the left
    picture = figure * (0.66 + 0.34 * soft - 0.25 * rim)
    picture += (1 - _array(mask)) * place * (1 - 0.6 * shadow[..., None])
    picture *= _light(camera) * np.float32(rng.uniform(0.85, 1.12))

    lens = _image(picture).filter(ImageFilter.GaussianBlur(camera.blur))
    grain = rng.standard_normal(picture.shape, np.float32) * np.float32(camera.noise)
    return _image(_array(lens) + grain).convert("RGB")


def _array(image: Image.Image) -> Array:
    """(H, W, channels) in 0..1."""
    pixels = np.asarray(image, np.float32) / np.float32(255)
    return np.asarray(pixels if pixels.ndim == 3 else pixels[..., None])


def _image(picture: Array) -> Image.Image:
    pixels: NDArray[np.uint8] = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _bump(length: int, centre: float, width: float) -> Array:
    away = (np.arange(length, dtype=np.float32) - np.float32(centre)) / np.float32(width)
    return np.asarray(np.exp(-away * away))


@lru_cache(maxsize=64)
def _light(camera: Camera) -> Array:
    """(H, W, channels): a street lamp to one side, or the camera's own infrared spot."""
    (width, height), visible = camera.size, camera.modality == "visible"
    if visible:
        side = stream(camera.scene[0], _SCENE, camera.scene[1], 1).uniform(-0.5, 1.5)
        across, down = _bump(width, side * width, 1.6 * width), np.ones(height, np.float32)
    else:
        across = _bump(width, 0.5 * width, 0.8 * width)
        down = _bump(height, 0.4 * height, 0.7 * height)
    spot = np.outer(down, across)[..., None]
    tint = np.array(camera.tint[: 3 if visible else 1], np.float32)
    return np.asarray((0.6 + 0.45 * spot) * tint * np.float32(camera.light))


@lru_cache(maxsize=64)
def _scene(camera: Camera) -> Array:
    """The empty place, wider than a picture, (H, W, channels) in 0..1."""
    rng = stream(camera.scene[0], _SCENE, camera.scene[1])
    visible = camera.modality == "visible"
    one, width, height = camera.size[0], 4 * camera.size[0], int(1.2 * camera.size[1])
    horizon = rng.uniform(0.5, 0.75) * height

    def tone(low: float, high: float) -> tuple[int, ...]:
        grey, hue, infrared = (
            rng.uniform(low, high),
            rng.normal(0, 0.022, 3),
            rng.uniform(0.12, 0.6),
        )
        value = np.clip(grey + hue, 0, 1) if visible else np.array([infrared])
        return tuple((255 * value).astype(int).tolist())

    image = Image.new("RGB" if visible else "L", (width, height), tone(0.3, 0.55))
    pen = ImageDraw.Draw(image)
    joint, course = tone(0.2, 0.45), rng.uniform(0.03, 0.09) * height
    for n in range(int(horizon / course) + 1):  # bricks, panels
        pen.line([0, n * course, width, n * course], fill=joint)
        for x in np.arange((n % 2) * course, width, 2 * course):
            pen.line([x, n * course, x, (n + 1) * course], fill=joint)
    for _ in range(int(rng.integers(6, 12))):  # doors, windows, posters, pillars
        x, w = rng.uniform(-0.1, 1) * width, rng.uniform(0.15, 0.8) * one
        top, bottom = rng.uniform(-0.1, 0.35) * horizon, rng.uniform(0.5, 1.0) * horizon
        pen.rectangle(
            [x, top, x + w, bottom], fill=tone(0.15, 0.8), outline=tone(0.1, 0.5), width=2
        )
    pen.rectangle([0, horizon, width, height], fill=tone(0.25, 0.5))
    for _ in range(int(rng.integers(3, 7))):  # joints and marks of the floor
        x = rng.uniform(-0.5, 1.5) * width
        pen.line(
            [x, height, width / 2 + (x - width / 2) / 2, horizon], fill=tone(0.2, 0.6), width=2
        )
    return _array(image.filter(ImageFilter.GaussianBlur(0.006 * height)))
