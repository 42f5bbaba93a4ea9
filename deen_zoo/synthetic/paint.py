"""Shapes in body coordinates, and the painter that puts them on a canvas.

Body coordinates: x to the right, y from 0 at the crown to 1 at the sole; one body height is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .world import TEXTURES, Camera, Cloth, Pose

Points = NDArray[np.float64]
Point = tuple[float, float]

SUPERSAMPLING = 3  # shapes are drawn three times larger and averaged: smooth edges
_EDGE = 0.72  # how much darker the rim of a part is


class Piece(NamedTuple):
    """A polygon (n, 2) and the line that its texture runs along."""

    shape: Points
    axis: tuple[Point, Point]


def mix(a: Point, b: Point, t: float) -> Point:
    """The point that is ``t`` of the way from ``a`` to ``b``."""
    return a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])


def polygon(*corners: Point) -> Piece:
    """A flat piece; its stripes run from the first corner to the last."""
    return Piece(np.array(corners, float), (corners[0], corners[-1]))


def ellipse(centre: Point, rx: float, ry: float, start: float = 0.0, end: float = 2.0) -> Piece:
    """Part of an ellipse from ``start`` to ``end`` half turns; 0 is right, 0.5 is down."""
    angle = np.linspace(start * math.pi, end * math.pi, 25)
    (x, y) = centre
    shape = np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)
    return Piece(shape, ((x, y - ry), (x, y + ry)))


def crescent(centre: Point, rx: float, ry: float, low: float) -> Piece:
    """The upper half of an ellipse less a flatter one, whose height is the share ``low``."""
    outer, inner = ellipse(centre, rx, ry, 0.95, 2.05), ellipse(centre, rx, low * ry, 2.05, 0.95)
    return Piece(np.concatenate([outer.shape, inner.shape]), outer.axis)


def limb(a: Point, b: Point, ra: float, rb: float, origin: Point | None = None) -> Piece:
    """A tapered capsule from ``a`` (radius ``ra``) to ``b``; its texture starts at ``origin``."""
    along = math.atan2(b[1] - a[1], b[0] - a[0])
    half = np.linspace(-math.pi / 2, math.pi / 2, 9) + along
    arc = np.stack([np.cos(half), np.sin(half)], 1)
    shape = np.concatenate([np.array(b) + rb * arc, np.array(a) - ra * arc])
    return Piece(shape, (origin or a, b))


def hull(
    outline: Sequence[Point],
    x: float = 0.0,
    top: float | None = None,
    left: float = -1.0,
    right: float = 1.0,
) -> Piece:
    """An upright shape about the line ``x``, from (y, half width) pairs, smooth between them.

    ``left`` and ``right`` cut out a strip, in half widths. The texture starts at ``top``.
    """
    ys, widths = np.array(outline, float).T
    fine = np.linspace(ys[0], ys[-1], 22)
    k = np.clip(np.searchsorted(ys, fine, side="right") - 1, 0, len(ys) - 2)
    slope, gap = np.gradient(widths, ys), ys[k + 1] - ys[k]
    t = (fine - ys[k]) / gap  # cubic Hermite spline
    rise = widths[k + 1] - widths[k]
    width = widths[k] + rise * t * t * (3 - 2 * t)
    width += gap * t * (1 - t) * (slope[k] * (1 - t) - slope[k + 1] * t)
    sides = [np.stack([x + side * width, fine], 1) for side in (right, left)]
    start = ys[0] if top is None else top
    return Piece(np.concatenate([sides[0], sides[1][::-1]]), ((x, start), (x, start + 0.3)))


class Painter:
    """Paints pieces over each other, as the camera sees them, and remembers the silhouette."""

    def __init__(self, camera: Camera, pose: Pose, rng: np.random.Generator) -> None:
        width, height = (SUPERSAMPLING * side for side in camera.size)
        self.modality = camera.modality
        self.canvas = Image.new("RGB" if self.modality == "visible" else "L", (width, height))
        self.mask = Image.new("L", (width, height))
        self.pen, self.mask_pen = ImageDraw.Draw(self.canvas), ImageDraw.Draw(self.mask)
        self.scale = camera.zoom * height * float(rng.uniform(0.95, 1.05))
        centre = 0.5 + np.array(camera.shift) + rng.normal(0, (0.03, 0.014))
        self.origin = centre * (width, height) - (0, self.scale / 2)
        angle = camera.tilt + pose.lean
        c, s = math.cos(angle), math.sin(angle)
        self.turn = np.array([[c, s], [-s, c]])
        self.pitch = camera.pitch
        self.back, self.yaw = pose.back, math.atan2(math.sin(pose.yaw), abs(math.cos(pose.yaw)))

    def pixels(self, points: Points) -> Points:
        """Body coordinates (n, 2) to pixels of the canvas."""
        near = 1 + self.pitch * (0.5 - points[:, 1:])
        turned = np.concatenate([points[:, :1] * near, points[:, 1:] - 0.5], 1) @ self.turn
        return np.asarray((turned + (0, 0.5)) * self.scale + self.origin)

    def paint(
        self, cloth: Cloth, *pieces: Piece, light: float = 1.0, girth: float | None = None
    ) -> None:
        """Paint joined pieces of one cloth, with one rim about them all.

        With ``girth`` the texture is wrapped round a body of that half width and turned by yaw.
        """
        tones = cloth.tones(self.modality, light)
        rim = tuple(int(t) for t in tones[0] * _EDGE)
        corners = [self.pixels(piece.shape) for piece in pieces]
        for polygon in corners:
            ring = np.concatenate([polygon, polygon[:1]]).ravel().tolist()
            self.pen.line(ring, fill=rim, width=4)
            self.mask_pen.polygon(ring, fill=255)
            self.mask_pen.line(ring, fill=255, width=4)
        for polygon, piece in zip(corners, pieces, strict=True):
            if cloth.texture == "plain":
                self.pen.polygon(polygon.ravel().tolist(), fill=tuple(int(t) for t in tones[0]))
            else:
                self._fill(polygon, piece.axis, cloth, tones, girth)

    def _fill(
        self,
        polygon: Points,
        axis: tuple[Point, Point],
        cloth: Cloth,
        tones: NDArray[np.float32],
        girth: float | None,
    ) -> None:
        low = np.maximum(np.floor(polygon.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(polygon.max(0)).astype(int) + 1, self.canvas.size)
        if (high <= low).any():
            return
        stencil = Image.new("L", (int(high[0] - low[0]), int(high[1] - low[1])))
        ImageDraw.Draw(stencil).polygon((polygon - low).ravel().tolist(), fill=255)
        start, end = self.pixels(np.array(axis))
        dx, dy = ((end - start) / np.hypot(*(end - start)) / self.scale).astype(np.float32)
        x = np.arange(low[0], high[0], dtype=np.float32)[None, :] - np.float32(start[0])
        y = np.arange(low[1], high[1], dtype=np.float32)[:, None] - np.float32(start[1])
        u, v = dy * x - dx * y, dx * x + dy * y  # across and along, in body heights
        if girth is not None:
            u = (np.arcsin(np.clip(u / girth, -1, 1)) - np.float32(self.yaw)) * np.float32(girth)
        motif = TEXTURES[cloth.texture](-u if self.back else u, v, cloth)
        picture = (tones[0] + motif[..., None] * (tones[1] - tones[0])).astype(np.uint8)
        if self.canvas.mode == "L":
            picture = picture[..., 0]
        self.canvas.paste(Image.fromarray(picture), (int(low[0]), int(low[1])), stencil)
