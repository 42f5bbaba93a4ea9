"""The synthetic world's people and cameras, as numbers; ``figure.py`` draws them.

What tells two people apart (build, cut of the clothes, textures, bags, hair, shoes) looks the same
in visible light and in infrared. What does not carry over is brightness: a cloth's infrared
brightness is drawn apart from its colour, even in its sign from ground to motif, as with real
dyes. So neither colour nor raw pixels match across modalities; shape and texture do.

Everything random comes from generators seeded by (world seed, what is made), so any person, camera
or picture can be made alone, in any order and in any process, and is always the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TEXTURES", "Camera", "Cloth", "Person", "Pose", "stream"]

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
RGB = tuple[float, float, float]

_PERSON, _CAMERA, _POSE = 1, 2, 3  # names of random streams

_DYES: tuple[RGB, ...] = (
    (0.93, 0.92, 0.88), (0.78, 0.79, 0.80), (0.45, 0.47, 0.50), (0.16, 0.17, 0.19),
    (0.12, 0.18, 0.34), (0.20, 0.38, 0.66), (0.50, 0.70, 0.86), (0.10, 0.42, 0.42),
    (0.20, 0.46, 0.27), (0.60, 0.66, 0.32), (0.90, 0.76, 0.30), (0.88, 0.52, 0.18),
    (0.76, 0.22, 0.18), (0.50, 0.12, 0.18), (0.86, 0.58, 0.62), (0.44, 0.26, 0.52),
    (0.70, 0.56, 0.40), (0.40, 0.28, 0.20), (0.84, 0.76, 0.62), (0.32, 0.36, 0.24),
)  # fmt: skip
_SKINS: tuple[RGB, ...] = (
    (0.95, 0.80, 0.69), (0.88, 0.69, 0.55), (0.76, 0.57, 0.42), (0.58, 0.41, 0.29),
    (0.42, 0.29, 0.21),
)  # fmt: skip
_HAIRS: tuple[RGB, ...] = (
    (0.10, 0.09, 0.09), (0.24, 0.16, 0.11), (0.45, 0.30, 0.16), (0.78, 0.62, 0.36),
    (0.55, 0.24, 0.12), (0.62, 0.62, 0.63),
)  # fmt: skip


def stream(seed: int, *names: int) -> np.random.Generator:
    """The random generator of one thing of the world ``seed``; names are non-negative integers."""
    return np.random.default_rng((seed, *names))


@dataclass(frozen=True)
class Cloth:
    """One material: colours and infrared brightness (0..1) of its ground and of its motif."""

    visible: tuple[RGB, RGB]
    infrared: tuple[float, float]
    texture: str = "plain"
    period: float = 0.08  # body heights
    share: float = 0.5  # of the period that the motif takes
    offset: float = 0.0

    def tones(self, modality: str, light: float = 1.0) -> Array:
        """(2, channels) in 0..255: ground and motif as the modality sees them."""
        pair: Any = self.visible if modality == "visible" else [[t] for t in self.infrared]
        return np.asarray(np.float32(255 * light) * np.array(pair, np.float32))


def _wave(x: Array, cloth: Cloth, offset: float, stretch: float = 1.0) -> Mask:
    return np.asarray((x / (stretch * cloth.period) + offset) % 1.0 < cloth.share)


def _print(u: Array, v: Array, size: float) -> tuple[Array, Array]:
    """Distances from the middle of the chest, in units of ``size``."""
    one = np.float32(1 / size)
    return np.abs(u) * one, np.abs(v - np.float32(0.14)) * one


def _dots(u: Array, v: Array, c: Cloth) -> Mask:
    x, y = (u / c.period + 0.5) % 1.0 - 0.5, (v / c.period + c.offset) % 1.0 - 0.5
    return x * x + y * y < 0.08 + 0.1 * c.share


def _cross(u: Array, v: Array, c: Cloth) -> Mask:
    x, y = _print(u, v, 0.05 + 0.03 * c.offset)
    return (np.minimum(x, y) < 0.3) & (np.maximum(x, y) < 1)


# Where the motif is, (H, W): u runs across the part and v along it, in body heights.
TEXTURES: dict[str, Callable[[Array, Array, Cloth], Mask]] = {
    "plain": lambda u, v, c: np.zeros(u.shape, bool),
    "hoops": lambda u, v, c: _wave(v, c, c.offset),
    "stripes": lambda u, v, c: _wave(u, c, c.share / 2),
    "checks": lambda u, v, c: _wave(u, c, c.share / 2) ^ _wave(v, c, c.offset),
    "tartan": lambda u, v, c: _wave(u, c, c.share / 2, 1.3) | _wave(v, c, c.offset, 1.3),
    "slant": lambda u, v, c: _wave(u + v, c, c.offset, 1.3),
    "chevron": lambda u, v, c: _wave(v - np.abs(u), c, c.offset, 1.2),
    "dots": _dots,
    "yoke": lambda u, v, c: v < 0.06 + 0.2 * c.offset,
    "halves": lambda u, v, c: u > 0.03 * (c.offset - 0.5),
    "band": lambda u, v, c: np.abs(v - 0.07 - 0.16 * c.offset) < 0.35 * c.period + 0.01,
    "sash": lambda u, v, c: np.abs(u - v + 0.13) < 0.3 * c.period + 0.015,
    "disc": lambda u, v, c: np.hypot(*_print(u, v, 0.035 + 0.045 * c.offset)) < 1,
    "ring": lambda u, v, c: np.abs(np.hypot(*_print(u, v, 0.045 + 0.035 * c.offset)) - 1) < 0.3,
    "diamond": lambda u, v, c: np.less(np.add(*_print(u, v, 0.05 + 0.05 * c.offset)), 1),
    "cross": _cross,
    "side line": lambda u, v, c: np.abs(np.abs(u) - 0.025) < 0.01 + 0.006 * c.offset,
}
_TOP_TEXTURES = tuple(name for name in TEXTURES if name != "side line")
_BOTTOM_TEXTURES = ("plain", "plain", "plain", "hoops", "checks", "slant", "side line", "dots")


def _cloth(rng: np.random.Generator, textures: Sequence[str] = ("plain",)) -> Cloth:
    """Ground and motif differ clearly in either modality, by separate draws."""

    def pair(value: Callable[[], Any], gap: float) -> tuple[Any, Any]:
        ground = value()
        while abs(float(np.mean(ground)) - float(np.mean(motif := value()))) < gap:
            pass
        return ground, motif

    return Cloth(
        visible=pair(lambda: _DYES[rng.integers(len(_DYES))], 0.25),
        infrared=pair(lambda: float(rng.uniform(0.12, 0.95)), 0.3),
        texture=textures[int(rng.integers(len(textures)))],
        period=float(rng.choice([0.055, 0.075, 0.1, 0.13])),
        share=float(rng.choice([0.3, 0.5, 0.65])),
        offset=float(rng.random()),
    )


class Person:
    """An identity's appearance. Lengths are in body heights, y runs from 0 (crown) to 1 (sole)."""

    def __init__(self, seed: int, identity: int) -> None:
        rng = stream(seed, _PERSON, identity)

        def pick(*choices: Any) -> Any:
            return choices[rng.integers(len(choices))]

        def uniform(low: float, high: float) -> float:
            return float(rng.uniform(low, high))

        self.gender: str = pick("female", "male")
        woman = self.gender == "female"
        weight = uniform(-1, 1)
        coat = rng.random() < 0.25
        self.cut: str = pick("trousers", "trousers", "shorts", "skirt" if woman else "trousers")
        tone, hair_tone = uniform(0.62, 0.8), uniform(0.08, 0.6)
        self.shoulder = uniform(0.1, 0.125) + 0.01 * weight - 0.008 * woman
        self.waist = uniform(0.078, 0.092) + 0.022 * weight - 0.006 * woman
        self.hip = uniform(0.088, 0.1) + 0.014 * weight
        self.crotch = uniform(0.49, 0.55)  # y: long legs have it high
        self.limb = 1 + 0.2 * weight + uniform(-0.08, 0.08)  # thickness, 1 is average
        self.head = uniform(0.94, 1.08)
        self.skin = Cloth((_SKINS[rng.integers(len(_SKINS))],) * 2, (tone, tone))
        self.hair: str = pick(
            *("short", "crop", "bald", "cap", "beanie", "afro", "short"),
            *(("long", "bob", "bun", "pony", "long") if woman else ("hood", "bun")),
        )
        hair_dye = _HAIRS[rng.integers(len(_HAIRS))]
        self.hair_cloth = Cloth((hair_dye, hair_dye), (hair_tone, hair_tone))
        self.top = _cloth(rng, _TOP_TEXTURES)
        # share of the arm that is covered
        self.sleeve: float = 1.0 if coat else pick(0.0, 0.38, 0.42, 0.7, 1.0, 1.0)
        # y of the top's lower edge, and its width there, relative to the hip
        self.hem = uniform(0.62, 0.76) if coat else uniform(0.47, 0.58)
        self.hem_width = uniform(1.0, 1.35) if coat else uniform(0.95, 1.15)
        # shirt under an open jacket
        self.inner = _cloth(rng) if rng.random() < (0.5 if coat else 0.25) else None
        self.collar: str = pick("round", "vee", "high", "scarf")
        self.bottom = _cloth(rng, _BOTTOM_TEXTURES)
        lengths = {"trousers": pick(1.0, 1.0, 0.92, 0.75), "shorts": pick(0.35, 0.5)}
        # share of the leg that is covered
        self.length: float = lengths.get(self.cut, uniform(0.4, 0.85))
        self.flare = uniform(0.8, 1.7)
        self.shoes = _cloth(rng, ("plain", "yoke"))
        self.boot: float = pick(0.0, 0.0, 0.1, 0.35, 0.7 if woman else 0.2)  # share of the shin
        self.bag: str = pick("none", "none", "backpack", "backpack", "satchel", "satchel", "tote")
        self.bag_cloth = _cloth(rng, ("plain", "yoke", "halves", "hoops", "checks"))
        self.bag_side: int = pick(-1, 1)
        self.bag_size = uniform(0.75, 1.25)


class Pose:
    """One moment: where the body faces and where in the stride it is (radians).

    It walks, within 43 degrees of facing the camera or (1 in 3) of turning away.
    """

    def __init__(self, seed: int, identity: int, camera: int, modality: str, take: int) -> None:
        rng = stream(seed, _POSE, identity, camera, int(modality == "infrared"), take)
        yaw = rng.uniform(-0.75, 0.75) + (math.pi if rng.random() < 1 / 3 else 0.0)
        self.yaw = float(yaw)  # 0 faces the camera, pi turns the back
        self.phase = float(rng.uniform(0, 2 * math.pi))
        self.lean = float(rng.normal(0, 0.015))
        self.back = math.cos(self.yaw) < 0


class Camera:
    """A place, a view and a sensor. ``modality`` is "visible" or "infrared"."""

    def __init__(
        self,
        seed: int,
        number: int,
        modality: str,
        size: tuple[int, int],
        low_light: float,
        same_size: bool = False,
    ) -> None:
        rng = stream(seed, _CAMERA, number, int(modality == "infrared"))
        scale, slim = rng.uniform(0.94, 1.08), rng.uniform(0.97, 1.04)
        if same_size:
            scale = slim = 1.0
        warm = rng.uniform(-0.12, 0.12)
        visible = modality == "visible"
        self.modality = modality
        self.scene = seed, number  # stream names of the place, the same for both modalities
        self.size = int(size[0] * scale * slim), int(size[1] * scale)  # (width, height), pixels
        self.zoom = float(rng.uniform(0.8, 0.96))  # body height / picture height
        # of the body, in picture sizes
        self.shift = float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.025, 0.025))
        self.tilt = float(rng.normal(0, 0.03))  # radians
        self.pitch = float(rng.uniform(0.0, 0.22))  # how much nearer the head is than the feet
        # 1 is a bright day
        self.light = float(rng.uniform(0.75, 1.0) - (0.4 * low_light if visible else 0.0))
        self.tint = (1 + warm, 1.0, 1 - warm) if visible else (1.0, 1.0, 1.0)
        self.blur = float(rng.uniform(0.3, 0.8))  # pixels
        self.noise = float(rng.uniform(0.01, 0.02) + 0.015 * low_light)  # of full scale
