"""The decoded cache: its pixels, when it is built again, two builders at once, a builder killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deen_zoo.data import cache as cache_module
from deen_zoo.data.cache import open_cache, read_image
from deen_zoo.data.images import open_image
from deen_zoo.data.loader import TrainLoader
from deen_zoo.data.protocols import Sample
from deen_zoo.data.transforms import TrainTransform
from deen_zoo.errors import UserError

SIZE = (48, 18)
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(FORK is None, reason="the system has no fork")


def write(path: Path, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    (tmp_path / "images").mkdir()
    return [write(tmp_path / "images" / f"{i}.png", i) for i in (3, 1, 4, 0, 2)]


def caches(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_rows_are_the_decoded_images_and_any_program_can_map_them(paths, tmp_path, capfd):
    cache = open_cache(tmp_path / "cache", [*paths, paths[0]], SIZE)
    assert len(cache) == 5 and cache.size == SIZE
    for path in paths:
        assert np.array_equal(cache.read(path), read_image(path, SIZE))
    mapped = np.load(cache.folder / "images.npy", mmap_mode="r")
    assert mapped.shape == (5, *SIZE, 3) and mapped.dtype == np.uint8
    assert np.array_equal(mapped[4], read_image(sorted(paths)[4], SIZE))
    assert cache.read("elsewhere.png") is None
    copy = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(copy.read(paths[2]), cache.read(paths[2]))
    said = capfd.readouterr()
    assert "decoding 5 images once" in said.err and said.out == ""


def test_a_built_cache_is_used_again_in_any_order(paths, tmp_path, monkeypatch):
    folder = open_cache(tmp_path / "cache", paths, SIZE).folder
    monkeypatch.setattr(cache_module, "_build", None)
    again = open_cache(tmp_path / "cache", paths[::-1], SIZE)
    assert again.folder == folder
    assert np.array_equal(again.read(paths[1]), read_image(paths[1], SIZE))


def test_changed_files_and_another_size_get_a_cache_of_their_own(paths, tmp_path):
    def folder(images, size=SIZE):
        return open_cache(tmp_path / "cache", images, size).folder

    seen = [folder(paths), folder(paths, (18, 48)), folder(paths[:4])]
    stat = os.stat(paths[0])
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    seen.append(folder(paths))
    write(Path(paths[0]), 77)
    changed = open_cache(tmp_path / "cache", paths, SIZE)
    assert np.array_equal(changed.read(paths[0]), read_image(paths[0], SIZE))
    os.rename(paths[0], paths[0] + ".png")
    seen += [changed.folder, folder([paths[0] + ".png", *paths[1:]])]
    assert len(set(seen)) == len(seen) == 6


def test_another_scaling_of_16_bits_gets_a_cache_of_its_own(tmp_path):
    """B3: the cache holds what the named scaling makes of a raw thermal image."""
    counts = np.linspace(7000, 9000, 30 * 20).reshape(30, 20).astype(np.uint16)
    Image.fromarray(counts).save(tmp_path / "raw.png")
    path = str(tmp_path / "raw.png")
    plain = open_cache(tmp_path / "cache", [path], SIZE)
    scaled = open_cache(tmp_path / "cache", [path], SIZE, intensity=(7000, 9000))
    assert plain.folder != scaled.folder and scaled.intensity == (7000, 9000)
    assert np.array_equal(scaled.read(path), read_image(path, SIZE, intensity=(7000, 9000)))
    assert np.ptp(plain.read(path)) < 9 and np.ptp(scaled.read(path)) > 200


def test_another_pillow_gets_a_cache_of_its_own(paths, tmp_path, monkeypatch):
    """B4: it may decode otherwise, and the record of a run names the one that is installed."""
    one = open_cache(tmp_path, paths, SIZE).folder
    monkeypatch.setattr("PIL.__version__", "99")
    assert open_cache(tmp_path, paths, SIZE).folder != one


def test_a_moved_tree_keeps_its_cache(paths, tmp_path):
    folder = open_cache(tmp_path / "cache", paths, SIZE).folder
    os.rename(tmp_path / "images", tmp_path / "moved")
    moved = [path.replace("/images/", "/moved/") for path in paths]
    cache = open_cache(tmp_path / "cache", moved, SIZE)
    assert cache.folder == folder and cache.read(moved[0]) is not None


def test_loaders_give_the_same_batches_with_and_without(paths, tmp_path):
    samples = [Sample(p, i, 1, m) for m in ("visible", "infrared") for i, p in enumerate(paths)]
    cache = open_cache(tmp_path / "cache", paths[:3], SIZE)  # the others come from their files
    plain, cached = (
        list(TrainLoader(samples, SIZE, TrainTransform(), 2, 2, **options))
        for options in ({"threads": 1}, {"threads": 2, "cache": cache})
    )
    assert len(plain) == len(cached) > 0
    for one, two in zip(plain, cached, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_broken_files_are_left_out_and_still_named_when_asked_for(paths, tmp_path, capfd):
    Path(paths[1]).write_bytes(b"no image")
    Path(paths[3]).unlink()
    cache = open_cache(tmp_path / "cache", paths, SIZE)
    assert [path for path in paths if cache.read(path) is None] == [paths[1], paths[3]]
    assert len(cache) == 3
    assert "2 broken files left out" in capfd.readouterr().err
    assert np.array_equal(cache.read(paths[4]), read_image(paths[4], SIZE))
    for path in (paths[1], paths[3]):
        with pytest.raises(UserError, match=Path(path).name):
            read_image(path, SIZE, cache)
    write(Path(paths[1]), 5)
    again = open_cache(tmp_path / "cache", paths, SIZE)
    assert [path for path in paths if again.read(path) is None] == [paths[3]]


def test_a_full_disk_is_known_before_the_work(paths, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 100, 100))
    with pytest.raises(UserError, match=r"5 images at 48x18 takes .* free"):
        open_cache(tmp_path / "cache", paths, SIZE)
    assert caches(tmp_path / "cache") == []


def test_a_failed_build_leaves_nothing(paths, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        open_cache(tmp_path / "cache", paths, SIZE)
    assert caches(tmp_path / "cache") == []


def test_a_damaged_cache_is_an_error_in_use_and_built_anew_when_opened(paths, tmp_path):
    cache = open_cache(tmp_path / "cache", paths, SIZE)
    file = cache.folder / "images.npy"
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(UserError, match="cut short"):
        cache.read(sorted(paths)[4])
    again = open_cache(tmp_path / "cache", paths, SIZE)
    assert np.array_equal(again.read(sorted(paths)[4]), read_image(sorted(paths)[4], SIZE))
    for damage in (b"", b"[]", b"\xff", b'{"size": [1]}', b'{"broken": 5}'):
        (cache.folder / "index.json").write_bytes(damage)
        assert len(open_cache(tmp_path / "cache", paths, SIZE)) == 5
    shutil.rmtree(cache.folder)
    with pytest.raises(UserError, match="removed or cut short"):
        cache.read(paths[0])


def build(tmp_path: Path, paths: list[str], said: multiprocessing.SimpleQueue[object]) -> None:
    """In a process of its own: build slowly, noting each image that is decoded."""

    def slow(path: str, intensity: object) -> Image.Image:
        with open(tmp_path / "decoded", "a") as file:
            file.write(f"{path}\n")
        time.sleep(0.2)
        return open_image(path)

    cache_module.open_image, cache_module.CHUNK = slow, 2
    cache = open_cache(tmp_path / "cache", paths, SIZE)
    said.put((cache.folder, len(cache)))


def decoded(tmp_path: Path) -> int:
    file = tmp_path / "decoded"
    return len(file.read_text().splitlines()) if file.exists() else 0


@needs_fork
def test_two_processes_build_it_once(paths, tmp_path):
    said = FORK.SimpleQueue()
    both = [FORK.Process(target=build, args=(tmp_path, paths, said)) for _ in range(2)]
    for process in both:
        process.start()
    folders = {said.get() for _ in both}
    for process in both:
        process.join()
    assert folders == {(folder, 5) for folder in caches(tmp_path / "cache")} and len(folders) == 1
    assert decoded(tmp_path) == 5, "each image by one of them alone"
    cache = open_cache(tmp_path / "cache", paths, SIZE)
    assert all(np.array_equal(cache.read(p), read_image(p, SIZE)) for p in paths)


@needs_fork
def test_a_build_killed_half_way_is_no_cache_and_is_cleared_away(paths, tmp_path):
    process = FORK.Process(target=build, args=(tmp_path, paths, FORK.SimpleQueue()))
    process.start()
    while decoded(tmp_path) < 4:  # the first chunk is written, the second begun
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    (left,) = caches(tmp_path / "cache")
    assert left.suffix == ".partial" and (left / "images.npy").stat().st_size > 0
    cache = open_cache(tmp_path / "cache", paths, SIZE)
    assert caches(tmp_path / "cache") == [cache.folder]
    assert all(np.array_equal(cache.read(p), read_image(p, SIZE)) for p in paths)
