"""Images to rows: whatever the images are given as, in their order, equal to the reference's."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import socket
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, TensorDataset

import deen_zoo
from deen_zoo.cli import main
from deen_zoo.data import Sample, images
from deen_zoo.data.images import open_image
from deen_zoo.distributed import Distributed
from deen_zoo.errors import UserError
from deen_zoo.features import extractor as module
from deen_zoo.features.extractor import FeatureExtractor, extract, weights_sha256
from deen_zoo.features.files import read_feature_table
from deen_zoo.io import exclusive, sha256
from tests import forked, parity, seeded
from tests.reference import needs_official
from tests.test_distributed import launch

GOLDEN = Path(__file__).with_name("golden") / "descriptors.npz"
SIZE, STEP = (128, 64), 32
CHOICES = [("official", "all"), ("bn", "all"), ("pool", "all"), ("official", "original")]


def tiny(**options) -> FeatureExtractor:
    model = deen_zoo.create_model("test_deen_resnet", num_classes=0)
    seeded.fill(model)
    return FeatureExtractor(model, "cpu", **{"threads": 1, "batch_size": 5, **options})


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return tiny()


# The descriptor next to the reference's


def reference_rows(net, x) -> torch.Tensor:
    """feat + feat_flip of the reference's test.py, visible then infrared: (2N, 2, B, C)."""
    out = []
    for modal in (1, 2):
        with torch.no_grad():
            plain, mirrored = net(x, x, modal=modal), net(x.flip(3), x.flip(3), modal=modal)
        parts = [(a + b).view(3, len(x), -1) for a, b in zip(plain, mirrored, strict=True)]
        out.append(torch.stack(parts).permute(2, 0, 1, 3))
    return torch.cat(out)


def choose(rows, descriptor: str, branches: str):
    """Of (N, 2, B, C) what the options say."""
    kinds = {"official": [0, 1], "pool": [0], "bn": [1]}[descriptor]
    return rows[:, kinds][:, :, : 1 if branches == "original" else None].flatten(1)


@functools.cache
def ours(dataset: str) -> dict[tuple[str, str], torch.Tensor]:
    """Our rows by choice: two images as visible ones, then as infrared ones."""
    model = parity.ours(dataset, torch.float32)
    images = torch.cat([parity.images(SIZE).float()] * 2)
    infrared = torch.tensor([False, False, True, True])
    out = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "weights_sha256", lambda *_, **__: "")  # takes longer than the rows
        for d, b in CHOICES:
            name = "original" if b == "original" else d
            make = FeatureExtractor(model, "cpu", descriptor=name, normalize=False)
            out[d, b] = make(images, infrared)
    return out


@needs_official
@pytest.mark.parametrize("dataset", parity.MODELS)
def test_choices_equal_the_reference(dataset):
    net, _ = parity.theirs(dataset, torch.float32)
    wanted = reference_rows(net.eval(), parity.images(SIZE).float())
    for choice, got in ours(dataset).items():
        torch.testing.assert_close(got, choose(wanted, *choice), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dataset", parity.MODELS)
def test_choices_equal_golden_numbers(dataset):
    with np.load(GOLDEN) as stored:
        wanted = torch.from_numpy(stored[dataset]).float()  # every STEP-th of C
    for choice, got in ours(dataset).items():
        expected = choose(wanted, *choice)
        torch.testing.assert_close(got[:, ::STEP], expected, rtol=0, atol=1e-5)


def write_golden() -> None:
    nets = {dataset: parity.theirs(dataset, torch.float64)[0].eval() for dataset in parity.MODELS}
    rows = {dataset: reference_rows(net, parity.images(SIZE)) for dataset, net in nets.items()}
    np.savez_compressed(GOLDEN, **{k: v[..., ::STEP].numpy() for k, v in rows.items()})


# What may be given


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Images of many formats, modes and sizes, all different."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    out = []

    def save(name, image, **options):
        out.append(folder / f"{len(out):02}-{name}")
        image.save(out[-1], **options)

    def noise(height, width, *channels, dtype=np.uint8):
        high = np.iinfo(dtype).max
        coarse = rng.integers(0, high, (8, 4, *channels), dtype=dtype, endpoint=True)
        return np.kron(coarse, np.ones((height // 8, width // 4, *[1] * len(channels)), dtype))

    for name in ("rgb.jpg", "rgb.png", "rgb.bmp", "rgb.tif", "rgb.webp", "upper.JPEG"):
        height = int(rng.integers(2, 30)) * 8
        save(name, Image.fromarray(noise(height, int(rng.integers(2, 20)) * 4, 3)))
    for name in ("grey.jpg", "grey.png", "grey.bmp", "grey.tif"):
        save(name, Image.fromarray(noise(80, 40)))
    save("sixteen.png", Image.fromarray(noise(64, 64, dtype=np.uint16)))
    save("sixteen.tif", Image.fromarray(noise(128, 64, dtype=np.uint16)))
    save("palette.png", Image.fromarray(noise(64, 32, 3)).convert("P"))
    save("alpha.png", Image.fromarray(noise(64, 32, 4)))
    save("grey-alpha.png", Image.fromarray(noise(64, 32, 2)))
    save("one-bit.png", Image.fromarray(noise(64, 32)).convert("1"))
    save("cmyk.jpg", Image.fromarray(noise(64, 32, 3)).convert("CMYK"))
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.jpg", Image.fromarray(noise(40, 80, 3)), exif=exif)
    return out


def test_rows_are_in_input_order_for_any_number_of_threads(files, extractor):
    order = np.random.default_rng(1).permutation(len(files))
    paths = [files[i] for i in order]
    modality = [("visible", "infrared")[i % 2] for i in order]
    alone = torch.cat([extractor(path, kind) for path, kind in zip(paths, modality, strict=True)])
    assert torch.pdist(alone).min() > 1e-3  # no two images could be taken for each other
    rows = extractor(paths, modality)
    torch.testing.assert_close(rows, alone, rtol=0, atol=1e-5)
    for threads in (2, 4):
        torch.testing.assert_close(tiny(threads=threads)(paths, modality), rows, rtol=0, atol=0)


def test_images_in_memory_equal_their_files(files, extractor):
    wanted = extractor(files, "visible")
    in_memory: list = [Image.open(path) for path in files]
    in_memory[1] = np.asarray(in_memory[1])
    in_memory[7] = np.asarray(in_memory[7])
    in_memory[8] = np.asarray(in_memory[8])[..., None]
    in_memory[10] = np.asarray(in_memory[10])
    assert in_memory[10].dtype == np.uint16
    in_memory[13] = np.asarray(in_memory[13])
    torch.testing.assert_close(extractor(in_memory, "visible"), wanted, rtol=0, atol=0)
    assert extractor.table(in_memory, "visible").paths[:2] == ["image 0", "image 1"]
    four = np.stack([np.asarray(Image.open(files[1]).resize((32, 64)))] * 2)
    torch.testing.assert_close(extractor(four, "visible"), extractor(list(four), "visible"))


def test_folders_tables_samples_and_mixtures(files, extractor, tmp_path):
    folder = files[0].parent
    wanted = extractor(files, "infrared")
    table = extractor.table(folder, "infrared")
    assert table.paths == [str(path) for path in files]
    assert torch.equal(table.features, wanted) and table.labels["infrared"].all()
    csv = tmp_path / "own.csv"
    csv.write_text(
        f"path,identity,camera,modality\n{files[0]},7,3,infrared\n{files[1]},8,2,visible\n"
    )
    table = extractor.table([csv, Sample(str(files[2]), 9, 1, "infrared")])
    assert table.samples() == [
        Sample(str(files[0]), 7, 3, "infrared"),
        Sample(str(files[1]), 8, 2, "visible"),
        Sample(str(files[2]), 9, 1, "infrared"),
    ]
    torch.testing.assert_close(table.features[[0, 2]], wanted[[0, 2]], rtol=0, atol=1e-5)
    csv.write_text(f"path\n{files[0]}\n")
    assert torch.equal(extractor(csv, "infrared"), extractor(files[0], "infrared"))
    assert not extractor.table(csv, "auto").labels["infrared"].any()
    rows = extractor((path for path in [folder, files[3]]), "infrared")
    torch.testing.assert_close(rows[-1], wanted[3])


def test_preprocessed_tensors_and_loaders(files, extractor):
    modality = ["visible", "infrared"] * (len(files) // 2)
    wanted = extractor(files, modality)
    images, infrared = extractor.preprocess(files, modality)
    assert images.shape == (len(files), 3, *SIZE) and infrared.tolist() == [False, True] * 9
    torch.testing.assert_close(extractor(images, infrared), wanted, rtol=0, atol=1e-5)
    loader = DataLoader(TensorDataset(images, torch.zeros(len(files))), batch_size=4)
    visible = extractor(files, "visible")
    torch.testing.assert_close(extractor(loader, "visible"), visible, rtol=0, atol=1e-5)
    for each in (modality, infrared):  # one for each image, over all batches
        torch.testing.assert_close(extractor(loader, each), wanted, rtol=0, atol=1e-5)
    for count in (17, 19):
        with pytest.raises(UserError, match="modalities for .* images; give one for each"):
            extractor(loader, ["visible"] * count)
    double = extractor(images[:2].double(), "visible")
    torch.testing.assert_close(double, visible[:2], rtol=0, atol=1e-5)
    assert extractor(images[:0], "visible").shape == (0, extractor.dim)


def test_auto_takes_three_equal_channels_as_infrared(files, extractor, capsys):
    table = extractor.table(files, "auto")
    grey = ("grey", "sixteen", "one-bit")
    kinds = [path.name[3:].startswith(grey) for path in files]
    assert table.labels["infrared"].tolist() == kinds
    said = f"modality auto: {sum(kinds)} of {len(files)} images have three equal channels"
    assert said in capsys.readouterr().err
    named = ["infrared" if kind else "visible" for kind in kinds]
    assert torch.equal(table.features, extractor(files, named))
    assert "modality auto" not in capsys.readouterr().err


def test_options(files):
    unit = tiny()(files[:3], "visible")
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(3))
    half = tiny(dtype="float16")(files[:3], "visible")
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), unit, rtol=0, atol=1e-3)
    plain = tiny(flip=False)(files[:3], "visible")
    turned = [ImageOps.mirror(Image.open(path).convert("RGB")) for path in files[:3]]
    mirrored = tiny(flip=False)(turned, "visible")
    both = torch.nn.functional.normalize(plain + mirrored)
    torch.testing.assert_close(unit, both, rtol=0, atol=1e-5)
    mixed = tiny(precision="bfloat16")(files[:3], "visible")
    assert mixed.dtype == torch.float32 and 0 < (mixed - unit).abs().max() < 0.1


def test_rows_equal_a_plain_float_pipeline_to_the_bit(files):
    """uint8 batches normalised on the device are timm's transform, and the model's own call."""
    from timm.data import create_transform

    make = tiny(batch_size=64, normalize=False)
    preprocess = create_transform(**module.data_config(make.model))
    images = torch.stack([preprocess(open_image(path)) for path in files])
    images = images.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        wanted = make.model.forward_embedding(images, "infrared")
        wanted = wanted + make.model.forward_embedding(images.flip(3), "infrared")
    assert torch.equal(make(files, "infrared"), wanted)


@pytest.mark.parametrize(("precision", "count"), [("float32", 60), ("bfloat16", 16)])
def test_many_threads_share_one_extractor(files, precision, count):
    """B1: it gave other rows, and the batch norms learned, as eval and train were toggled."""
    make = tiny(precision=precision, threads=2)
    make.model.train()  # what a caller may have left it in
    make = FeatureExtractor(make.model, "cpu", precision, False, batch_size=5, threads=1)
    assert not make.model.training
    images = [(files[i % len(files)], ("visible", "infrared")[i % 3 == 0]) for i in range(count)]
    before, wanted = weights_sha256(make.model), {}
    for one in dict.fromkeys(images):
        wanted[one] = make(*one)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda one: make(*one), images))
    assert all(torch.equal(row, wanted[one]) for row, one in zip(rows, images, strict=True))
    assert weights_sha256(make.model) == before and not make.model.training


DAEMON = """
import json, multiprocessing, resource, sys
from deen_zoo import FeatureExtractor

def work(checkpoint, file):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    print(json.dumps(FeatureExtractor(checkpoint, "cpu")(file, "visible").tolist()), flush=True)

process = multiprocessing.get_context("fork").Process(target=work, args=sys.argv[1:], daemon=True)
process.start()
process.join()
"""


def test_a_daemonic_process_with_few_open_files(files, checkpoint):
    """A8: it asserted that daemons have no children, or hung on sockets and shared memory."""
    done = forked.run("-c", DAEMON, checkpoint, files[0])
    assert done.stdout, done.stderr
    rows = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(rows, FeatureExtractor(checkpoint, "cpu")(files[0], "visible"))


@pytest.mark.parametrize("nothing", [(), [], np.zeros((0, 8, 8, 3), np.uint8)])
def test_nothing_gives_no_rows(nothing, extractor):
    """C9: a frame without detections was an error."""
    assert extractor(nothing, "visible").shape == (0, extractor.dim)
    table = extractor.table(nothing, "auto")
    assert len(table) == 0 and table.features.shape == (0, extractor.dim)
    assert extractor.preprocess(nothing, "visible")[0].shape == (0, 3, *SIZE)
    if isinstance(nothing, (list, tuple)):
        assert extractor(nothing).shape == (0, extractor.dim)


def test_a_raw_thermal_sensor(tmp_path):
    """B3: counts of 14 bits in 16 were squeezed to almost one grey: all rows were the same."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(7000, 9000, (64, 32), dtype=np.uint16) for _ in range(4)]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    paths, spread = sorted(tmp_path.iterdir()), []
    for intensity in ("full", "percentile", (7000, 9000)):
        make = tiny(intensity=intensity)
        rows = make(paths, "infrared")
        assert torch.equal(make(arrays, "infrared"), rows)
        assert make.provenance["intensity"] == str(make.intensity)
        spread.append(float(torch.pdist(rows).min()))
    assert min(spread[1:]) > 5 * spread[0]
    with pytest.raises(UserError, match="intensity"):
        tiny(intensity="bright")


def test_arrays_of_three_deep_channels(monkeypatch):
    """B3: they were squeezed without a warning, and ``intensity`` was ignored."""
    counts = np.random.default_rng(0).integers(7000, 9000, (64, 32), dtype=np.uint16)
    grey = np.stack([counts] * 3, axis=2)
    for intensity in ("full", "minmax"):
        make = tiny(intensity=intensity)
        assert torch.equal(make([grey], "infrared"), make([counts], "infrared"))
    colour = grey + np.arange(3, dtype=np.uint16)
    with pytest.raises(UserError, match="image 0: 16 bits"):
        tiny(intensity="minmax")([colour], "infrared")
    monkeypatch.setattr(images, "_warned", False)
    with pytest.warns(UserWarning, match="image 0 holds 16-bit counts"):
        tiny()([colour], "infrared")


def test_a_model_in_training_mode_is_refused(files):
    """C: after ``model.train()`` rows were wrong, and the batch norms learned from the images."""
    make = tiny()
    before = make(files[:2], "visible")
    state = {name: value.clone() for name, value in make.model.state_dict().items()}
    make.model.train()
    with pytest.raises(UserError, match=r"model\.eval\(\)"):
        make(files[:2], "visible")
    assert all(torch.equal(value, state[name]) for name, value in make.model.state_dict().items())
    make.model.eval()
    assert torch.equal(make(files[:2], "visible"), before)


@pytest.mark.parametrize("label", [1.2, True, 2**63, None])
def test_a_label_that_is_none_is_said_before_the_work(label, files, extractor):
    """B2: 1.2 was identity 1, and 2**63 an OverflowError after the work."""
    sample = Sample(str(files[0]), label, 1, "visible")
    with pytest.raises(UserError, match="whole number of 64 bits"):
        extractor.table([Sample("absent.png", 1, 1, "visible"), sample])


def test_files_that_are_no_images_are_counted(files, extractor, tmp_path, capsys):
    """B11: ``extract`` alone counted them; whoever searched a folder did not hear of them."""
    os.link(files[0], tmp_path / files[0].name)
    for name in ("a.heic", "b.heic", "c.webp2", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    for take in (extractor, extractor.table, extractor.preprocess):
        take(tmp_path, "visible")
        err = capsys.readouterr().err
        assert err.count("left out") == 1 and "2 .heic, 1 .webp2" in err


def test_identities_may_be_words(files, extractor, tmp_path):
    """C9: only integers could be stored."""
    samples = [
        Sample(str(files[0]), "ann", "roof", "visible"),
        Sample(str(files[1]), 7, 1, "infrared"),
        Sample(str(files[2]), -1, -1, "infrared"),
    ]
    parquet = ["f.parquet"] * bool(importlib.util.find_spec("pyarrow"))
    for name in ("f.safetensors", "f.npz", *parquet):
        table = extractor.write(samples, tmp_path / name, shard=2)
        assert table.labels["identity"].tolist() == ["ann", "7", ""]
        assert table.labels["camera"].tolist() == ["roof", "1", ""]


def test_weights_that_give_no_numbers(files, tmp_path):
    """B7: such rows were written."""
    make = tiny()
    make.model.bottleneck.running_mean[3] = float("nan")
    for call in (lambda: make(files[:2], "visible"), lambda: make.table(files[:2], "visible")):
        with pytest.raises(UserError, match=f"{files[0].name}.*NaN"):
            call()


def test_the_classifier_does_not_change_the_digest_of_the_rows():
    """B13: the same weights with num_classes=0 were other weights."""
    with_classes, without = (
        deen_zoo.create_model("test_deen_resnet", num_classes=n) for n in (4, 0)
    )
    state = {k: v for k, v in with_classes.state_dict().items() if not k.startswith("classifier")}
    without.load_state_dict(state)
    a, b = (FeatureExtractor(model, "cpu").provenance for model in (with_classes, without))
    assert a["descriptor_sha256"] == b["descriptor_sha256"]
    assert a["weights_sha256"] != b["weights_sha256"]


def test_models_by_name_and_folder(files, tmp_path):
    torch.manual_seed(0)
    made = FeatureExtractor("test_deen_resnet", "cpu", pretrained=False)
    deen_zoo.save_pretrained(made.model, tmp_path / "checkpoint")
    again = FeatureExtractor(tmp_path / "checkpoint", "cpu")
    assert again.provenance == made.provenance
    assert torch.equal(again(files[0], "visible"), made(files[0], "visible"))
    digest = sha256(tmp_path / "checkpoint" / "model.safetensors")
    assert weights_sha256(made.model) == digest == again.provenance["weights_sha256"]


def test_extract_gives_the_raw_official_descriptor(files):
    samples = [
        Sample(str(path), 1, 1, ("visible", "infrared")[i % 2]) for i, path in enumerate(files)
    ]
    make = tiny(normalize=False)
    rows = extract(make.model, samples, Distributed(torch.device("cpu")), batch_size=5, threads=1)
    assert torch.equal(rows, make(samples))
    samples += [Sample("absent.jpg", 1, 1, "visible")]
    with pytest.raises(UserError, match="absent.jpg: "):
        extract(make.model, samples, Distributed(torch.device("cpu")), threads=1)


HALF_NAN = torch.tensor([0.0, float("nan")]).view(2, 1, 1, 1).expand(2, 3, 128, 64)
WRONG = [
    (lambda f: f, None, "no modality; say 'visible', 'infrared' or 'auto'"),
    (lambda f: f, "thermal", "modality 'thermal'; say 'visible', 'infrared' or"),
    (lambda f: f, 1, "modality 1; say"),
    (lambda f: f, ["visible"], "1 modalities for 18 images"),
    (lambda f: Sample(str(f[0]), 1, 1, "visible"), "infrared", "says otherwise"),
    (lambda f: torch.rand(2, 3, 128, 64) * 255, "visible", "image 0 of the batch .*normalised"),
    (lambda f: HALF_NAN, "visible", "image 1 of the batch"),
    (lambda f: 3, "visible", "a int is no source of images"),
    (lambda f: torch.zeros(1, 3, 128, 64, dtype=torch.uint8), "visible", "float"),
    (lambda f: torch.zeros(3, 128, 64), "visible", r"a batch of \(3, 128, 64\) torch"),
    (lambda f: torch.zeros(2, 1, 128, 64), "visible", r"tensors \(N, 3, H, W\)"),
    (lambda f: torch.zeros(1, 3, 128, 64), "auto", "say which it is"),
    (lambda f: np.zeros((8, 8, 3)), "visible", r"image 0: an array \(8, 8, 3\)"),
    (lambda f: np.zeros((8, 8, 2), np.uint8), "visible", "image 0: an array"),
    (lambda f: np.zeros((0, 5, 3), np.uint8), "visible", "image 0: no pixels, 0 x 5"),
    (lambda f: [f[0], "absent.jpg"], "visible", "absent.jpg: "),
    (lambda f: [torch.zeros(3, 8, 8)], "visible", "a Tensor is no source"),
]


@pytest.mark.parametrize(("source", "modality", "message"), WRONG)
def test_mistakes(source, modality, message, files, extractor):
    with pytest.raises(UserError, match=message):
        extractor(source(files), modality)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"descriptor": "mean"}, "descriptor 'mean': choose from official, bn, pool"),
        ({"branches": "original"}, "descriptor='original'"),
        ({"optimize": True}, "engine='openvino'"),
        ({"size": 3}, "no such option"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"precision": "half"}, "precision 'half'"),
        ({"batch_size": 0}, "batch_size 0: give 1 or more"),
        ({"threads": 0}, "threads 0: give 1 or more"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_an_empty_folder(extractor, tmp_path):
    with pytest.raises(UserError, match="no image"):
        extractor(tmp_path, "visible")


# Files: bad ones, parts, processes


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says that size, whatever its data."""

    def chunk(kind, body):
        check = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + check

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_bad_files(folder: Path) -> list[Path]:
    """Thirty kinds of file that are called an image and cannot be read as one."""
    rng, whole = np.random.default_rng(0), {}
    pixels = Image.fromarray(rng.integers(0, 256, (96, 48, 3), dtype=np.uint8))
    for suffix in ("jpg", "png", "bmp", "tif", "webp"):
        pixels.save(folder / f"whole.{suffix}")
        whole[suffix] = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"whole.{suffix}").unlink()
    contents = {
        "empty.jpg": b"",
        "zeros.jpg": bytes(4096),
        "noise.png": rng.bytes(4096),
        "text.jpg": b"this is no image\n" * 9,
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "archive.png": b"PK\x03\x04" + bytes(60),
        "document.jpg": b"%PDF-1.7\n" + bytes(60),
        "movie.jpg": b"\0\0\0\x18ftypmp42" + bytes(60),
        "phone.jpg": b"\0\0\0\x18ftypheic" + bytes(60),
        "pickle.png": b"\x80\x04\x95" + bytes(60),
        "array.png": b"\x93NUMPY\x01\0" + bytes(60),
        "one-byte.bmp": b"B",
        "signature.png": whole["png"][:8],
        "no-data.png": png(48, 96),
        "short-data.png": png(48, 96, bytes(99)),
        "flat.png": png(0, 96),
        "bomb.png": png(60_000, 60_000),
        "checksum.png": whole["png"][:20] + b"\xff" + whole["png"][21:],
        "start.jpg": whole["jpg"][:2],
        "header.jpg": whole["jpg"][:200],
        "half.jpg": whole["jpg"][: len(whole["jpg"]) // 2],
        "half.png": whole["png"][: len(whole["png"]) // 2],
        "half.bmp": whole["bmp"][: len(whole["bmp"]) // 2],
        "half.tif": whole["tif"][: len(whole["tif"]) // 2],
        "half.webp": whole["webp"][: len(whole["webp"]) // 2],
        "header.bmp": whole["bmp"][:30],
        "header.webp": whole["webp"][:20],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    floats = Image.fromarray(np.ones((9, 9), np.float32))
    floats.save(folder / "floats.tif")
    Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(folder / "deep.tif")
    os.symlink(folder / "gone", folder / "dangling.jpg")
    os.symlink(folder / "circle.jpg", folder / "circle.jpg")
    os.mkfifo(folder / "pipe.jpg")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket may have 107 bytes
    server.bind("socket.jpg")
    os.chdir(here)
    server.close()
    names = [*contents, "floats.tif", "deep.tif", "dangling.jpg", "circle.jpg", "pipe.jpg"]
    return [folder / name for name in [*names, "socket.jpg"]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    model = deen_zoo.create_model("test_deen_resnet", num_classes=4)
    seeded.fill(model)
    return str(deen_zoo.save_pretrained(model, tmp_path_factory.mktemp("model")))


def test_every_bad_file_is_named_and_every_good_row_is_there(files, checkpoint, tmp_path, capsys):
    folder = tmp_path / "images"
    (folder / "good").mkdir(parents=True)
    good = [folder / "good" / path.name for path in files]
    for link, path in zip(good, files, strict=True):
        os.link(path, link)
    bad = write_bad_files(folder)
    assert len(bad) >= 30
    (folder / "notes.txt").write_text("no image by its name")
    out = tmp_path / "f.safetensors"
    arguments = ["extract", str(folder), "-o", str(out), "--model", checkpoint]
    arguments += ["--modality", "visible", "--threads", "2", "--json"]
    assert main(arguments) == 1
    stdout, stderr = capsys.readouterr()
    table = read_feature_table(out)
    assert table.paths == [str(path) for path in good]
    make = FeatureExtractor(checkpoint, "cpu", threads=1)
    torch.testing.assert_close(table.features, make(good, "visible"), rtol=0, atol=1e-5)
    assert set(table.unreadable) == {str(path) for path in bad}
    named = [line for line in stderr.splitlines() if line.startswith("unreadable: ")]
    assert len(named) == len(bad)
    assert all(any(f"{path}: " in line for line in named) for path in bad)
    assert json.loads(stdout)["rows"] == len(good)
    assert "1 .txt" in stderr
    (folder / "good").rename(tmp_path / "elsewhere")
    assert main(arguments) == 2
    assert "none of the images" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_file_equals_the_rows(suffix, files, extractor, tmp_path):
    modality = ["visible", "infrared"] * (len(files) // 2)
    file = tmp_path / f"f.{suffix}"
    table = extractor.write(files, file, modality, shard=7)
    assert torch.equal(table.features, extractor(files, modality))
    assert table.paths == [str(path) for path in files]
    assert table.labels["infrared"].tolist() == [False, True] * 9
    assert "identity" not in table.labels and table.provenance == extractor.provenance
    assert os.listdir(tmp_path) == [file.name]


def same(*files: Path) -> bool:
    """Whether two files hold the same; the order of the metadata in them is accidental."""
    a, b = map(read_feature_table, files)
    labels = {name: values.tolist() for name, values in b.labels.items()}
    return (
        torch.equal(a.features, b.features)
        and (a.paths, a.provenance, a.unreadable) == (b.paths, b.provenance, b.unreadable)
        and {name: values.tolist() for name, values in a.labels.items()} == labels
    )


def killed_at(part: int, extractor, source, file: Path) -> None:
    """An extraction in parts of four that is killed while it writes that part."""
    write = module.write_feature_table

    def killed(path, *arguments, **options):
        if Path(path).name.startswith(f"{part:07}-"):
            Path(f"{path}.partial").write_bytes(b"half a part")
            raise KeyboardInterrupt
        write(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_feature_table", killed)
        with pytest.raises(KeyboardInterrupt):
            extractor.write(source, file, "visible", shard=4)


@pytest.fixture
def mine(files, tmp_path) -> list[Path]:
    """Twelve images that a test may change."""
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for i, path in enumerate(paths):
        Image.open(files[i % 3]).convert("RGB").save(path)
    return paths


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The images that are decoded."""
    found: list[int] = []

    def counted(source, index, *arguments, get=module.ImageList.decode, **options):
        found.append(index)
        return get(source, index, *arguments, **options)

    monkeypatch.setattr(module.ImageList, "decode", counted)
    return found


def test_a_killed_extraction_goes_on(files, extractor, tmp_path, decoded, capsys):
    whole = extractor.write(files, tmp_path / "whole.safetensors", "visible", shard=4)
    file = tmp_path / "f.safetensors"
    killed_at(2, extractor, files, file)
    assert not file.exists()
    decoded.clear()
    table = extractor.write(files, file, "visible", shard=4)
    assert sorted(decoded) == list(range(8, len(files)))
    assert "2 of 5 parts" in capsys.readouterr().err
    assert table.paths == whole.paths and torch.equal(table.features, whole.features)
    assert sorted(os.listdir(tmp_path)) == ["f.safetensors", "whole.safetensors"]
    assert same(file, tmp_path / "whole.safetensors")


def test_names_that_no_file_can_have(files, extractor, tmp_path):
    """A CSV file may hold any characters: the image is named, the others have their rows."""
    table = tmp_path / "images.csv"
    table.write_text(f"path,modality\n{files[0]},visible\na\0b.png,visible\n")
    made = extractor.write(table, tmp_path / "f.safetensors")
    assert len(made) == 1 and list(made.unreadable) == [str(tmp_path / "a\0b.png")]


def test_parts_of_other_options_or_images_are_not_used(files, extractor, tmp_path):
    file = tmp_path / "f.safetensors"
    killed_at(2, extractor, files, file)
    bn = tiny(descriptor="bn")
    assert torch.equal(bn.write(files, file, "visible", shard=4).features, bn(files, "visible"))


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_a_damaged_part_alone_is_made_again(damage, files, extractor, tmp_path, decoded):
    """A4: all finished parts were deleted."""
    file = tmp_path / "f.safetensors"
    killed_at(3, extractor, files, file)
    (part,) = (tmp_path / "f.safetensors.parts").glob("0000001-*.safetensors")
    part.write_bytes(part.read_bytes()[:300] if damage is None else damage)
    decoded.clear()
    table = extractor.write(files, file, "visible", shard=4)
    assert sorted(decoded) == [*range(4, 8), *range(12, len(files))]
    assert torch.equal(table.features, extractor(files, "visible"))


def test_a_file_replaced_between_kill_and_resume_is_read_again(files, mine, extractor, tmp_path):
    """B6: its old row stayed, or the old complaint that it is broken."""
    good = mine[1].read_bytes()
    mine[1].write_bytes(b"broken")
    file = tmp_path / "f.safetensors"
    killed_at(2, extractor, mine, file)
    mine[1].write_bytes(good)
    Image.open(files[5]).convert("RGB").save(mine[6])
    table = extractor.write(mine, file, "visible", shard=4)
    assert not table.unreadable and torch.equal(table.features, extractor(mine, "visible"))


def test_an_image_that_can_be_read_after_all_is_read(files, mine, extractor, tmp_path, decoded):
    """B6: after ``chmod`` size and time were the old ones, and the complaint stayed."""
    good, times = mine[1].read_bytes(), os.stat(mine[1])
    for path in (mine[1], mine[5]):
        path.write_bytes(bytes(len(path.read_bytes())))
    os.utime(mine[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    file = tmp_path / "f.safetensors"
    killed_at(2, extractor, mine, file)
    mine[1].write_bytes(good)
    os.utime(mine[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    decoded.clear()
    table = extractor.write(mine, file, "visible", shard=4)
    assert sorted(decoded) == [*range(4), *range(8, 12)]  # 5.png is as broken as it was
    assert list(table.unreadable) == [str(mine[5])] and len(table) == 11


def test_a_second_extraction_to_the_same_file_is_refused(files, extractor, tmp_path):
    """A9: both ran, and one was overwritten or failed obscurely."""
    file = tmp_path / "f.safetensors"
    held = exclusive(tmp_path / "f.safetensors.parts" / "lock", "it")
    with held, pytest.raises(UserError, match=r"f\.safetensors"):
        extractor.write(files, file, "visible")
    assert len(extractor.write(files, file, "visible")) == len(files)


def test_no_more_rows_in_memory_than_of_one_part(files, tmp_path, monkeypatch):
    make, write, live = tiny(), module.write_feature_table, []

    def watch(*arguments, **options):
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor and t.dim() == 2 and t.shape[1] == make.dim
        }
        live.append(sum(storages.values()) / (4 * make.dim))
        write(*arguments, **options)

    folder = tmp_path / "images"
    folder.mkdir()
    for copy in range(48):
        os.link(files[1], folder / f"{copy}.png")
    monkeypatch.setattr(module, "write_feature_table", watch)
    for count in (16, 48):
        live.clear()
        make.write(sorted(folder.iterdir())[:count], tmp_path / "f.npz", "visible", shard=8)
        assert len(live) == count // 8 + 1
        assert 8 <= max(live) <= 8 + 2 * make.batch_size  # a part, and the batch on its way


def test_what_cannot_be_written(files, extractor, tmp_path):
    """A7: a folder as the output was found after all the work."""
    (tmp_path / "folder.safetensors").mkdir()
    for source, name, message in (
        (files, "f.pt", "give .safetensors"),
        ([Image.open(files[0])], "f.npz", "image 0 is in memory"),
        ([files[0], files[0]], "f.npz", "comes twice"),
        (files, "", "is a folder|unknown kind"),
        (files, "folder.safetensors", "is a folder"),
        (files, "absent/f.safetensors", "no folder"),
        ((), "f.safetensors", "no image"),
    ):
        with pytest.raises(UserError, match=message):
            extractor.write(source, tmp_path / name, "visible")
    assert os.listdir(tmp_path) == ["folder.safetensors"]


def test_command_on_layouts(llcm_tree, checkpoint, tmp_path, capsys):
    raw, own = tmp_path / "raw.safetensors", tmp_path / "own.npz"
    common = ["--model", checkpoint, "--threads", "1"]
    arguments = ["extract", str(llcm_tree), "--layout", "llcm", "--raw", "-o", str(raw)]
    assert main([*arguments, *common]) == 0
    table = read_feature_table(raw)
    samples = deen_zoo.data.open_dataset("llcm", llcm_tree)
    assert table.samples() == samples.test("visible") + samples.test("infrared")
    assert "rows of 768 numbers, 0 images unreadable" in capsys.readouterr().out
    assert main(["evaluate", str(raw), "--protocol", "llcm-ir2vis", "--json"]) == 0
    assert "note:" not in capsys.readouterr().err
    person = [s for s in table.samples() if s.identity == table.samples()[0].identity]
    for sample in person:
        place = tmp_path / "tree" / sample.modality / str(sample.identity)
        place.mkdir(parents=True, exist_ok=True)
        os.link(sample.path, place / Path(sample.path).name)
    arguments = ["extract", str(tmp_path / "tree"), "--layout", "own", "-o", str(own)]
    assert main([*arguments, *common]) == 0
    assert len(read_feature_table(own).samples()) == len(person)
    capsys.readouterr()
    assert main(["evaluate", str(own), "--protocol", "own-ir2vis", "--json"]) == 0
    assert "L2-normalised" in capsys.readouterr().err
    arguments = ["extract", "a", "b", "--layout", "own", "-o", str(own)]
    assert main([*arguments, *common]) == 2
    assert "takes one root, not 2" in capsys.readouterr().err
    assert main(["extract", "a", "--split", "2", "-o", str(own), *common]) == 2
    assert "--split" in capsys.readouterr().err  # it did nothing


@pytest.mark.slow
def test_two_processes_write_the_same_file(files, checkpoint, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for copy in range(60):
        file = files[copy % len(files)]
        os.link(file, folder / f"{copy:03}{file.suffix}")
    code = (
        "import sys, torch\n"
        "from deen_zoo.distributed import join\n"
        "from deen_zoo.features.extractor import FeatureExtractor\n"
        "with join(torch.device('cpu')) as world:\n"
        "    make = FeatureExtractor(sys.argv[1], 'cpu', threads=1, batch_size=5)\n"
        "    make.write(sys.argv[2], sys.argv[3], 'visible', world, shard=10)\n"
    )
    two, one = tmp_path / "two.safetensors", tmp_path / "one.safetensors"
    launch("-c", code, checkpoint, folder, two)
    done = forked.run("-c", code, checkpoint, folder, one)
    assert done.returncode == 0, done.stderr
    assert same(two, one)


if __name__ == "__main__":
    write_golden()
