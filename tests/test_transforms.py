"""Transforms against torchvision, timm and the reference."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deen_zoo.data.datasets import DATASETS
from deen_zoo.data.images import resize
from deen_zoo.data.transforms import (
    EvalTransform,
    TrainTransform,
    eval_transform,
    random_erasing,
    to_tensor,
)
from deen_zoo.errors import UserError
from deen_zoo.training.recipes import RECIPES

from .reference import needs_official, official

AREAS = sorted({kind.erasing_area for kind in DATASETS.values()})
CONFIG = {
    "input_size": (3, 96, 36),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "lanczos",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("shape", [(96, 36), (300, 100), (40, 97), (1, 1)])
@pytest.mark.parametrize("mean", [CONFIG["mean"], (0.5, 0.5, 0.5)])
def test_eval_transform_is_timms_bit_for_bit(shape, mean):
    from timm.data import create_transform

    config = {**CONFIG, "mean": mean}
    image = photo(*shape)
    ours = eval_transform(config)
    assert torch.equal(ours(image), create_transform(**config)(image))
    assert torch.equal(ours(image), ours(resize(image, (96, 36)))), "a row of the cache"
    gray = image.convert("L")
    assert torch.equal(ours(gray), create_transform(**config)(gray.convert("RGB")))


@pytest.mark.parametrize(
    ("key", "value"), [("crop_mode", "center"), ("crop_pct", 0.9), ("interpolation", "bicubic")]
)
def test_another_way_of_evaluating_is_refused(key, value):
    with pytest.raises(UserError, match=f"{key}={value!r}.*timm.data.create_transform"):
        eval_transform({**CONFIG, key: value})


def torchvision_oracle(image: Image.Image, transform: TrainTransform, rng) -> torch.Tensor:
    """The official recipe by torchvision's functions, with the same draws; no erasing."""
    from torchvision.transforms import functional as F

    width, height = image.size
    gray = rng.random() < transform.grayscale
    if transform.pad:
        image = F.pad(image, [transform.pad])
        if gray:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        top, left = rng.integers(0, 2 * transform.pad, size=2, endpoint=True)
        image = F.crop(image, top, left, height, width)
    if rng.random() < transform.flip:
        image = F.hflip(image)
    return F.normalize(F.to_tensor(image), transform.mean, transform.std)


@pytest.mark.parametrize("recipe", ["official", "paper"])
@pytest.mark.parametrize("seed", range(12))
def test_recipes_equal_torchvision_bit_for_bit(recipe, seed):
    chosen = RECIPES[recipe].data
    transform = TrainTransform(chosen.pad, chosen.grayscale, chosen.flip, erasing=0.0)
    image = photo(48, 18, seed)
    ours = transform(np.asarray(image), np.random.default_rng(seed))
    assert ours.shape == (3, 48, 18) and ours.dtype == torch.float32
    oracle = torchvision_oracle(image, transform, np.random.default_rng(seed))
    assert torch.equal(ours, oracle)


def test_each_augmentation_happens_half_of_the_time():
    ramp = np.zeros((60, 40, 3), np.uint8)
    ramp[..., 0], ramp[..., 2] = 255, np.arange(40) + 50  # blue rises from left to right
    transform = TrainTransform(mean=(0, 0, 0), std=(1, 1, 1), erasing_area=(0.02, 0.4))
    gray = flipped = erased = 0
    for seed in range(400):
        image = replace(transform, erasing=0.0)(ramp, np.random.default_rng(seed))
        erased += not torch.equal(image, transform(ramp, np.random.default_rng(seed)))
        gray += bool(torch.equal(image[0], image[2]))
        row = image[2, 30]
        row = row[row > 0]  # black is what the padding brought
        flipped += bool(row[0] > row[-1])
    for count in (gray, flipped, erased):
        assert 160 < count < 240  # 200, and four standard deviations


def test_every_shift_of_the_padded_crop_is_drawn():
    dot = np.zeros((40, 30, 3), np.uint8)
    dot[20, 15] = 255
    transform = TrainTransform(grayscale=0.0, flip=0.0, erasing=0.0, mean=(0, 0, 0), std=(1, 1, 1))
    seen = [transform(dot, np.random.default_rng(seed))[0].nonzero() for seed in range(600)]
    assert {int(at[0, 0]) for at in seen} == set(range(10, 31))
    assert {int(at[0, 1]) for at in seen} == set(range(5, 26))


class PythonRandom:
    """Draws of the standard library's generator, which the reference uses, by numpy's names."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def uniform(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        assert endpoint
        return self.random.randint(low, high)


@needs_official
@pytest.mark.parametrize("area", AREAS)
def test_random_erasing_is_the_references(area):
    erase = official("random_erasing").RandomErasing(0.5, *area, 0.3, [0.485, 0.456, 0.406])
    state = random.getstate()
    try:
        for seed in range(60):
            image = torch.randn(3, 96, 36, generator=torch.Generator().manual_seed(seed))
            random.seed(seed)
            theirs = erase(image.clone())
            assert torch.equal(random_erasing(image.clone(), PythonRandom(seed), area), theirs)
    finally:
        random.setstate(state)


# (top, bottom, left, right) that the reference erases of a 96x36 image after random.seed(0..7)
GOLDEN = {
    (0.02, 0.4): [None, (16, 72, 3, 24), None, (60, 93, 10, 33), (19, 37, 2, 14), None, None,
                  (9, 34, 17, 28)],
    (0.2, 0.8): [None, (8, 88, 0, 31), None, (4, 69, 4, 34), (9, 46, 1, 26), None, None,
                 (4, 52, 3, 24)],
}  # fmt: skip


@pytest.mark.parametrize("area", GOLDEN)
def test_random_erasing_covers_the_references_rectangles(area):
    for seed, box in enumerate(GOLDEN[area]):
        expected = torch.full((3, 96, 36), 9.0)
        if box is not None:
            fill = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
            expected[:, box[0] : box[1], box[2] : box[3]] = fill
        image = torch.full((3, 96, 36), 9.0)
        assert torch.equal(random_erasing(image, PythonRandom(seed), area), expected)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(2, 40),
    st.sampled_from(AREAS),
    st.integers(0, 2**32),
)
def test_erased_is_one_rectangle_of_the_mean_within_its_bounds(height, width, area, seed):
    image = torch.full((3, height, width), 9.0)
    erased = random_erasing(image.clone(), np.random.default_rng(seed), area, probability=1.0)
    hit = (erased != 9).all(0)
    if not hit.any():
        return
    rows, columns = hit.any(1).nonzero().flatten(), hit.any(0).nonzero().flatten()
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    assert hit[top:bottom, left:right].all() and hit.sum() == (bottom - top) * (right - left)
    assert bottom - top < height and right - left < width
    fill = erased[:, hit][:, 0]
    assert torch.equal(fill, torch.tensor([0.485, 0.456, 0.406]))
    # rounding a side moves the area by at most half a pixel on each side
    h, w = float(bottom - top), float(right - left)
    assert (h - 0.5) * (w - 0.5) <= area[1] * height * width
    assert (h + 0.5) * (w + 0.5) >= area[0] * height * width
    assert (h - 0.5) / (w + 0.5) <= 1 / 0.3 and (h + 0.5) / max(w - 0.5, 1e-9) >= 0.3


def test_nothing_is_erased_at_a_probability_of_zero():
    untouched = torch.ones(3, 40, 20)
    assert random_erasing(untouched, np.random.default_rng(0), (0.02, 0.4), 0.0) is untouched
    assert (untouched == 1).all()


def test_a_sample_depends_on_its_generator_alone():
    transform = TrainTransform()
    image = np.asarray(photo(48, 18))
    one, two = (transform(image, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, transform(image, np.random.default_rng(8)))
    assert np.array_equal(image, np.asarray(photo(48, 18))), "the pixels given are left as they are"


def test_to_tensor_takes_read_only_and_strided_pixels():
    pixels = np.asarray(photo(8, 6))
    assert not pixels.flags.writeable
    mirrored = to_tensor(pixels[:, ::-1])
    assert torch.equal(mirrored, to_tensor(pixels).flip(2))
    assert EvalTransform((8, 6))(pixels).shape == (3, 8, 6)
