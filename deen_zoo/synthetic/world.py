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


@dataclass(frozen=True)
class Person:
    """An identity's appearance. Lengths are in body heights, y runs from 0 (crown) to 1 (sole)."""

    gender: str
    shoulder: float
    waist: float
    hip: float
    crotch: float  # y: long legs have it high
    limb: float  # thickness, 1 is average
    head: float
    skin: Cloth
    hair: str
    hair_cloth: Cloth
    top: Cloth
    sleeve: float  # share of the arm that is covered
    hem: float  # y of the top's lower edge
    hem_width: float  # at the hem, relative to the hip
    inner: Cloth | None  # shirt under an open jacket
    collar: str
    bottom: Cloth
    cut: str
    length: float  # share of the leg that is covered
    flare: float
    shoes: Cloth
    boot: float  # share of the shin
    bag: str
    bag_cloth: Cloth
    bag_side: int
    bag_size: float

    @classmethod
    def make(cls, seed: int, identity: int) -> Person:
        """The person with this number in the world ``seed``."""
        rng = stream(seed, _PERSON, identity)

        def pick(*choices: Any) -> Any:
            return choices[rng.integers(len(choices))]

        gender = pick("female", "male")
        woman = gender == "female"
        weight = rng.uniform(-1, 1)
        coat = rng.random() < 0.25
        cut = pick("trousers", "trousers", "shorts", "skirt" if woman else "trousers")
        tone = float(rng.uniform(0.62, 0.8))
        hair_tone = float(rng.uniform(0.08, 0.6))
        return cls(
            gender=gender,
            shoulder=float(rng.uniform(0.1, 0.125) + 0.01 * weight - 0.008 * woman),
            waist=float(rng.uniform(0.078, 0.092) + 0.022 * weight - 0.006 * woman),
            hip=float(rng.uniform(0.088, 0.1) + 0.014 * weight),
            crotch=float(rng.uniform(0.49, 0.55)),
            limb=float(1 + 0.2 * weight + rng.uniform(-0.08, 0.08)),
            head=float(rng.uniform(0.94, 1.08)),
            skin=Cloth((_SKINS[rng.integers(len(_SKINS))],) * 2, (tone, tone)),
            hair=pick(
                *("short", "crop", "bald", "cap", "beanie", "afro", "short"),
                *(("long", "bob", "bun", "pony", "long") if woman else ("hood", "bun")),
            ),
            hair_cloth=Cloth((_HAIRS[rng.integers(len(_HAIRS))],) * 2, (hair_tone, hair_tone)),
            top=_cloth(rng, _TOP_TEXTURES),
            sleeve=pick(0.0, 0.38, 0.42, 0.7, 1.0, 1.0) if not coat else 1.0,
            hem=float(rng.uniform(0.62, 0.76) if coat else rng.uniform(0.47, 0.58)),
            hem_width=float(rng.uniform(1.0, 1.35) if coat else rng.uniform(0.95, 1.15)),
            inner=_cloth(rng) if rng.random() < (0.5 if coat else 0.25) else None,
            collar=pick("round", "vee", "high", "scarf"),
            bottom=_cloth(rng, _BOTTOM_TEXTURES),
            cut=cut,
            length={"trousers": pick(1.0, 1.0, 0.92, 0.75), "shorts": pick(0.35, 0.5)}.get(
                cut, float(rng.uniform(0.4, 0.85))
            ),
            flare=float(rng.uniform(0.8, 1.7)),
            shoes=_cloth(rng, ("plain", "yoke")),
            boot=pick(0.0, 0.0, 0.1, 0.35, 0.7 if woman else 0.2),
            bag=pick("none", "none", "backpack", "backpack", "satchel", "satchel", "tote"),
            bag_cloth=_cloth(rng, ("plain", "yoke", "halves", "hoops", "checks")),
            bag_side=pick(-1, 1),
            bag_size=float(rng.uniform(0.75, 1.25)),
        )


@dataclass(frozen=True)
class Pose:
    """One moment: where the body faces and where in the stride it is (radians)."""

    yaw: float  # 0 faces the camera, pi turns the back
    phase: float
    lean: float = 0.0

    @classmethod
    def make(cls, seed: int, identity: int, camera: int, modality: str, take: int) -> Pose:
        """A walking pose, within 43 degrees of facing the camera or (1 in 3) of turning away."""
        rng = stream(seed, _POSE, identity, camera, int(modality == "infrared"), take)
        yaw = rng.uniform(-0.75, 0.75) + (math.pi if rng.random() < 1 / 3 else 0.0)
        return cls(float(yaw), float(rng.uniform(0, 2 * math.pi)), float(rng.normal(0, 0.015)))

    @property
    def back(self) -> bool:
        return math.cos(self.yaw) < 0


@dataclass(frozen=True)
class Camera:
    """A place, a view and a sensor. ``modality`` is "visible" or "infrared"."""

    modality: str
    scene: tuple[int, int]  # stream names of the place, shared by both modalities of a camera
    size: tuple[int, int]  # (width, height) in pixels
    zoom: float  # body height / picture height
    shift: tuple[float, float]  # of the body, in picture sizes
    tilt: float  # radians
    pitch: float  # how much nearer the head is than the feet
    light: float  # 1 is a bright day
    tint: RGB
    blur: float  # pixels
    noise: float  # of full scale

    @classmethod
    def make(
        cls,
        seed: int,
        number: int,
        modality: str,
        size: tuple[int, int],
        low_light: float,
        same_size: bool = False,
    ) -> Camera:
        """Camera ``number`` of the world ``seed``; ``low_light`` from 0 (day) to 1 (night)."""
        rng = stream(seed, _CAMERA, number, int(modality == "infrared"))
        scale, slim = rng.uniform(0.94, 1.08), rng.uniform(0.97, 1.04)
        if same_size:
            scale = slim = 1.0
        warm = rng.uniform(-0.12, 0.12)
        visible = modality == "visible"
        return cls(
            modality=modality,
            scene=(seed, number),
            size=(int(size[0] * scale * slim), int(size[1] * scale)),
            zoom=float(rng.uniform(0.8, 0.96)),
            shift=(float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.025, 0.025))),
            tilt=float(rng.normal(0, 0.03)),
            pitch=float(rng.uniform(0.0, 0.22)),
            light=float(rng.uniform(0.75, 1.0) - (0.4 * low_light if visible else 0.0)),
            tint=(1 + warm, 1.0, 1 - warm) if visible else (1.0, 1.0, 1.0),
            blur=float(rng.uniform(0.3, 0.8)),
            noise=float(rng.uniform(0.01, 0.02) + 0.015 * low_light),
        )
