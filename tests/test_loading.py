"""Loaders: the same batches for any number of threads, and broken files."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from PIL import Image

from deen_zoo.data import read_image
from deen_zoo.data.loader import TrainLoader, map_batches
from deen_zoo.data.protocols import Sample
from deen_zoo.data.transforms import TrainTransform
from deen_zoo.errors import UserError

SIZE, AREA = (32, 16), (0.02, 0.4)


def colour(identity: int, number: int, infrared: bool) -> tuple[int, int, int]:
    return (10 * identity, 20 * number, 200 if infrared else 0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Five identities 11, 22, ... with 6 visible and 5 infrared images, each of one flat colour."""
    root = tmp_path_factory.mktemp("images")
    found = []
    for identity in (33, 11, 55, 22, 44):
        for modality, count in (("infrared", 5), ("visible", 6)):
            for number in range(count):
                path = root / f"{modality}_{identity}_{number}.png"
                pixel = colour(identity // 11, number, modality == "infrared")
                Image.new("RGB", (20, 40), pixel).save(path)
                found.append(Sample(str(path), identity, 1, modality))
    return found


def broken_copy(samples: list[Sample], folder: Path, names: list[str]) -> list[Sample]:
    """The same samples, with these files cut off half-way."""
    out = []
    for sample in samples:
        path = Path(sample.path)
        if path.name in names:
            path = folder / path.name
            path.write_bytes(Path(sample.path).read_bytes()[:40])
        out.append(sample._replace(path=str(path)))
    return out


def loader(samples: list[Sample], threads: int = 1, **options) -> TrainLoader:
    transform = TrainTransform(erasing_area=AREA)
    options = {"identities_per_batch": 2, "images_per_modality": 3, "seed": 4, **options}
    return TrainLoader(samples, SIZE, transform, threads=threads, **options)


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_batch_is_visible_then_infrared_aligned_by_identity(samples):
    plain = TrainTransform(0, 0.0, erasing_area=AREA, mean=(0, 0, 0), std=(1, 1, 1))
    train = TrainLoader(samples, SIZE, plain, 3, 2, threads=1)
    batches = list(train)
    assert train.identities == [11, 22, 33, 44, 55] and len(batches) == 30 // 6 + 1
    for images, labels, infrared in batches:
        assert images.shape == (12, 3, 32, 16) and images.dtype == torch.float32
        assert labels.dtype == torch.int64 and infrared.dtype == torch.bool
        assert infrared.tolist() == [False] * 6 + [True] * 6 and infrared.device.type == "cpu"
        assert torch.equal(labels[:6], labels[6:])
        _red, _, _blue = images.amin((2, 3)).mul(255).round().unbind(1)  # an erased box is brighter
        for label, pixel, side in zip(labels, images.unbind(0), infrared, strict=True):
            # the colour says which file it was: red is the identity, blue the modality
            flat = {tuple(c) for c in pixel.flatten(1).mul(255).round().int().T.tolist()}
            assert any(c[0] == 10 * (label + 1) and c[2] == 200 * side for c in flat)


def test_any_number_of_threads_gives_the_same_batches(samples):
    def two_epochs(threads):
        batches, train = [], loader(samples, threads)
        for epoch in (0, 1):
            train.set_epoch(epoch)
            batches += list(train)
        return batches

    alone = two_epochs(1)
    assert not torch.equal(alone[0].images, alone[len(alone) // 2].images)
    for threads in (2, 4):
        assert_same(two_epochs(threads), alone)


def test_iterating_leaves_the_global_random_state_alone(samples):
    before = torch.get_rng_state()
    list(loader(samples))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pool_keeps_the_order_raises_the_first_error_and_stops():
    """A5, A8: no process and no thread outlives the iteration, however it ends."""
    batches = [range(0, 5), range(5, 8), [], range(8, 30)]
    before = threading.active_count()
    for threads in (None, 1, 7):
        assert list(map_batches(str, batches, threads)) == [[str(i) for i in b] for b in batches]

    def fail(number: int) -> int:
        if number >= 6:
            raise UserError(f"number {number}")
        return number

    with pytest.raises(UserError, match="number 6"):
        list(map_batches(fail, batches, 4))
    endless = map_batches(str, iter(lambda: [1, 2], None), 4)
    assert next(endless) == ["1", "2"]
    endless.close()
    assert threading.active_count() == before


def first_error(batches: Iterable[object]) -> str:
    """Class and message; the exception itself would keep the loader alive."""
    try:
        for _ in batches:
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("threads", [1, 3])
def test_a_broken_file_is_one_line_that_names_it(samples, tmp_path, threads):
    data = broken_copy(samples, tmp_path, ["visible_33_2.png"])
    train = loader(data, threads, identities_per_batch=5, images_per_modality=6)
    for epoch in range(20):  # until the sampler has drawn it
        train.set_epoch(epoch)
        if told := first_error(train):
            break
    assert told.startswith(f"UserError: {tmp_path / 'visible_33_2.png'}: ")
    assert "\n" not in told and "Traceback" not in told


def test_a_missing_file_and_one_modality_are_clear(samples, tmp_path):
    with pytest.raises(UserError, match=r"no-such\.png"):
        read_image(str(tmp_path / "no-such.png"), SIZE)
    without = [s for s in samples if (s.identity, s.modality) != (22, "infrared")]
    with pytest.raises(UserError, match="1 identity .* 22"):
        loader(without)


def test_digits_of_any_spelling_are_one_identity(samples):
    """B2: "0011" and 11 were two people, each without the other modality."""
    spelt = [s._replace(identity=f"{s.identity:04d}") if s.modality == "visible" else s
             for s in samples]  # fmt: skip
    assert loader(spelt).identities == loader(samples).identities
    assert_same(loader(spelt), loader(samples))


def test_sizes_must_agree():
    class Cache:
        size, intensity = (64, 64), "full"

    with pytest.raises(UserError, match=r"cache has size \(64, 64\), not \(32, 16\)"):
        TrainLoader([], SIZE, TrainTransform(), 2, 2, cache=Cache())
