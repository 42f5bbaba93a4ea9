"""Draws the synthetic world: ``draw(person, camera, pose, rng)`` is a picture of a pedestrian.

Parts are polygons in body coordinates (x to the right, y from 0 at the crown to 1 at the sole, one
unit is the body's height), painted from far to near at three times the size and averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .synthetic_world import TEXTURES, Array, Camera, Cloth, Person, Pose, stream

__all__ = ["draw"]

Points = NDArray[np.float64]
Point = tuple[float, float]

SUPERSAMPLING = 3
MANES = ("long", "bob", "afro", "hood", "pony")  # hair with a part that hangs behind the head
_SCENE = 3  # name of the random stream of places


class _Painter:
    """Paints parts given in body coordinates, nearest last, and remembers the silhouette."""

    def __init__(self, camera: Camera, pose: Pose, rng: np.random.Generator) -> None:
        width, height = (SUPERSAMPLING * side for side in camera.size)
        mode = "RGB" if camera.modality == "visible" else "L"
        self.modality = camera.modality
        self.canvas = Image.new(mode, (width, height))
        self.mask = Image.new("L", (width, height))
        self.pen, self.mask_pen = ImageDraw.Draw(self.canvas), ImageDraw.Draw(self.mask)
        self.scale = camera.zoom * height * float(rng.uniform(0.97, 1.03))
        jitter = rng.normal(0, 0.012, 2)
        self.origin = np.array(
            [
                width * (0.5 + camera.shift[0] + jitter[0]),
                height * (0.5 + camera.shift[1] + jitter[1]) - self.scale / 2,
            ]
        )
        angle = camera.tilt + pose.lean
        self.turn = np.array(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        )
        self.pitch = camera.pitch
        self.cos = math.cos(pose.yaw)
        self.sin = math.sin(pose.yaw)

    def pixels(self, points: Points) -> Points:
        """Body coordinates (n, 2) to supersampled pixels."""
        near = 1 + self.pitch * (0.5 - points[:, 1:])
        bent = np.concatenate([points[:, :1] * near, points[:, 1:] - 0.5], 1) @ self.turn
        return np.asarray((bent + [0, 0.5]) * self.scale + self.origin)

    def part(
        self,
        shape: Points,
        cloth: Cloth,
        axis: tuple[Sequence[float], Sequence[float]] = ((0, 0.17), (0, 0.5)),
        light: float = 1.0,
        girth: float | None = None,
        outline: float = 0.78,
    ) -> None:
        """Paint the polygon ``shape`` (n, 2); the texture runs along ``axis``, from its start.

        With ``girth`` the texture is wrapped round a body of that half width and turned by yaw.
        """
        corners = self.pixels(shape)
        flat = corners.ravel().tolist()
        tones = cloth.tones(self.modality, light)
        edge = tuple(int(t) for t in tones[0] * outline)
        self.mask_pen.polygon(flat, fill=255)
        if cloth.texture == "plain":
            self.pen.polygon(flat, fill=tuple(int(t) for t in tones[0]), outline=edge, width=2)
            return
        low = np.maximum(np.floor(corners.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, self.canvas.size)
        if (high <= low).any():
            return
        stencil = Image.new("L", (int(high[0] - low[0]), int(high[1] - low[1])))
        ImageDraw.Draw(stencil).polygon((corners - low).ravel().tolist(), fill=255)
        start, end = self.pixels(np.array(axis, float))
        along = (end - start) / max(float(np.hypot(*(end - start))), 1e-6) / self.scale
        x = np.arange(low[0], high[0], dtype=np.float32)[None, :] - np.float32(start[0])
        y = np.arange(low[1], high[1], dtype=np.float32)[:, None] - np.float32(start[1])
        u = np.float32(along[1]) * x - np.float32(along[0]) * y
        v = np.float32(along[0]) * x + np.float32(along[1]) * y
        if girth is not None:
            turn = math.atan2(self.sin, abs(self.cos))
            u = (np.arcsin(np.clip(u / girth, -1, 1)) - np.float32(turn)) * np.float32(0.8 * girth)
        if self.cos < 0:
            u = -u
        motif = TEXTURES[cloth.texture](u, v, cloth.period, cloth.share, cloth.offset)
        picture = tones[0] + motif[..., None] * (tones[1] - tones[0])
        filling = Image.fromarray(
            picture.astype(np.uint8).squeeze(-1) if len(edge) == 1 else picture.astype(np.uint8)
        )
        self.canvas.paste(filling, (int(low[0]), int(low[1])), stencil)
        self.pen.polygon(flat, outline=edge, width=2)


def _ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0.0, end: float = 2
) -> Points:
    """Part of an ellipse from ``start`` to ``end`` half turns; 0 is right, 0.5 is down."""
    angle = np.linspace(start * math.pi, end * math.pi, 25)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def _limb(a: Point, b: Point, ra: float, rb: float) -> Points:
    """A tapered capsule from ``a`` (radius ``ra``) to ``b``."""
    angle = math.atan2(b[1] - a[1], b[0] - a[0])
    half = np.linspace(-math.pi / 2, math.pi / 2, 9)
    cap = lambda c, r, t: np.stack([c[0] + r * np.cos(half + t), c[1] + r * np.sin(half + t)], 1)  # noqa: E731
    return np.concatenate([cap(b, rb, angle), cap(a, ra, angle + math.pi)])


def _hull(outline: Sequence[Point], left: float = -1.0, right: float = 1.0) -> Points:
    """The region between ``left`` and ``right`` times a half width given at some heights.

    ``outline`` is (y, half width) from top to bottom; it is smoothed between.
    """
    ys, widths = np.array(outline, float).T
    fine = np.linspace(ys[0], ys[-1], 22)
    knot = np.clip(np.searchsorted(ys, fine, side="right") - 1, 0, len(ys) - 2)
    t = (fine - ys[knot]) / (ys[knot + 1] - ys[knot])
    slope = np.gradient(widths, ys)
    h = ys[knot + 1] - ys[knot]
    width = (
        widths[knot] * (2 * t**3 - 3 * t**2 + 1)
        + widths[knot + 1] * (3 * t**2 - 2 * t**3)
        + h * slope[knot] * (t**3 - 2 * t**2 + t)
        + h * slope[knot + 1] * (t**3 - t**2)
    )
    sides = [np.stack([k * width, fine], 1) for k in (right, left)]
    return np.concatenate([sides[0], sides[1][::-1]])


def _mix(a: Point, b: Point, t: float) -> Point:
    return a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])


class _Figure:
    """One person in one pose: where the joints are, and the parts in painting order."""

    def __init__(self, painter: _Painter, person: Person, pose: Pose) -> None:
        self.p, self.person, self.pose = painter, person, pose
        self.cos, self.sin = math.cos(pose.yaw), math.sin(pose.yaw)
        self.width = math.hypot(self.cos, 0.62 * self.sin)  # a body is 0.62 as deep as wide
        sides = (-1, 1) if self.sin < 0 else (1, -1)
        self.far, self.near = sides

    def x(self, lateral: float, forward: float = 0.0) -> float:
        return lateral * self.cos + forward * self.sin

    def stride(self, side: int) -> float:
        return math.sin(self.pose.phase + (math.pi if side > 0 else 0.0))

    def paint(self) -> None:
        person, back = self.person, self.pose.back
        self.hair_behind()
        if person.bag == "backpack" and not back:
            self.backpack(0.86)
        self.arm(self.far, 0.82)
        self.leg(self.far, 0.82)
        self.leg(self.near, 1.0)
        self.lower_body()
        self.neck()
        self.torso()
        if person.bag == "backpack":
            self.backpack(1.0) if back else self.straps()
        if person.bag == "satchel":
            self.satchel()
        self.arm(self.near, 0.93)
        self.head()

    def leg(self, side: int, light: float) -> None:
        person, paint = self.person, self.p.part
        length = (0.955 - person.crotch) / 2
        swing = 0.4 * self.stride(side)
        bend = 0.5 * max(0.0, math.cos(self.pose.phase + (math.pi if side > 0 else 0.0)))
        hip = (self.x(side * 0.46 * person.hip), person.crotch - 0.01)
        knee = (hip[0] + length * math.sin(swing) * self.sin, hip[1] + length * math.cos(swing))
        shin = swing - bend
        ankle = (knee[0] + length * math.sin(shin) * self.sin, knee[1] + length * math.cos(shin))
        thick = 0.5 + 0.5 * person.limb
        r_hip, r_knee, r_ankle = 0.047 * thick, 0.034 * thick, 0.021 * thick
        paint(_limb(hip, knee, r_hip, r_knee), person.skin, light=light)
        paint(_limb(knee, ankle, r_knee, r_ankle), person.skin, light=light)
        toe = (ankle[0] + self.x(side * 0.012, 0.05), ankle[1] + 0.016 + 0.012 * max(self.cos, 0))
        paint(_limb((ankle[0], ankle[1] + 0.012), toe, 0.025, 0.019), person.shoes, light=light)
        if person.boot:
            top = _mix(ankle, knee, person.boot)
            paint(_limb(top, ankle, 0.028 * thick + 0.004, 0.027), person.shoes, light=light)
        if person.cut == "skirt":
            return
        loose = 1.08 + 0.18 * (person.flare - 0.8)
        end = _mix(hip, knee, min(1.0, 2 * person.length))
        r_end = (r_knee if person.length > 0.5 else 0.5 * (r_hip + r_knee)) * loose
        paint(
            _limb(hip, end, r_hip * 1.08, r_end),
            person.bottom,
            (hip, knee),
            light,
            outline=light * 0.8,
        )
        if person.length > 0.5:
            hem = _mix(knee, ankle, 2 * person.length - 1)
            r_hem = (r_ankle + 0.006) * person.flare + 0.004
            start = _mix(knee, ankle, -1.0)
            paint(_limb(knee, hem, r_end, r_hem), person.bottom, (start, ankle), light)

    def lower_body(self) -> None:
        person = self.person
        top, hip = 0.44, person.crotch - 0.03
        shape = [(top, person.waist * self.width), (hip, person.hip * self.width)]
        if person.cut == "skirt":
            hem = hip + person.length * (0.93 - hip)
            spread = 0.02 * abs(self.stride(1) * self.sin)
            shape.append((hem, person.hip * self.width * (0.7 + 0.4 * person.flare) + spread))
        else:
            shape.append((hip + 0.05, person.hip * self.width * 0.86))
        axis = ((0.0, top), (0.0, 1.0))
        self.p.part(_hull(shape), person.bottom, axis, girth=person.hip * self.width * 1.1)

    def outline(self) -> list[tuple[float, float]]:
        """(y, half width) of the dressed trunk from collar to hem."""
        person = self.person
        shape = [(0.165, 0.03), (0.183, 0.62 * person.shoulder), (0.21, 0.98 * person.shoulder)]
        shape += [
            (0.3, 0.5 * (person.shoulder + person.waist) + 0.006),
            (0.42, person.waist + 0.004),
        ]
        if person.hem > 0.53:
            shape.append((0.51, person.hip + 0.006))
        shape.append((person.hem, (person.hip + 0.006) * person.hem_width))
        return [(y, half * self.width) for y, half in shape]

    def torso(self) -> None:
        person, paint = self.person, self.p.part
        shape, girth = self.outline(), 1.12 * person.shoulder * self.width
        paint(_hull(shape), person.top, girth=girth)
        if self.pose.back:
            return
        centre = 0.35 * self.sin  # of the front, as a share of the half width
        if person.inner is not None:
            paint(_hull(shape, centre - 0.3, centre + 0.3), person.inner)
        x, skin = centre * 0.05, person.skin
        if person.collar == "vee":
            paint(np.array([(x - 0.035, 0.168), (x + 0.035, 0.168), (x, 0.235)]), skin)
        elif person.collar == "round":
            paint(_ellipse(x, 0.168, 0.034, 0.022, 0, 1), skin)

    def neck(self) -> None:
        self.p.part(_limb((0, 0.12), (0, 0.19), 0.025, 0.03), self.person.skin, light=0.9)

    def arm(self, side: int, light: float) -> None:
        person, paint = self.person, self.p.part
        length = 0.15
        swing, splay = -0.42 * self.stride(side), 0.1 + 0.05 * person.limb
        shoulder = (self.x(side * 0.86 * person.shoulder), 0.213)
        reach = length * math.sin(swing)
        elbow = (
            shoulder[0] + self.x(side * splay * length, reach),
            shoulder[1] + length * math.cos(swing),
        )
        reach = length * math.sin(swing + 0.35)
        wrist = (elbow[0] + self.x(0.0, reach), elbow[1] + 0.95 * length * math.cos(swing + 0.35))
        radii = (0.031 * person.limb, 0.024 * person.limb, 0.018)
        paint(_limb(shoulder, elbow, *radii[:2]), person.skin, light=light)
        paint(_limb(elbow, wrist, *radii[1:]), person.skin, light=light)
        hand = _mix(elbow, wrist, 1.1)
        paint(_ellipse(*hand, 0.021, 0.025), person.skin, light=light)
        if person.bag == "tote" and side == person.bag_side:
            self.tote(hand, light)
        if not person.sleeve:
            return
        end = _mix(shoulder, elbow, min(1.0, 2 * person.sleeve))
        r_end = radii[1] + 0.007
        paint(_limb(shoulder, end, radii[0] + 0.006, r_end), person.top, (shoulder, elbow), light)
        if person.sleeve > 0.5:
            cuff = _mix(elbow, wrist, 2 * person.sleeve - 1)
            start = _mix(elbow, wrist, -1.0)
            paint(_limb(elbow, cuff, r_end, 0.025), person.top, (start, wrist), light)

    def backpack(self, light: float) -> None:
        size, x = self.person.bag_size, self.x(0, -0.085)
        half = 0.088 * size * (0.35 + 0.65 * abs(self.cos)) + 0.02
        low = 0.21 + 0.22 * size
        shape = [(0.19, half * 0.7), (0.23, half), (low - 0.03, half * 1.05), (low, half * 0.8)]
        body = _hull(shape) + [x, 0]
        axis = ((x, 0.19), (x, 0.6))
        self.p.part(body, self.person.bag_cloth, axis, light)
        if self.pose.back:
            pocket = _hull([(low - 0.1 * size, half * 0.7), (low - 0.02, half * 0.7)]) + [x, 0]
            self.p.part(pocket, self.person.bag_cloth, axis, 0.85)

    def straps(self) -> None:
        for side in (-1, 1):
            x = self.x(side * 0.055, 0.03)
            strap = _limb((x, 0.185), (self.x(side * 0.075), 0.34), 0.011, 0.01)
            self.p.part(strap, self.person.bag_cloth, light=0.9)

    def satchel(self) -> None:
        person = self.person
        side, size = person.bag_side, person.bag_size
        hip = (self.x(side * (person.hip + 0.02), 0.0), 0.5)
        shoulder = (self.x(-side * 0.07), 0.185)
        self.p.part(_limb(shoulder, (hip[0], 0.46), 0.009, 0.009), person.bag_cloth)
        half, low = 0.062 * size, 0.5 + 0.05 * size
        box = _hull([(0.45, half), (low, half * 1.05)]) + [hip[0], 0]
        self.p.part(box, person.bag_cloth, ((hip[0], 0.45), (hip[0], 0.6)))
        self.p.part(
            _hull([(0.447, half * 1.05), (0.48, half)]) + [hip[0], 0], person.bag_cloth, light=0.8
        )

    def tote(self, hand: Point, light: float) -> None:
        size, (x, y) = self.person.bag_size, hand
        bag = self.person.bag_cloth
        for dx in (-0.03, 0.03):
            self.p.part(_limb((x, y), (x + dx, y + 0.06), 0.005, 0.005), bag, light=light)
        box = _hull([(y + 0.055, 0.05 * size), (y + 0.06 + 0.12 * size, 0.06 * size)]) + [x, 0]
        self.p.part(box, bag, ((x, y + 0.055), (x, y + 0.2)), light)

    def hair_behind(self) -> None:
        if not self.pose.back and self.person.hair in MANES:
            self.mane()

    def mane(self) -> None:
        """The part of the hair that hangs behind the head (or over the back)."""
        person, head, x = self.person, self.person.head, self.x(0, -0.012)
        shapes = {
            "long": _hull([(0.02, 0.035), (0.07, 0.062), (0.15, 0.068), (0.26, 0.06)]),
            "bob": _hull([(0.02, 0.035), (0.07, 0.062), (0.12, 0.068), (0.155, 0.062)]),
            "afro": _ellipse(0, 0.062, 0.078, 0.068),
            "pony": _limb((self.x(0, -0.045), 0.06), (self.x(0, -0.07), 0.21), 0.018, 0.012),
            "hood": _ellipse(0, 0.09, 0.066, 0.085),
        }
        cloth = person.top if person.hair == "hood" else person.hair_cloth
        self.p.part(shapes[person.hair] * [head, 1] + [x, 0], cloth, light=0.92)

    def head(self) -> None:
        person, paint, head = self.person, self.p.part, self.person.head
        hair, style, x = person.hair_cloth, person.hair, self.x(0, 0.014)
        rx, ry, y = 0.047 * head, 0.06 * head, 0.078
        if person.collar in ("high", "scarf"):
            cloth = person.bag_cloth if person.collar == "scarf" else person.top
            paint(_limb((-0.03, 0.16), (0.03, 0.16), 0.021, 0.021), cloth, light=0.92)
        paint(_ellipse(x, y, rx, ry), person.skin)
        if style == "hood":
            hair = person.top
        elif style in ("cap", "beanie"):
            hair = person.bag_cloth
        if self.pose.back:
            if style != "bald":
                paint(_ellipse(x, y - 0.006, rx * 1.06, ry * 1.0), hair, light=0.95)
            if style in MANES:
                self.mane()
        else:
            for side in (-1, 1):
                eye = x + self.x(side * 0.018 * head, 0.03)
                paint(_ellipse(eye, y + 0.006, 0.0045, 0.006), person.skin, light=0.3)
            crown = {"crop": 0.3, "bald": 0.0, "cap": 0.42, "beanie": 0.44, "hood": 0.3}.get(
                style, 0.4
            )
            if crown:
                cut = math.pi * 0
                top = _ellipse(x, y - 0.004, rx * 1.07, ry * 1.07, 0.95 + cut, 2.05)
                fringe = _ellipse(x, y - 0.01, rx * 1.05, ry * (crown - 0.1), 2.05, 0.95)
                paint(np.concatenate([top, fringe]), hair)
        if style == "bun":
            paint(_ellipse(x - 0.01 * self.sin, 0.012, 0.026, 0.022), hair)
        if style == "cap" and not self.pose.back:
            paint(
                _limb((x - rx * 0.8, 0.06), (x + self.sin * 0.05 + rx * 0.8, 0.062), 0.009, 0.009),
                hair,
                light=0.8,
            )


@lru_cache(maxsize=64)
def _scene(camera: Camera) -> Array:
    """The empty place, wider than the picture, (H, W, channels) in 0..1."""
    rng = stream(camera.scene[0], _SCENE, camera.scene[1])
    width, height = 4 * camera.size[0], int(1.2 * camera.size[1])
    visible = camera.modality == "visible"
    horizon = rng.uniform(0.45, 0.72)

    def tone() -> tuple[int, ...]:
        grey, hue, infrared = rng.uniform(0.25, 0.75), rng.normal(0, 0.06, 3), rng.uniform(0.1, 0.6)
        return (
            tuple(int(255 * t) for t in np.clip(grey + hue, 0, 1))
            if visible
            else (int(255 * infrared),)
        )

    image = Image.new("RGB" if visible else "L", (width, height), tone())
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(5, 10))):  # doors, windows, posters, pillars
        x, w = rng.uniform(0, width), rng.uniform(0.1, 1.0) * camera.size[0]
        top, bottom = rng.uniform(-0.1, 0.4), rng.uniform(0.45, 1.0) * horizon
        pen.rectangle([x, min(top, bottom) * height, x + w, max(top, bottom) * height], fill=tone())
    pen.rectangle([0, horizon * height, width, height], fill=tone())
    for _ in range(int(rng.integers(2, 5))):  # joints and marks of the floor
        x, y = rng.uniform(-0.5, 1.5) * width, height
        pen.line([x, y, width / 2 + (x - width / 2) * 0.5, horizon * height], fill=tone(), width=3)
    image = image.filter(ImageFilter.GaussianBlur(0.012 * height))
    scene = np.asarray(image, np.float32).reshape(height, width, -1) / 255
    return scene * np.float32(0.9)


def draw(person: Person, camera: Camera, pose: Pose, rng: np.random.Generator) -> Image.Image:
    """The picture that ``camera`` takes of ``person``.

    Returns:
        An RGB image (visible) or a one-channel image (infrared) of ``camera.size``.
    """
    width, height = camera.size
    painter = _Painter(camera, pose, rng)
    _Figure(painter, person, pose).paint()
    small = [image.reduce(SUPERSAMPLING) for image in (painter.canvas, painter.mask)]
    figure, mask = (np.asarray(i, np.float32).reshape(height, width, -1) / 255 for i in small)
    soft = np.asarray(small[1].filter(ImageFilter.BoxBlur(height * 0.02)), np.float32) / 255
    side = np.roll(soft, -2, 1) - np.roll(soft, 2, 1)  # light from the left, darker rims
    figure = figure * (0.72 + 0.28 * soft - 0.22 * side)[..., None]
    scene = _scene(camera)
    dy, dx = (
        int(rng.integers(a - b + 1)) for a, b in zip(scene.shape, figure.shape[:2], strict=False)
    )
    picture = figure + (1 - mask) * scene[dy : dy + height, dx : dx + width]
    picture = picture * (
        np.float32(camera.light * rng.uniform(0.85, 1.12))
        * np.array(camera.tint, np.float32)[: picture.shape[2]]
    )
    lens = Image.fromarray(_bytes(picture)).filter(ImageFilter.GaussianBlur(camera.blur))
    picture = np.asarray(lens, np.float32).reshape(picture.shape) / 255
    grain = rng.standard_normal(picture.shape, np.float32)
    return Image.fromarray(_bytes(picture + camera.noise * grain))


def _bytes(picture: Array) -> NDArray[np.uint8]:
    image = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return image[..., 0] if image.shape[2] == 1 else image
