"""Other people's packages, unedited, on this package's models and files: see docs/clients.md.

Each is skipped where it is not installed; ``pip install '.[clients]'`` brings most of them, and the
table says what else there is.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import deen_zoo
from deen_zoo.data.images import open_image
from deen_zoo.export import export_model
from deen_zoo.features import FeatureTable, read_feature_table, write_feature_table
from deen_zoo.search import search

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def model() -> deen_zoo.models.ReidModel:
    return deen_zoo.create_model("test_deen_resnet", pretrained=True).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 128, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def crops(llcm_tree, tmp_path_factory) -> list[str]:
    """Infrared crops of the model's own size as PNG files: resizing leaves them as they are."""
    folder = tmp_path_factory.mktemp("crops")
    for i, path in enumerate(sorted((llcm_tree / "test_nir").rglob("*.jpg"))[:6]):
        open_image(path).resize((64, 128)).save(folder / f"{i}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def rows(model, crops) -> np.ndarray:
    """What the extractor gives for ``crops``: (6, D)."""
    return deen_zoo.FeatureExtractor(model, "cpu")(crops, modality="infrared").numpy()


@pytest.fixture(scope="module")
def tables(tmp_path_factory, llcm_tree) -> tuple[Path, Path]:
    """Feature files of the visible and of the infrared test images, with their labels."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("tables")
    extractor = deen_zoo.FeatureExtractor("test_deen_resnet", "cpu")
    dataset = deen_zoo.data.open_dataset("llcm", llcm_tree)
    for modality in ("visible", "infrared"):
        table = extractor.table(dataset.test(modality))
        write_feature_table(folder / f"{modality}.parquet", [table])
        write_feature_table(folder / f"{modality}.safetensors", [table])
    return folder / "visible.parquet", folder / "infrared.parquet"


def exact(tables: tuple[Path, Path], k: int = 1) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """Gallery rows, query rows, and the paths of the exact search's k first hits."""
    gallery, queries = (read_feature_table(file) for file in tables)
    hits = search(queries, gallery, k).indices.tolist()
    paths = [[gallery.paths[i] for i in row] for row in hits]
    return gallery.features.numpy(), queries.features.numpy(), paths


# the model in other people's loops


def test_transformers_trains_and_gives_it_back(crops, tmp_path) -> None:
    """C2: Trainer fine-tunes the folder; what it saves opens here and in timm, with its rows."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    start = deen_zoo.create_model(
        "test_deen_resnet", pretrained=True, num_classes=3, modality="infrared"
    )
    folder = deen_zoo.save_pretrained(start, tmp_path / "start")
    client = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor([open_image(path) for path in crops], return_tensors="pt")["pixel_values"]
    data = [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(pixels)]
    settings = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=3, learning_rate=0.01,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(client, settings, train_dataset=data)
    assert np.isfinite(trainer.train().training_loss)
    trainer.save_model(tmp_path / "tuned")

    client.eval()
    with torch.inference_mode():
        wanted = client(pixels).logits
        assert (wanted - start.eval()(pixels)).abs().max() > 1e-3  # it has learnt
        for load in (timm.create_model, deen_zoo.create_model):
            ours = load(f"local-dir:{tmp_path / 'tuned'}", pretrained=True).eval()
            torch.testing.assert_close(ours(pixels, "infrared"), wanted)
            torch.testing.assert_close(ours(pixels), wanted)  # the modality has come along


def test_transformers_pipelines(crops, tmp_path) -> None:
    """AutoModel and the pipelines give the model's own numbers, from the files themselves."""
    transformers = pytest.importorskip("transformers")
    model = deen_zoo.create_model("test_deen_resnet", pretrained=True, modality="infrared").eval()
    folder = str(deen_zoo.save_pretrained(model, tmp_path / "folder"))
    pixels = torch.stack([to_pixels(path) for path in crops])
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(pixels), pre_logits=True)
        scores = model(pixels).softmax(1)
    ask = transformers.pipeline("image-feature-extraction", model=folder, pool=True)
    np.testing.assert_allclose(np.squeeze(ask(crops)), features, atol=1e-5)
    ask = transformers.pipeline("image-classification", model=folder, top_k=1)
    for (answer,), row in zip(ask(crops), scores, strict=True):
        assert answer["label"] == f"LABEL_{int(row.argmax())}"
        assert answer["score"] == pytest.approx(float(row.max()), abs=1e-5)
    client = transformers.AutoModel.from_pretrained(folder)
    client.save_pretrained(tmp_path / "back")  # without the classifier
    for load in (timm.create_model, deen_zoo.create_model):
        back = load(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
        assert back.num_classes == 0
        with torch.inference_mode():
            torch.testing.assert_close(back(pixels), features)
    fresh = deen_zoo.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True, num_classes=7)
    assert fresh.num_classes == 7 and torch.equal(fresh.bottleneck.weight, back.bottleneck.weight)


def to_pixels(path: str) -> torch.Tensor:
    """(3, H, W) by torchvision, in one line: the crops are of the model's size."""
    from torchvision.transforms.v2 import functional as F

    return F.normalize(F.to_dtype(F.pil_to_tensor(Image.open(path)), scale=True), MEAN, STD)


def test_pytorch_metric_learning(model, images) -> None:
    """Its inference model and its loss on the single-input module."""
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.utils.inference import InferenceModel

    trunk = model.for_modality("infrared")
    wanted = trunk(images)
    client = InferenceModel(trunk, normalize_embeddings=False)
    torch.testing.assert_close(client.get_embeddings(images), wanted.detach())
    client.train_knn(images)
    _, indices = client.get_nearest_neighbors(images, k=1)
    assert indices.flatten().tolist() == [0, 1, 2, 3]
    labels = [0, 0, 1, 1]
    loss = TripletMarginLoss(margin=1.0)(wanted, torch.tensor(labels))
    apart = torch.cdist(wanted, wanted)
    triplets = [(a, p, n) for a in range(4) for p in range(4) for n in range(4)
                if a != p and labels[a] == labels[p] != labels[n]]  # fmt: skip
    slow = torch.stack([apart[a, p] - apart[a, n] + 1 for a, p, n in triplets])
    assert len(triplets) == 8 and slow.min() > 0
    torch.testing.assert_close(loss, slow.mean(), rtol=1e-4, atol=1e-5)


def test_open_metric_learning(model, crops, rows) -> None:
    """Its dataset, inference and retrieval, from files to the ranked gallery."""
    pytest.importorskip("oml")
    import pandas as pd
    from oml.datasets import ImageQueryGalleryLabeledDataset
    from oml.inference import inference
    from oml.retrieval import RetrievalResults

    query = np.arange(len(crops)) < 2
    frame = pd.DataFrame({"path": crops, "label": [0, 1, 0, 1, 0, 1], "split": "validation",
                          "is_query": query, "is_gallery": ~query})  # fmt: skip
    dataset = ImageQueryGalleryLabeledDataset(frame)
    got = inference(model.for_modality("infrared"), dataset, batch_size=4)
    np.testing.assert_allclose(got, rows, atol=1e-5)
    found = RetrievalResults.from_embeddings(got, dataset, n_items=4)
    order = (-rows[:2] @ rows[2:].T).argsort(1)
    assert [ids.tolist() for ids in found.retrieved_ids] == order.tolist()


def test_wildlife_tools(model, crops, rows) -> None:
    """Its dataset, feature extractor, similarity and classifier (with pandas below 3)."""
    pytest.importorskip("wildlife_tools")
    import pandas as pd
    from torchvision.transforms import Compose, Normalize, ToTensor
    from wildlife_tools.data import WildlifeDataset
    from wildlife_tools.features import DeepFeatures
    from wildlife_tools.inference import KnnClassifier
    from wildlife_tools.similarity import CosineSimilarity

    frame = pd.DataFrame({"path": crops, "identity": list("ababab")})
    dataset = WildlifeDataset(frame, transform=Compose([ToTensor(), Normalize(MEAN, STD)]))
    got = DeepFeatures(model.for_modality("infrared"), num_workers=0)(dataset)
    np.testing.assert_allclose(got, rows, atol=1e-5)
    similarity = CosineSimilarity()(got[:2], got[2:])["cosine"]
    np.testing.assert_allclose(similarity, rows[:2] @ rows[2:].T, atol=1e-5)
    found = KnnClassifier(k=1, database_labels=np.array(list("cdef")))(similarity)
    assert found.tolist() == ["cdef"[i] for i in (rows[:2] @ rows[2:].T).argmax(1)]


def side_by_side(crops: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A video frame in BGR order with the crops next to each other, and their boxes."""
    frame = np.concatenate([np.asarray(Image.open(path)) for path in crops], 1)[..., ::-1].copy()
    left = 64 * np.arange(len(crops))
    bottom = np.full_like(left, 128)
    return frame, np.stack([left, 0 * left, left + 64, bottom], 1).astype(np.float32)


def test_roboflow_reid(model, crops, rows, llcm_tree) -> None:
    """Its one class, on files and on the detections of a frame; it has no LANCZOS."""
    pytest.importorskip("reid")
    import supervision
    from reid import Interpolation, ReIDModel, ReIDPreprocessing

    night = model.for_modality("infrared")

    def made(**options):
        size = ReIDPreprocessing(input_size=(128, 64), **options)
        return ReIDModel.from_pretrained(architecture=night, preprocessing=size, device="cpu")

    files = sorted(map(str, (llcm_tree / "test_nir").rglob("*.jpg")))
    wanted = deen_zoo.FeatureExtractor(model, "cpu")(files, modality="infrared").numpy()
    cubic = made(interpolation=Interpolation.BICUBIC)
    cosine = (cubic.extract_embeddings_from_paths(files) * wanted).sum(1)
    linear = (made().extract_embeddings_from_paths(files) * wanted).sum(1)
    assert linear.min() < 0.998 < cosine.min()
    client = made()
    np.testing.assert_allclose(client.extract_embeddings_from_paths(crops), rows, atol=1e-5)
    frame, boxes = side_by_side(crops)
    got = client.extract_embeddings(supervision.Detections(xyxy=boxes), frame)
    np.testing.assert_allclose(got, rows, atol=1e-5)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_boxmot(suffix, model, crops, rows, llcm_tree, tmp_path, monkeypatch, capfd) -> None:
    """Its re-identification backend and a tracker, from an exported file with its sidecar."""
    boxmot = pytest.importorskip("boxmot")
    from boxmot.reid.core import ReID

    monkeypatch.chdir(tmp_path)
    file = f"night{suffix}"
    export_model(model, file, modality="infrared")
    bare = ReID(file, device="cpu").model  # without the sidecar
    in_graph = suffix == ".onnx"
    assert (bare.input_shape == (128, 64)) is in_graph
    assert ("overrides" in capfd.readouterr().err) is in_graph  # a warning
    code = sidecar_of_the_docs()
    exec(code.replace("night.onnx", file), {})
    assert Path(f"{file}.metadata.json").exists()
    frame, boxes = side_by_side(crops)
    client = ReID(file, device="cpu")
    assert client.model.model_kwargs["img_size"] == (128, 64)  # read from the sidecar
    np.testing.assert_allclose(client(frame, boxes=boxes), rows, atol=1e-4)
    tracker = boxmot.BotSort(reid_weights=Path(file), device="cpu", half=False)
    detections = np.concatenate([boxes, np.tile([0.9, 0], (len(boxes), 1))], 1)
    for _ in range(3):
        tracks = tracker.update(detections, frame)
    assert len(set(tracks[:, 4])) == len(crops)
    check_resizing(client, model, llcm_tree)


def check_resizing(client: Any, model: torch.nn.Module, tree: Path) -> None:
    """How far bilinear resizing moves the rows: the figures of docs/deploy.md."""
    paths = sorted(map(str, (tree / "test_nir").rglob("*.jpg")))
    ours = deen_zoo.FeatureExtractor(model, "cpu")(paths, modality="infrared").numpy()
    theirs = []
    for path in paths:
        frame = np.asarray(open_image(path).convert("RGB"))[..., ::-1].copy()
        box = np.array([[0, 0, frame.shape[1], frame.shape[0]]], np.float32)
        theirs.append(client(frame, boxes=box)[0])
    cosines = ours @ np.stack(theirs).T
    same = cosines.diagonal()
    others = cosines[~np.eye(len(paths), dtype=bool)]
    assert len(paths) == 28 and (cosines.argmax(1) == np.arange(28)).all()
    assert [same.mean(), same.min()] == pytest.approx([0.997, 0.991], abs=0.004)
    assert others.max() == pytest.approx(0.976, abs=0.01)


def sidecar_of_the_docs() -> str:
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    _, _, block = page.partition("## In a tracker")
    return block.split("```python\n")[1].split("```")[0]


TIMM = os.environ.get("TIMM_CHECKOUT", "")
RUN = "import deen_zoo, runpy; runpy.run_path('{}', run_name='__main__')"


def timm_script(name: str, arguments: str, folder: Path) -> str:
    """Run one of timm's scripts as docs/clients.md says; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(f"{TIMM}/{name}"), *arguments.split()],
        capture_output=True, text=True, timeout=1000, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def pictures(crops, tmp_path_factory) -> Path:
    """ImageNet's layout: train/CLASS and validation/CLASS, with the crops of two people."""
    root = tmp_path_factory.mktemp("pictures")
    for part in ("train", "validation"):
        for i, path in enumerate(crops):
            folder = root / part / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"{part}{i}.png")
    return root


def sort_by_class(crops: list[str], classes: list[int], root: Path) -> str:
    """ImageNet's layout with a crop in the folder of each class; the file of all 64 names."""
    for path, label in zip(crops, classes, strict=True):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / str(label))
    names = root.parent / "names.txt"
    names.write_text("".join(f"{i}\n" for i in range(64)))
    return str(names)


@pytest.mark.skipif(not TIMM, reason="TIMM_CHECKOUT names no checkout of timm")
@pytest.mark.parametrize(
    "name",
    ["train.py", "validate.py", "inference.py", "benchmark.py", "profile", "onnx_export.py"],
)
def test_timm_scripts(name, model, pictures, crops, tmp_path) -> None:
    """C1, C5: timm's own scripts, unedited, from its checkout (the wheel has none of them)."""
    common = "--model test_deen_resnet --device cpu -b 3"
    infrared = "--model-kwargs modality=infrared"
    if name == "train.py":
        learn = "--pretrained --epochs 6 --opt adamw --lr 3e-3 --warmup-epochs 0 --no-aug"
        timm_script(name, f"{pictures} {common} -j 0 --num-classes 2 --drop-path 0.1 {learn} "
                    f"--input-size 3 128 64 --output {tmp_path} {infrared}", tmp_path)  # fmt: skip
        (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
        check_training(run, crops)
        return
    if name in ("benchmark.py", "profile"):
        check_benchmark(name == "profile", f"{common} {infrared}", tmp_path, model)
        return
    if name == "onnx_export.py":
        onnxruntime = pytest.importorskip("onnxruntime")
        folder = deen_zoo.save_pretrained(model, tmp_path / "folder")
        weights = f"--checkpoint {folder}/model.safetensors --num-classes {model.num_classes}"
        timm_script(name, f"deen.onnx --model test_deen_resnet {weights}", tmp_path)
        x = torch.randn(1, 3, 128, 64, generator=torch.Generator().manual_seed(0))
        session = onnxruntime.InferenceSession(tmp_path / "deen.onnx")
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(got, model(x, "visible"), atol=1e-4)
        return
    with torch.inference_mode():
        wanted = model(torch.stack([to_pixels(path) for path in crops]), "infrared")
    settings = f"{common} -j 0 --num-classes 64 --pretrained {infrared}"
    if name == "validate.py":
        classes = wanted.argmax(1).tolist()
        with torch.inference_mode():
            other = model(torch.stack([to_pixels(path) for path in crops]), "visible")
        assert other.argmax(1).tolist() != classes  # the other stem is noticed
        classes[0] = (classes[0] + 1) % 64  # five of six are right
        names = sort_by_class(crops, classes, tmp_path / "sorted")
        results = "--results-file out.json --results-format json"
        command = f"{tmp_path}/sorted {settings} --class-map {names} {results}"
        timm_script(name, command, tmp_path)
        result = json.loads((tmp_path / "out.json").read_text())
        assert result["top1"] == pytest.approx(100 * 5 / 6, abs=0.01)
        return
    data = f"{pictures}/validation {settings}"
    results = "--include-index --results-file out --results-format json --results-dir ."
    timm_script(name, f"{data} {results}", tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == len(crops)
    for file, row in found.items():
        i = int(Path(file).stem.removeprefix("validation"))
        assert row["index"] == int(wanted[i].argmax())


def check_training(run: Path, crops: list[str]) -> None:
    """What timm's train.py leaves: a falling loss, and weights that score what it says."""
    with open(run / "summary.csv", newline="") as file:
        epochs = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert [row["epoch"] for row in epochs] == list(range(6))
    assert all(np.isfinite(list(row.values())).all() for row in epochs)
    for loss in ("train_loss", "eval_loss"):
        assert epochs[-1][loss] < 0.9 * epochs[0][loss]
    best = max(epochs, key=lambda row: (row["eval_top1"], -row["epoch"]))
    pixels = torch.stack([to_pixels(path) for path in crops])
    people = torch.arange(len(crops)) % 2
    for file, row in (("last.pth.tar", epochs[-1]), ("model_best.pth.tar", best)):
        theirs = timm.create_model(
            "test_deen_resnet", num_classes=2, modality="infrared", checkpoint_path=run / file
        )
        folder = deen_zoo.save_pretrained(theirs, run / "folder")
        ours = deen_zoo.create_model(f"local-dir:{folder}", pretrained=True)
        for trained in (theirs.eval(), ours.eval()):
            with torch.inference_mode():
                logits = trained(pixels)
            loss = torch.nn.functional.cross_entropy(logits, people)
            assert float(loss) == pytest.approx(row["eval_loss"], abs=1e-4)
            right = float((logits.argmax(1) == people).float().mean())
            assert 100 * right == pytest.approx(row["eval_top1"], abs=0.01)


def check_benchmark(profile: bool, settings: str, folder: Path, model: torch.nn.Module) -> None:
    """What timm's benchmark.py measures: rates and times of the same steps, the model's size."""
    bench = "--bench both --num-warm-iter 1 --num-bench-iter 5"
    if profile:
        pytest.importorskip("fvcore")
        bench = "--bench profile --input-size 3 384 144"  # the figure has two decimal places
    out = timm_script("benchmark.py", f"{settings} {bench}", folder)
    result = json.loads(out.partition("--result")[2])
    parameters = sum(values.numel() for values in model.parameters())
    assert result["param_count"] == round(parameters / 1e6, 2)
    if profile:
        computed = convolutions(model, (384, 144)) / 1e9
        assert computed < result["infer_gmacs"] < 1.1 * computed + 0.01
        return
    for mode in ("infer", "train"):
        assert result[f"{mode}_batch_size"] == 3 and result[f"{mode}_img_size"] == 64
        rate, milliseconds = (result[f"{mode}_{x}"] for x in ("samples_per_sec", "step_time"))
        # 3 images a step; the rate also counts the time between the steps.
        assert 0 < rate < 1.05 * 3000 / milliseconds < np.inf


def convolutions(model: torch.nn.Module, size: tuple[int, int] = (128, 64)) -> int:
    """Multiplications of an image's convolutions, counted where they are computed."""
    counts: list[int] = []

    def note(module: torch.nn.Conv2d, inputs: object, out: torch.Tensor) -> None:
        counts.append(out.numel() * module.weight[0].numel())

    hooks = [m.register_forward_hook(note) for m in model.modules() if type(m) is torch.nn.Conv2d]
    with torch.inference_mode():
        model(torch.zeros(1, 3, *size), "infrared")
    for hook in hooks:
        hook.remove()
    return sum(counts)


def test_fvcore(model, images) -> None:
    """C1: it traces; the convolutions that it counts are those that are computed."""
    pytest.importorskip("fvcore")
    from fvcore.nn import FlopCountAnalysis

    describe = model.for_modality("infrared", flip=False)
    one, four = (FlopCountAnalysis(describe, images[:n]) for n in (1, 4))
    assert one.by_operator()["conv"] == convolutions(model)
    assert four.total() == pytest.approx(4 * one.total(), rel=0.01)


# what a model looks at


def test_pytorch_grad_cam(images) -> None:
    """C4: one map per image, of the last stage."""
    pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam import GradCAM

    infrared = deen_zoo.create_model("test_deen_resnet", pretrained=True, modality="infrared")
    infrared.eval()
    with GradCAM(infrared, [infrared.stages[-1]]) as cam:
        maps = cam(images, targets=None)
        alone = cam(images[:1], targets=None)
    assert maps.shape == (4, 128, 64) and np.isfinite(maps).all() and maps.max() > 0
    np.testing.assert_allclose(maps[:1], alone, atol=1e-4)  # each is of its own image
    seen = infrared.forward_features(images).detach().requires_grad_()
    infrared.forward_head(seen).max(1).values.sum().backward()
    slow = (seen * seen.grad.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    slow = torch.nn.functional.interpolate(slow, (128, 64), mode="bilinear").detach().numpy()
    for image, by_hand in zip(maps, slow[:, 0], strict=True):
        assert np.corrcoef(image.ravel(), by_hand.ravel())[0, 1] > 0.999
    infrared.modality = "visible"
    with GradCAM(infrared, [infrared.stages[-1]]) as cam:
        assert np.abs(cam(images, targets=None) - maps).max() > 0.1  # of the other stem


def test_captum(model, images) -> None:
    """Integrated gradients of one similarity: they add up to its difference from the baseline."""
    pytest.importorskip("captum")
    from captum.attr import IntegratedGradients

    describe = model.for_modality("visible", normalize=False)
    target = describe(images[:1]).detach()

    def similarity(x: torch.Tensor) -> torch.Tensor:
        return (describe(x) * target).sum(1)

    client = IntegratedGradients(similarity)
    given, delta = client.attribute(images[1:], n_steps=64, return_convergence_delta=True)
    assert given.shape == images[1:].shape
    with torch.no_grad():
        change = similarity(images[1:]) - similarity(torch.zeros_like(images[1:]))
    assert (delta.abs() < 0.1 * change.abs().clamp(min=1)).all()
    alone = client.attribute(images[1:2], n_steps=64)
    torch.testing.assert_close(given[:1], alone, rtol=1e-3, atol=1e-4)  # each of its own image


# feature files


def test_faiss(tables) -> None:
    """An index of inner products gives the exact search's ranking."""
    faiss = pytest.importorskip("faiss")
    gallery, queries, wanted = exact(tables, 5)
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    paths = read_feature_table(tables[0]).paths
    assert [[paths[i] for i in row] for row in index.search(queries, 5)[1]] == wanted


def test_duckdb(tables) -> None:
    """SQL over the files: the exact search's first hits, and a filter."""
    duckdb = pytest.importorskip("duckdb")
    gallery, _, wanted = exact(tables)
    visible, infrared = tables
    width = gallery.shape[1]
    found = duckdb.sql(f"""
        SELECT q.path, arg_max(g.path, array_inner_product(
            q.features::FLOAT[{width}], g.features::FLOAT[{width}]))
        FROM '{infrared}' q, '{visible}' g GROUP BY q.path
    """).fetchall()
    queries = read_feature_table(infrared).paths
    assert dict(found) == dict(zip(queries, (first for (first,) in wanted), strict=True))
    row = read_feature_table(infrared).features[0].tolist()
    query = f"""SELECT path FROM '{visible}' ORDER BY
        array_inner_product(features::FLOAT[{width}], ?::FLOAT[{width}]) DESC LIMIT 5"""
    assert [path for (path,) in duckdb.execute(query, [row]).fetchall()] == exact(tables, 5)[2][0]
    table = read_feature_table(visible)
    arrow = table.to_arrow()  # which SQL reads by this name
    some = FeatureTable.from_arrow(duckdb.sql("FROM arrow WHERE camera < 4").to_arrow_table())
    check_equal(some, table.select(table.label("camera") < 4))
    assert 0 < len(some) < len(arrow)


@pytest.mark.parametrize("client", ["polars", "pandas"])
def test_data_frames(client, tables) -> None:
    """A Parquet file is a data frame with one row per image."""
    module = pytest.importorskip(client)
    table = read_feature_table(tables[0])
    frame = module.read_parquet(tables[0])
    column = frame["features"]
    features = column.to_numpy() if client == "polars" else np.stack(column)
    np.testing.assert_array_equal(features, table.features.numpy())
    assert list(frame["path"]) == table.paths and set(frame["modality"]) == {"visible"}
    assert list(frame["identity"]) == table.label("identity").tolist()
    pa = pytest.importorskip("pyarrow")
    arrow = frame.to_arrow() if client == "polars" else pa.Table.from_pandas(frame)
    check_equal(FeatureTable.from_arrow(arrow), table)
    # A frame drops what made the features; search wants to know it.
    schema = pytest.importorskip("pyarrow.parquet").read_schema(tables[0])
    again = FeatureTable.from_arrow(arrow.replace_schema_metadata(schema.metadata))
    check_equal(again, table)
    assert search(read_feature_table(tables[1]), again, 1).indices.shape[1] == 1


def check_equal(got: FeatureTable, wanted: FeatureTable) -> None:
    assert torch.equal(got.features, wanted.features) and got.paths == wanted.paths
    assert {name: values.tolist() for name, values in got.labels.items()} == {
        name: values.tolist() for name, values in wanted.labels.items()
    }


def test_javascript(tables) -> None:
    """C7: node maps a safetensors file with typed arrays, without a copy."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    code = """
        const fs = require("fs"), bytes = fs.readFileSync(process.argv[1]);
        const buffer = bytes.buffer, at = bytes.byteOffset;
        const length = Number(bytes.readBigUInt64LE(0)), start = at + 8 + length;
        const header = JSON.parse(bytes.toString("utf8", 8, 8 + length));
        const [from, to] = header.features.data_offsets, [n, d] = header.features.shape;
        const rows = new Float32Array(buffer, start + from, n * d);
        const [a, b] = header.identity.data_offsets;
        const people = new BigInt64Array(buffer, start + a, n);
        const score = (i, j) => {
            let sum = 0; for (let k = 0; k < d; k++) sum += rows[i * d + k] * rows[j * d + k];
            return sum;
        };
        const scores = Array.from({length: n}, (_, i) => score(0, i));
        const mapped = rows.buffer === buffer && people.buffer === buffer;
        console.log(JSON.stringify([n, d, mapped, scores, Array.from(people, Number)]));
    """
    file = tables[0].with_suffix(".safetensors")
    done = subprocess.run([node, "-e", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n, d, mapped, scores, people = json.loads(done.stdout)
    table = read_feature_table(file)
    assert [n, d] == list(table.features.shape) and mapped
    np.testing.assert_allclose(scores, table.features @ table.features[0], atol=1e-5)
    assert people == table.label("identity").tolist()


def test_a_vector_database(tmp_path) -> None:
    """The same first hits as the exact search, filtered by camera and time."""
    pytest.importorskip("lancedb")
    pq = pytest.importorskip("pyarrow.parquet")
    example = example_of("search_in_a_database")
    files = example.draw_people(str(tmp_path))
    where = "camera <= 4 and time > 600"
    found = example.main(["--gallery", files[0], "--query", files[1], "--where", where])
    assert found.database == found.exact and len(found.exact) > 4
    gallery, queries = (pq.read_table(file) for file in files)
    camera, time = (gallery[name].to_numpy() for name in ("camera", "time"))
    rows, query = np.stack(gallery["features"].to_numpy()), queries["features"][0].as_py()
    scores = np.where((camera <= 4) & (time > 600), rows @ query, -np.inf)
    wanted = [gallery["path"][i].as_py() for i in np.argsort(-scores, kind="stable")[:5]]
    assert [hit["path"] for hit in found.filtered] == wanted and np.isfinite(scores).sum() > 5
    kept = ["--output", str(tmp_path / "kept")]
    for _ in range(2):  # the second time it was there already
        plain = example.main(["--gallery", files[0], "--query", files[1], *kept])
    assert [hit["path"] for hit in plain.filtered] != wanted  # the filter does something
    database = example.open_database(str(tmp_path / "rows"), files[0])
    database.add(queries.slice(0, 1).replace_schema_metadata(None))  # rows come and go
    (best,) = example.nearest(database, np.float32(query), 1)
    assert best["path"] == queries["path"][0].as_py() and abs(best["_distance"]) < 1e-5
    database.delete(f"path = '{best['path']}'")
    (best,) = example.nearest(database, np.float32(query), 1)
    assert best["path"] == found.exact[0]


def test_an_index_of_a_vector_database(tmp_path, capsys) -> None:
    """With an index the rows' own scores come, and nearly always the exact search's first hits."""
    lancedb = pytest.importorskip("lancedb")
    example = example_of("search_in_a_database")
    found = example.main(["--rows", "3000", "--index", "--output", str(tmp_path)])
    database = lancedb.connect(tmp_path).open_table("gallery")
    assert [index.index_type for index in database.list_indices()] == ["IvfPq"]
    same = sum(a == b for a, b in zip(found.database, found.exact, strict=True))
    said = capsys.readouterr().out
    assert same > 28 and f"{same} of 32 first hits" in said
    assert re.search(r"rows/s written, 1,\d+ bytes per row\n.* built in \d", said)
    (tmp_path / "drawn").mkdir()
    gallery, queries = map(
        read_feature_table, example.draw_rows(str(tmp_path / "drawn"), 3000, 256)
    )
    query = queries.features[0].numpy()
    plan = database.search(query, vector_column_name="features").distance_type("dot").explain_plan()
    assert "ANN" in plan  # the index is used
    scores = {
        path: float(row @ query)
        for path, row in zip(gallery.paths, gallery.features.numpy(), strict=True)
    }
    for hit in found.filtered:
        assert 1 - hit["_distance"] == pytest.approx(scores[hit["path"]], abs=1e-5)


@pytest.mark.parametrize("storage", ["a folder", "an object store"])
def test_ray(storage, tmp_path, llcm_tree, monkeypatch) -> None:
    """Two actors give the extractor's rows; a killed actor loses nothing."""
    pytest.importorskip("ray")
    folder, target, killed = llcm_tree / "test_nir", tmp_path / "rows", tmp_path / "killed"
    paths = sorted(map(str, folder.rglob("*.jpg")))
    with contextlib.ExitStack() as stack:
        source, prefix, output = str(folder), "", str(target)
        if storage == "an object store":
            source, client = stack.enter_context(stored(paths, monkeypatch))
            prefix, output = "crops", "s3://crops/rows"
        command = [sys.executable, str(ROOT / "examples/extract_with_ray.py"), source, "--modality"]
        command += ["infrared", "--output", output, "--kill-one", str(killed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1000)
        assert done.returncode == 0, done.stderr[-2000:]
        if storage == "an object store":
            target.mkdir()
            for item in client.list_objects_v2(Bucket="crops", Prefix="rows/")["Contents"]:
                client.download_file("crops", item["Key"], target / Path(item["Key"]).name)
    assert killed.exists() and f"{len(paths)} rows" in done.stdout and "rows/s" in done.stdout
    table = read_feature_table(*target.glob("*.parquet"))  # which refuses an image that comes twice
    assert sorted(table.paths) == [prefix + path for path in paths]
    wanted = deen_zoo.FeatureExtractor("test_deen_resnet", "cpu").table(paths, modality="infrared")
    order = np.argsort(table.paths)
    np.testing.assert_allclose(table.features[order], wanted.features, atol=1e-5)
    assert table.provenance == wanted.provenance


@contextlib.contextmanager
def stored(paths: list[str], monkeypatch) -> Iterator[tuple[str, Any]]:
    """The files in a server that speaks S3's protocol: where they are, and a client of it."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("ENDPOINT_URL", f"http://{host}:{port}"), ("ACCESS_KEY_ID", "me"),
            ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1"),
            ("EC2_METADATA_DISABLED", "true"),
        ):  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="crops")
        for path in paths:
            client.upload_file(path, "crops", path[1:])
        yield "s3://crops" + os.path.commonpath(paths), client
    finally:
        server.stop()


def example_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_row_of_the_table_names_its_test() -> None:
    """Each row of docs/clients.md names a test, and each test of this file has a row."""
    text = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    named = set()
    for row in rows:
        file, _, test = row.rsplit("`", 2)[1].partition("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), row
        named.add(test)
    here = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.M))
    assert here - named == {"test_each_row_of_the_table_names_its_test"}
