"""Readers of the three layouts, and the decoding of image files."""

from __future__ import annotations

import os
import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image, ImageFile

import deen_zoo.models  # noqa: F401, registers them with timm
from deen_zoo.cli import main
from deen_zoo.data import (
    PROTOCOLS,
    Protocol,
    ReidDataset,
    Sample,
    check_dataset,
    images,
    open_dataset,
    open_image,
    register_dataset,
    register_protocol,
)
from deen_zoo.data.datasets import DATASETS, LLCM, get_dataset
from deen_zoo.errors import UserError
from deen_zoo.evaluation import evaluate

from . import trees
from .reference import needs_official, official

NAMES = ("sysu", "regdb", "llcm")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    return {name: trees.MAKERS[name](place / name) for name in NAMES}


def test_sysu_samples(roots):
    dataset = open_dataset("sysu", roots["sysu"])
    train = dataset.train()
    assert {s.identity for s in train} == set(trees.TRAIN)
    assert {s.identity for s in dataset.test("visible")} == set(trees.TEST)
    for sample in [*train, *dataset.test("infrared"), *dataset.test("visible")]:
        camera, identity, _name = Path(sample.path).relative_to(roots["sysu"]).parts
        assert camera == f"cam{sample.camera}" and int(identity) == sample.identity
        assert sample.modality == ("infrared" if sample.camera in (3, 6) else "visible")
        assert os.path.isfile(sample.path)
    on_disk = list(roots["sysu"].glob("cam*/*/*.jpg"))
    assert len(on_disk) == len(train + dataset.test("infrared") + dataset.test("visible"))


def test_regdb_samples(roots):
    dataset = open_dataset("regdb", roots["regdb"])
    splits = set()
    for trial in range(1, 11):
        train = dataset.train(trial)
        test = dataset.test("visible", trial) + dataset.test("infrared", trial)
        ids = frozenset(s.identity for s in train)
        assert ids.isdisjoint({s.identity for s in test})
        assert len({s.path for s in train + test}) == 24
        assert {(s.modality, s.camera) for s in train + test} == {("visible", 1), ("infrared", 2)}
        assert dataset.query("regdb-ir2vis", trial) == dataset.gallery("regdb-vis2ir", trial)
        splits.add(ids)
    assert len(splits) > 3
    for call in (dataset.train, lambda trial: dataset.test("visible", trial)):
        with pytest.raises(UserError, match="RegDB has no split 11"):
            call(11)


def test_llcm_samples(roots):
    dataset = open_dataset("llcm", roots["llcm"])
    train = dataset.train()
    assert {(s.identity, s.modality) for s in train} == {
        (i, m) for i in trees.TRAIN for m in ("visible", "infrared")
    }
    for sample in train + dataset.test("visible") + dataset.test("infrared"):
        identity, camera = Path(sample.path).name.split("_")[:2]
        assert (int(identity), int(camera[1:])) == (sample.identity, sample.camera)
        assert sample.path.endswith("_vis.jpg" if sample.modality == "visible" else "_nir.jpg")
    assert {s.camera for s in dataset.test("infrared")} <= set(trees.NIR_CAMERAS)


@needs_official
def test_regdb_lists_equal_the_reference(roots):
    manager = official("data_manager")
    dataset = open_dataset("regdb", roots["regdb"])
    for trial in range(1, 11):
        for modality, theirs in (("visible", "visible"), ("infrared", "thermal")):
            paths, labels = manager.process_test_regdb(f"{roots['regdb']}/", trial, theirs)
            ours = dataset.test(modality, trial)
            assert [s.path for s in ours] == [os.path.normpath(path) for path in paths]
            pairs = set(zip((s.identity for s in ours), labels.tolist(), strict=True))
            assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def same_names(a: dict[str, object], b: dict[str, object]) -> bool:
    """Whether two fingerprints differ in nothing but sizes and times of the files."""
    return {**a, "content": ""} == {**b, "content": ""}


@pytest.mark.parametrize("name", NAMES)
def test_models_have_as_many_identities_as_their_dataset_trains(name):
    counts = get_dataset(name).expected
    identities = {c["identities"] for part, c in counts.items() if part.startswith("train")}
    for family in ("deen", "agw", "tvilfm"):
        cfg = timm.models.get_pretrained_cfg(f"{family}_resnet50_{name}")
        assert {cfg.num_classes} == identities


@pytest.mark.parametrize("name", NAMES)
def test_only_the_part_below_the_root_is_parsed(tmp_path, name, roots):
    elsewhere = trees.MAKERS[name](tmp_path / "cam5" / "vis" / "Thermal_0007_c09_x")
    link = tmp_path / "link to cam2"
    link.symlink_to(elsewhere)
    plain = open_dataset(name, roots[name])
    for root in (elsewhere, link, str(link), f"{link}/", tmp_path / "cam5" / ".." / link.name):
        dataset = open_dataset(name, root)
        assert [s[1:] for s in dataset.train()] == [s[1:] for s in plain.train()]
        assert [dataset.relative(s.path) for s in dataset.test("infrared")] == [
            plain.relative(s.path) for s in plain.test("infrared")
        ]
        assert same_names(dataset.fingerprint(), plain.fingerprint())


def test_the_root_may_be_relative_or_in_the_home_folder(roots, monkeypatch):
    monkeypatch.chdir(roots["sysu"].parent)
    assert os.path.isfile(open_dataset("sysu", "sysu").train()[0].path)
    monkeypatch.setenv("HOME", str(roots["sysu"].parent))
    assert os.path.isfile(open_dataset("sysu", "~/sysu").train()[0].path)


def test_index_files_may_have_been_edited(tmp_path):
    clean, edited = trees.sysu(tmp_path / "a"), trees.sysu(tmp_path / "b")
    (edited / "exp/test_id.txt").write_bytes(b"\xef\xbb\xbf010, 3,,\r\n6 ,\r\n\r\n")
    (edited / "exp/train_id.txt").write_bytes(b"2,1,2,\n")
    a, b = open_dataset("sysu", clean), open_dataset("sysu", edited)
    assert same_names(a.fingerprint(), b.fingerprint())
    assert [s[1:] for s in a.query("sysu-all")] == [s[1:] for s in b.query("sysu-all")]

    clean, edited = trees.regdb(tmp_path / "c"), trees.regdb(tmp_path / "d")
    for index in (edited / "idx").iterdir():
        lines = index.read_text().replace("/", "\\").splitlines()
        index.write_bytes("\r\n".join(["", *(f"  {line}  " for line in lines), ""]).encode())
    a, b = open_dataset("regdb", clean), open_dataset("regdb", edited)
    assert same_names(a.fingerprint(), b.fingerprint())


@pytest.mark.parametrize("name", ["sysu", "llcm"])
def test_names_may_differ_in_the_case_of_their_extension(name, roots, tmp_path):
    root = trees.MAKERS[name](tmp_path)
    for path in root.rglob("*.jpg"):
        path.rename(path.with_suffix(".JPG"))
    samples = open_dataset(name, root).train()
    assert len(samples) == len(open_dataset(name, roots[name]).train())
    assert all(os.path.isfile(s.path) and s.path.endswith(".JPG") for s in samples)


def test_nothing_but_names_is_read(roots, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    for name in NAMES:
        dataset = open_dataset(name, roots[name])
        dataset.train(), dataset.test("visible"), dataset.fingerprint()


def test_the_fingerprint_is_of_names_and_counts(tmp_path):
    root = trees.sysu(tmp_path)
    before = open_dataset("sysu", root).fingerprint()
    assert before["images"] == len(list(root.glob("cam*/*/*.jpg")))
    assert before["counts"]["train"]["identities"] == 3
    (root / "cam1/0006/Thumbs.db").write_bytes(b"x")
    assert open_dataset("sysu", root).fingerprint() == before
    (root / "cam1/0006/0001.jpg").rename(root / "cam1/0006/0077.jpg")
    renamed = open_dataset("sysu", root).fingerprint()
    assert renamed["counts"] == before["counts"] and renamed["sha256"] != before["sha256"]
    trees.write(root / "cam1/0006/0002.jpg", "visible", 99)
    rewritten = open_dataset("sysu", root).fingerprint()
    assert same_names(rewritten, renamed) and rewritten["content"] != renamed["content"]


def test_wrong_folders_are_told_what_to_give_instead(tmp_path, roots):
    for name in NAMES:
        inside = next(path for path in sorted(roots[name].iterdir()) if path.is_dir())
        with pytest.raises(UserError, match=f"did you mean {roots[name]}"):
            open_dataset(name, roots[name].parent)
        with pytest.raises(UserError, match=f"did you mean {roots[name]}"):
            open_dataset(name, inside)
        if name == "sysu":
            with pytest.raises(UserError, match=f"did you mean {roots[name]}"):
                open_dataset(name, inside / "0001")
        for other in NAMES:
            if other != name:
                with pytest.raises(UserError, match=f"looks like .*: name it '{name}'"):
                    open_dataset(other, roots[name])
        with pytest.raises(UserError, match=r"no such folder.*request"):
            open_dataset(name, tmp_path / "absent")
        with pytest.raises(UserError, match="no folder"):
            open_dataset(name, tmp_path)
    with pytest.raises(UserError, match="dataset 'market': choose from .*sysu, regdb, llcm"):
        open_dataset("market", tmp_path)
    with pytest.raises(UserError, match="modality 'thermal': choose from visible, infrared"):
        open_dataset("sysu", roots["sysu"]).test("thermal")


def test_all_public_names_of_data_exist():
    import deen_zoo.data

    for name in deen_zoo.data.__all__:
        assert getattr(getattr(deen_zoo.data, name), "__name__", name) == name
    assert Sample._fields == ("path", "identity", "camera", "modality")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        deen_zoo.data.nonsense  # noqa: B018


# open_image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (24, 48)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, random.Random(0).randbytes(size[0] * size[1] * bands))


def decoded(path: Path, data: bytes) -> np.ndarray:
    path.write_bytes(data)
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow warns before it raises
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
def test_every_truncation_is_noticed_or_harmless(tmp_path, kind):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = encode(noise(), kind)
    path = tmp_path / "x.img"
    whole, refused = decoded(path, data), 0
    for end in sorted({*range(0, len(data), 97), *range(len(data) - 40, len(data))}):
        try:
            part = decoded(path, data[:end])
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert np.array_equal(part, whole), f"{end} of {len(data)} bytes pass in silence"
    assert refused > 10


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    data = encode(noise(), "JPEG")
    path = tmp_path / "x.jpg"
    for content, words in (
        (b"", "an empty file"),
        (b"not an image at all", "not an image"),
        (data[: len(data) // 2], "truncated"),
        (encode(noise(), "PNG")[:-60], "truncated"),
    ):
        with pytest.raises(UserError, match=f"x.jpg: {words}; copy it again"):
            decoded(path, content)
    corrupt = bytearray(encode(noise(), "PNG"))
    corrupt[60] ^= 0xFF
    with pytest.raises(UserError, match="x.jpg: broken"):
        decoded(path, bytes(corrupt))
    with pytest.raises(UserError, match="no such file"):
        open_image(tmp_path / "absent.jpg")
    for make in (os.mkdir, os.mkfifo):  # opening a pipe would wait for ever
        make(tmp_path / make.__name__)
        with pytest.raises(UserError, match=f"{make.__name__}: not a file"):
            open_image(tmp_path / make.__name__)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="no such file"):
        open_image(tmp_path / "link.jpg")


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = noise("L" if mode == "L" else "RGB").convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decoded(tmp_path / "x.img", encode(image, kind)), expected)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    wide = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    image = Image.fromarray(wide)
    pixels = decoded(tmp_path / "x.png", encode(image, "PNG"))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    assert np.array_equal(decoded(tmp_path / "x.tif", encode(image, "TIFF")), pixels)
    rows = np.round(wide / 65535 * 255).astype(np.uint8)
    assert np.array_equal(pixels[..., 0], rows)
    path = tmp_path / "y.tif"
    path.write_bytes(encode(Image.fromarray(np.array([[1 << 20]], np.int32)), "TIFF"))
    with pytest.raises(UserError, match=r"y\.tif: pixels exceed 16 bits"):
        open_image(path)
    path.write_bytes(encode(Image.fromarray(np.array([[0.5]], np.float32)), "TIFF"))
    with pytest.raises(UserError, match=r"y\.tif: pixels are floats"):
        open_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_over_black(tmp_path, mode):
    image = noise(mode)
    pixels = decoded(tmp_path / "x.png", encode(image, "PNG")).astype(float)
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    assert np.abs(pixels - rgba[..., :3] * rgba[..., 3:] / 255).max() <= 1


def test_a_transparent_palette_colour_is_black(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 10, 20, 30])
    image.putpixel((1, 0), 1)
    pixels = decoded(tmp_path / "x.png", encode(image, "PNG", transparency=0))
    assert pixels.tolist() == [[[0, 0, 0], [10, 20, 30]]]


def test_exif_orientation_is_applied(tmp_path):
    image = noise(size=(8, 16))
    turns = {1: 0, 3: 180, 6: -90, 8: 90}
    for orientation, angle in turns.items():
        turned = image.rotate(angle, expand=True)
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = decoded(tmp_path / "x.png", encode(image, "PNG", exif=exif))
        assert np.array_equal(pixels, np.asarray(turned)), orientation


# What outside trials found


def raw_thermal(low: int, high: int) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 24 * 48).reshape(48, 24).astype(np.uint16))


def test_raw_thermal_counts_are_scaled_by_a_named_rule(tmp_path, monkeypatch):
    """B3: 14-bit counts in a 16-bit file were squeezed into a few grey levels without a word."""
    monkeypatch.setattr(images, "_warned", False)
    for name in ("a.png", "b.png", "c.tif"):
        raw_thermal(7000, 9000).save(tmp_path / name)
    with pytest.warns(UserWarning, match="intensity='minmax'") as caught:
        flat = [np.asarray(open_image(tmp_path / name)) for name in ("a.png", "b.png", "c.tif")]
    assert len(caught) == 1 and np.ptp(flat[0]) < 9
    counts = np.asarray(raw_thermal(7000, 9000)).astype(float)
    low, high = np.percentile(counts, (1, 99))
    for intensity, least, most in (
        ("minmax", 7000, 9000),
        ("percentile", low, high),
        ((6000, 10000), 6000, 10000),
        ([7500, 8000], 7500, 8000),
    ):
        expected = np.clip((counts - least) / (most - least) * 255, 0, 255)
        for name in ("a.png", "c.tif"):
            pixels = np.asarray(open_image(tmp_path / name, intensity)).astype(float)
            assert np.abs(pixels[..., 0] - expected).max() <= 0.51 and np.ptp(pixels) > 100
    for wrong in ("auto", (5,), (9000, 7000), (0, 70000), ("a", "b"), None):
        with pytest.raises(UserError, match="choose full"):
            open_image(tmp_path / "a.png", wrong)
    eight = noise()
    eight.save(tmp_path / "d.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "d.png", "minmax")), np.asarray(eight))


def test_the_full_range_is_no_reason_to_warn(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(images, "_warned", False)
    raw_thermal(100, 60000).save(tmp_path / "a.png")
    open_image(tmp_path / "a.png")
    assert not recwarn.list


def test_a_dead_pixel_is_no_range(tmp_path, monkeypatch):
    """B3: one count of 0 made the range of 23,000 to 24,000 look wide, and nothing was said."""
    monkeypatch.setattr(images, "_warned", False)
    counts = np.array(raw_thermal(23000, 24000))
    counts[5, 5] = 0
    Image.fromarray(counts).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="intensity='minmax'"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["full", "percentile", "7000,9000"])
def test_an_intensity_is_read_from_the_command_line(text):
    assert images.check_intensity(images.check_intensity(text)) == images.check_intensity(text)
    written = str(images.check_intensity(text))  # as in the provenance of feature files
    assert images.check_intensity(written) == images.check_intensity(text)
    with pytest.raises(UserError, match="LOW,HIGH"):
        images.check_intensity(text + ",1,2")


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("jfif", "JPEG"), ("jpe", "JPEG"), ("gif", "GIF"), ("ppm", "PPM"), ("pgm", "PPM"),
     ("jp2", "JPEG2000"), ("tga", "TGA"), ("avif", "AVIF"), ("webp", "WEBP")],
)  # fmt: skip
def test_unusual_names_of_images_are_read(tmp_path, suffix, kind):
    """B11: these were left out of a dataset, and only `extract` said so."""
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    path = tmp_path / f"x.{suffix}"
    noise("L" if suffix == "pgm" else "RGB").save(path, kind)
    assert images.is_image_name(path.name) and open_image(path).size == (24, 48)


def test_files_of_other_kinds_next_to_images_are_counted(tmp_path):
    """B11: what is left out is said by the dataset, not by `check` alone."""
    root = trees.sysu(tmp_path)
    (root / "cam1/0001/0009.heic").write_bytes(b"x")
    (root / "cam1/0001/Thumbs.db").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"1 file next to the images .* cam1/0001/0009\.heic"):
        open_dataset("sysu", root).train()


def test_postscript_behind_an_image_name_starts_no_program(tmp_path, monkeypatch):
    """D3: Pillow would start Ghostscript for it."""
    from PIL import EpsImagePlugin

    def start(*args, **kwargs):
        pytest.fail("Ghostscript was started")  # no Exception, which would be one line

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    noise().save(tmp_path / "x.eps")
    for name in ("x.jpg", "x.tga", "x.eps"):
        (tmp_path / name).write_bytes((tmp_path / "x.eps").read_bytes())
        with pytest.raises(UserError, match=f"{name}: (not an image|broken)"):
            open_image(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: f"./{line}",
        lambda line: f"/{line}",
        lambda line: line.replace("/", "//", 1),
        lambda line: f"RegDB/{line}",
        lambda line: f"{line} 1",
        lambda line: line.replace("/", "\\"),
    ],
    ids=["dot", "root", "double", "name", "column", "backslash"],
)
def test_regdb_lists_of_other_hands_are_read(roots, tmp_path, change):
    """C10: 320 faults, where the reference's reader takes them."""
    root = trees.regdb(tmp_path / "regdb")
    for index in (root / "idx").iterdir():
        index.write_text("".join(f"{change(x)}\n" for x in index.read_text().splitlines()))
    ours, plain = open_dataset("regdb", root), open_dataset("regdb", roots["regdb"])
    assert same_names(ours.fingerprint(), plain.fingerprint())


@pytest.mark.parametrize("name", NAMES)
def test_the_case_of_folders_does_not_matter(tmp_path, name):
    """C10: ``visible`` and ``thermal``, as some archives have them."""
    root, plain = trees.MAKERS[name](tmp_path / "a"), trees.MAKERS[name](tmp_path / "b")
    for folder in list(root.iterdir()):
        folder.rename(folder.with_name(folder.name.swapcase()))
    a, b = open_dataset(name, root), open_dataset(name, plain)
    assert [s[1:] for s in a.train()] == [s[1:] for s in b.train()]
    assert all(os.path.isfile(s.path) for s in a.train() + a.test("infrared"))
    report = check_dataset(name, root)
    assert report.usable and not [note for note in report.notes if note.kind == "stray"]


def test_an_archive_nested_twice_is_found(tmp_path):
    """C10: the advice was to copy it again."""
    trees.regdb(tmp_path / "RegDB/RegDB_01")
    with pytest.raises(UserError, match="did you mean .*RegDB/RegDB_01"):
        open_dataset("regdb", tmp_path)


def test_the_version_of_llcm_is_named(roots):
    counts = {part: dict(LLCM.expected[part]) for part in ("train", "test")}
    dataset = open_dataset("llcm", roots["llcm"])
    assert dataset.version(counts).startswith("the version of the paper")
    counts["test"]["infrared"] -= 100
    for words in ("adjusted after publication", "incomplete", "7,066 infrared in test"):
        assert words in dataset.version(counts)
    assert "neither" in check_dataset("llcm", roots["llcm"]).version
    assert open_dataset("sysu", roots["sysu"]).version(counts) == ""


class Corridor(ReidDataset):
    """One folder of images called IDENTITY-CAMERA-MODALITY-n.jpg; odd numbers are trained on."""

    name, title = "corridor", "a corridor"

    def _list(self, remainder):
        found = []
        for name in self._images("."):
            identity, camera, modality, _ = name.split("-")
            if int(identity[1:]) % 2 == remainder:
                found.append(Sample(self._path(name), identity, camera, modality))
        return sorted(found, key=lambda sample: sample.modality, reverse=True), []

    def list_train(self, split):
        return self._list(1)

    def list_test(self, split):
        return self._list(0)


def test_a_dataset_and_a_protocol_from_outside(tmp_path):
    for identity in range(6):
        for camera, modality in (("c1", "visible"), ("c2", "infrared")):
            for n in range(2):
                trees.write(tmp_path / f"p{identity}-{camera}-{modality}-{n}.jpg", modality)
    try:
        register_dataset(Corridor)
        row = Protocol("corridor", "infrared", "visible", "llcm", range(3))
        register_protocol("corridor-ir2vis", row)
        with pytest.raises(UserError, match="registered already"):
            register_protocol("corridor-ir2vis", row._replace(rule="regdb"))
        with pytest.raises(UserError, match="rule 'market': choose from sysu"):
            register_protocol("other", row._replace(rule="market"))
        dataset = open_dataset("corridor", tmp_path)
        samples = dataset.test("visible") + dataset.test("infrared")
        assert len(dataset.train()) == 12 and len(dataset.gallery("corridor-ir2vis", 2)) == 3
        features = np.eye(6)[[int(s.identity[1:]) for s in samples]]
        assert evaluate(features, samples, "corridor-ir2vis").mean["mAP"] == 1
        assert check_dataset("corridor", tmp_path).usable
        assert main(["check", "corridor", str(tmp_path)]) == 0
    finally:
        DATASETS.pop("corridor", None), PROTOCOLS.pop("corridor-ir2vis", None)


def test_another_modality_is_refused(tmp_path):
    """Its images were counted, and their protocol left out in silence."""

    class Odd(ReidDataset):
        name, title = "odd", "Odd"

        def list_test(self, split):
            return [Sample("a.jpg", 1, 1, "ir")], []

    with pytest.raises(UserError, match="a.jpg.*'ir'.*visible, infrared"):
        Odd(tmp_path).test()
