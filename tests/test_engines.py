"""OpenVINO's rows next to torch's, int8 graphs and their bounds."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deen_zoo
from deen_zoo.cli import main
from deen_zoo.data import Sample, open_dataset
from deen_zoo.errors import UserError
from deen_zoo.features import engines
from deen_zoo.features.extractor import FeatureExtractor
from deen_zoo.features.files import read_feature_table
from deen_zoo.features.quantize import quantize

from .forked import run

pytest.importorskip("openvino")
KINDS = ["visible", "infrared", "infrared"]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (200, 90, 3), dtype=np.uint8) for _ in range(21)]


@pytest.fixture(scope="module")
def graphs() -> dict[str, object]:
    """The graphs of the shipped model, which take ten seconds to convert."""
    return {}


@pytest.fixture
def converted_once(graphs, monkeypatch):
    to_openvino = engines.to_openvino

    def once(**options):
        if options["modality"] not in graphs:
            graphs[options["modality"]] = to_openvino(**options)
        return graphs[options["modality"]].clone()

    for module in ("engines", "quantize"):
        monkeypatch.setattr(f"deen_zoo.features.{module}.to_openvino", once)


@pytest.fixture(scope="module")
def make() -> FeatureExtractor:
    return FeatureExtractor("test_deen_resnet", engine="openvino", progress=False)


def test_rows_equal_torchs(images, make, monkeypatch, converted_once):
    """Of mixed modalities, of one image, of a batch that is not full; converted once."""
    plain = FeatureExtractor("test_deen_resnet", "cpu")
    modality = [KINDS[i % 3] for i in range(len(images))]
    wanted = plain(images, modality)
    torch.testing.assert_close(make(images, modality), wanted, rtol=0, atol=1e-5)
    one = make(images[4], modality[4])
    torch.testing.assert_close(one[0], wanted[4], rtol=0, atol=1e-5)
    assert make((), "visible").shape == (0, make.dim)
    monkeypatch.setattr(engines, "to_openvino", None)  # the graphs are on the disk by now
    again = FeatureExtractor("test_deen_resnet", engine="openvino")
    assert torch.equal(again(images, modality), make(images, modality))
    assert make.provenance["engine"] == "openvino"


def test_the_same_weights_in_another_model_have_a_graph_of_their_own(make):
    """The kept graph of other arguments or another normalisation was taken: other rows."""
    homes = [make.engine._home]
    for change in ({"mfa_softmax": True}, {"pretrained_cfg_overlay": {"mean": (0.2, 0.2, 0.2)}}):
        model = deen_zoo.create_model("test_deen_resnet", pretrained=True, **change)
        homes.append(FeatureExtractor(model, engine="openvino").engine._home)
    homes.append(FeatureExtractor("test_deen_resnet", flip=False, engine="openvino").engine._home)
    assert len(set(homes)) == 4
    again = FeatureExtractor("test_deen_resnet", engine="openvino")
    assert again.engine._home == homes[0]


def test_a_stem_without_images_is_not_run(make, images, monkeypatch):
    """Each batch of one modality ran the other's graph as well, on a batch of zeros."""
    asked, queue = [], make.engine._queue
    monkeypatch.setattr(make.engine, "_queue", lambda *key: asked.append(key) or queue(*key))
    make(images[:3], "infrared")
    make(images[0], "infrared")
    assert asked == [("infrared", "THROUGHPUT"), ("infrared", "LATENCY")]


def test_engines_that_convert_at_the_same_time_wait_for_one_another(tmp_path, monkeypatch):
    """Each removed the folder that the other one was writing, in another process as well."""
    converted = []

    def to_openvino(**options):
        converted.append(options["modality"])
        time.sleep(0.3)
        return "graph"

    class Files:
        @staticmethod
        def save_model(graph, file, **options):
            time.sleep(0.3)
            file.write_text(graph)

    monkeypatch.setattr(engines, "to_openvino", to_openvino)
    monkeypatch.setattr(engines, "require", lambda *names, **extra: Files)
    file = tmp_path / "home" / "visible" / "graph.xml"

    def work(_) -> None:
        engine = object.__new__(engines.OpenVINOEngine)  # with a lock of its own, as elsewhere
        engine._home, engine._options = file.parents[1], {}
        engine._convert("visible", file)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert converted == ["visible"] and file.read_text() == "graph"


def test_many_threads_share_one_engine(images, make):
    """B1, for OpenVINO: its requests are not to be shared."""
    wanted = [make(image, "infrared") for image in images]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda image: make(image, "infrared"), images * 4))
    assert all(torch.equal(row, wanted[i % len(images)]) for i, row in enumerate(rows))


def test_mistakes(images, make, tmp_path):
    for options, message in (
        ({"engine": "tensorrt"}, "engine 'tensorrt': choose from torch, openvino"),
        ({"engine": "openvino", "precision": "float64"}, "precision 'float64'"),
        ({"engine": "openvino", "precision": "int8"}, "deen-zoo quantize"),
        ({"engine": "openvino", "device": "cuda"}, "computes on the CPU"),
        ({"precision": "int8"}, "precision 'int8'"),
    ):
        with pytest.raises(UserError, match=message):
            FeatureExtractor("test_deen_resnet", **options)
    with pytest.raises(UserError, match="preprocessed"):
        make(torch.zeros(1, 3, 128, 64), "visible")


def test_int8_graphs_of_another_network_or_normalisation_are_refused(tmp_path):
    """They were taken with any mean, std and model arguments: other rows than the model's."""
    plain = FeatureExtractor("test_deen_resnet", "cpu")
    options = dict(model=plain.model, flip=True, descriptor="official", transform=plain.transform)
    facts = engines.graph_facts(options, plain.provenance["descriptor_sha256"])
    facts["pixels"] = {kind: [[0, 0], [255, 128]] for kind in engines.MODALITIES}
    folder = deen_zoo.save_pretrained(plain.model, tmp_path / "int8")
    (folder / "openvino").mkdir()
    (folder / "openvino" / "quantization.json").write_text(json.dumps(facts))
    FeatureExtractor(folder, engine="openvino", precision="int8")
    for damaged in ([], {}, {**facts, "pixels": {}}, {**facts, "pixels": {"visible": "x"}}):
        (folder / "openvino" / "quantization.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="deen-zoo quantize"):
            FeatureExtractor(folder, engine="openvino", precision="int8")
    (folder / "openvino" / "quantization.json").write_text(json.dumps(facts))
    file = folder / "config.json"
    saved = file.read_text()
    for part, key, value in (
        ("pretrained_cfg", "mean", [0.2, 0.2, 0.2]),
        ("pretrained_cfg", "std", [0.2, 0.2, 0.2]),
        ("model_args", "mfa_softmax", True),
    ):
        config = json.loads(saved)
        config[part][key] = value
        file.write_text(json.dumps(config))
        with pytest.raises(UserError, match=key if part == "pretrained_cfg" else part):
            FeatureExtractor(folder, engine="openvino", precision="int8")


@pytest.mark.slow
def test_int8_from_quantize_to_extract(
    llcm_tree, strangers, tmp_path, capsys, converted_once, monkeypatch
):
    monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)  # no pictures
    pytest.importorskip("nncf")
    folder = tmp_path / "int8"
    arguments = ["quantize", "test_deen_resnet", str(llcm_tree), str(folder), "--layout", "llcm"]
    arguments += ["--calibration-images", "16"]
    bounds = ["--same-first-hit", "0.3", "--map-drop", "0.2"]  # six people say little
    assert main([*arguments, *bounds, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["queries"] > 0 and 0 < report["mAP_float32"] <= 1
    assert deen_zoo.create_model(f"local-dir:{folder}", pretrained=True) is not None

    out = tmp_path / "f.safetensors"
    common = ["extract", str(llcm_tree), "--layout", "llcm", "--model", str(folder), "-o", str(out)]
    assert main([*common, "--engine", "openvino", "--precision", "int8"]) == 0
    int8 = read_feature_table(out)
    exact = FeatureExtractor("test_deen_resnet", "cpu")(
        open_dataset("llcm", llcm_tree).test("visible")
    )
    cosine = (int8.features[: len(exact)] * exact).sum(1)
    assert 0.9 < float(cosine.min()) < 1 - 1e-6  # it is int8, and close
    make = FeatureExtractor(folder, engine="openvino", precision="int8")
    capsys.readouterr()
    make([np.zeros((128, 64, 3), np.uint8)] * 3, "visible")
    assert "unlike" in capsys.readouterr().err or make.engine._warned
    with pytest.raises(UserError, match="quantized with flip True"):
        FeatureExtractor(folder, engine="openvino", precision="int8", flip=False)
    evaluation = ["reproduce", "llcm", "--data-root", str(strangers), "--eval-only", str(folder)]
    evaluation += ["--engine", "openvino", "--precision", "int8", "--json"]
    evaluation += ["--protocols", "llcm-ir2vis"]
    capsys.readouterr()
    assert main([*evaluation, "--output", str(tmp_path / "run")]) == 0  # it was always refused
    assert json.loads(capsys.readouterr().out)["precision"] == "int8"


def test_calibration_images_are_scaled_as_in_training(tmp_path, monkeypatch):
    """B3: images of 16 bits were calibrated on as by the full range: nearly black."""
    pytest.importorskip("nncf")
    model = deen_zoo.create_model("test_deen_resnet", pretrained=True)
    model.trained_on = {"dataset": "own", "intensity": "(7000.0, 9000.0)"}
    checkpoint = deen_zoo.save_pretrained(model, tmp_path / "checkpoint")
    samples, seen = [], []
    for i in range(8):
        kind, file = KINDS[i % 2], tmp_path / f"{i}.png"
        counts = np.random.default_rng(i).integers(7000, 9000, (64, 32), dtype=np.uint16)
        Image.fromarray(counts).save(file)
        samples.append(Sample(str(file), i // 2 if i % 2 else f"0{i // 2}", 1, kind))

    def stop(pixels):
        seen.append(pixels)
        raise KeyboardInterrupt

    monkeypatch.setattr("deen_zoo.features.quantize.pixel_statistics", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, samples, tmp_path / "int8")
    assert int(seen[0].max()) - int(seen[0].min()) > 200


@pytest.mark.slow
def test_a_conversion_is_reported_to_nobody():
    """OpenVINO sends some thirty messages to its makers for each, by processes that it forks."""
    pytest.importorskip("openvino")
    code = (
        "import sys, deen_zoo\n"
        "from deen_zoo.data.transforms import eval_transform\n"
        "from deen_zoo.features.engines import to_openvino\n"
        "from deen_zoo.features.extractor import data_config\n"
        "model = deen_zoo.create_model('test_deen_resnet')\n"
        "to_openvino(model, 'visible', False, 'official', eval_transform(data_config(model)))\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry.')])"
    )
    done = run("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.slow
def test_nothing_is_written_below_the_bound(llcm_tree, tmp_path, monkeypatch, converted_once):
    nncf = pytest.importorskip("nncf")
    monkeypatch.setattr(nncf, "quantize", lambda graph, data, **options: graph)  # half a minute
    dataset = open_dataset("llcm", llcm_tree)
    samples = dataset.test("visible") + dataset.test("infrared")
    with pytest.raises(UserError, match="first hit"):
        quantize("test_deen_resnet", samples, tmp_path / "out", 8, same_first_hit=1.01)
    for few in (samples[:1], []):  # C13: an empty calibration was a traceback
        with pytest.raises(UserError, match="at least 4"):
            quantize("test_deen_resnet", few, tmp_path / "out")
    for no_samples in (torch.zeros(8, 3, 128, 64), [samples[0].path]):
        with pytest.raises(UserError, match="Sample"):
            quantize("test_deen_resnet", no_samples, tmp_path / "out")
    assert not list(Path(tmp_path).iterdir())


def test_a_folder_in_use_is_not_replaced_by_quantized_weights(llcm_tree, tmp_path):
    """All that was in it was removed, the images themselves if that was their folder."""
    pytest.importorskip("nncf")
    (tmp_path / "mine.txt").write_text("mine")
    samples = open_dataset("llcm", llcm_tree).test("visible")
    with pytest.raises(UserError, match="exists already"):
        quantize("test_deen_resnet", samples, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
