"""Exported files give torch's numbers, and nothing is written when they do not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import deen_zoo
from deen_zoo import export
from deen_zoo.cli import main
from deen_zoo.errors import MissingExtraError, UserError
from deen_zoo.export import export_model
from tests import seeded

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def model():
    model = deen_zoo.create_model("test_deen_resnet", num_classes=5)
    seeded.fill(model)
    return model.eval()


def batch(model, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, 3, *model.pretrained_cfg["input_size"][1:]), generator=generator)
    return x, torch.rand(count, generator=generator) < 0.5


def test_onnx_with_modality_input(model, tmp_path):
    path = tmp_path / "deen.onnx"
    report = export_model(model, path, modality="input", flip=False, normalize=False)
    assert max(report.differences.values()) < 1e-5
    assert set(report.differences) == {
        "1 visible", "1 infrared", "3 visible", "3 infrared", "3 mixed"}  # fmt: skip
    assert report.size_bytes == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["deen.onnx"]  # one file, weights inside
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {node.name for node in session.get_inputs()} == {"images", "modality"}
    assert all(node.shape[0] == "batch" for node in session.get_inputs())
    for count in (1, 7):
        x, told = batch(model, count)
        (got,) = session.run(None, {"images": x.numpy(), "modality": told.numpy()})
        with torch.no_grad():
            wanted = model.forward_embedding(x, told)
        torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-4)
    note = json.loads(session.get_modelmeta().custom_metadata_map["deen_zoo"])
    assert note["preprocessing"]["mean"] == list(model.pretrained_cfg["mean"])
    assert note["output"] == "embedding" and note["modality"] == "input"
    assert any("visible_stem" in name for name in weights(path))


def weights(path):
    return [weight.name for weight in onnx.load(path).graph.initializer]


def test_logits_of_another_size(model, tmp_path):
    export_model(model, tmp_path / "deen.pt", output="logits", size=(64, 64), modality="visible")
    x = torch.randn(2, 3, 64, 64)
    extra = {"deen_zoo": ""}
    got = torch.jit.load(tmp_path / "deen.pt", _extra_files=extra)(x)
    assert json.loads(extra["deen_zoo"])["normalize"] is None  # it said that logits are normalised
    with torch.no_grad():
        torch.testing.assert_close(got, model(x, "visible"), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("suffix", "modality"),
    [(".xml", "infrared"), (".pt", "infrared"), (".pt2", "input")]
    + [pytest.param(s, "input", marks=pytest.mark.slow) for s in (".xml", ".pt")],
)
def test_rows_are_the_extractors(model, suffix, modality, tmp_path):
    """E: exported rows were not normalised, the extractor's are; every format, read on its own.

    Those of ONNX are tested by the page on deployment, in test_readme.py.
    """
    if suffix == ".xml":
        openvino = pytest.importorskip("openvino")
    path = tmp_path / f"deen{suffix}"
    export_model(model, path, modality=modality)
    x, told = batch(model, 7)  # not a number that it was exported with
    told = torch.ones(7, dtype=torch.bool) if modality == "infrared" else told
    inputs = {"images": x} if modality == "infrared" else {"images": x, "modality": told}
    if suffix == ".xml":
        compiled = openvino.Core().compile_model(
            str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        got = torch.from_numpy(compiled({k: v.numpy() for k, v in inputs.items()})[0])
        assert {p.name for p in tmp_path.iterdir()} == {"deen.xml", "deen.bin"}
    elif suffix == ".pt":
        extra = {"deen_zoo": ""}
        got = torch.jit.load(path, _extra_files=extra)(*inputs.values())
        assert json.loads(extra["deen_zoo"])["normalize"] is True
    else:
        got = torch.export.load(path).module()(**inputs)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model.forward_embedding(x, told, flip=True))
        other = model.forward_embedding(x, ~told, flip=True)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    assert (got - torch.nn.functional.normalize(other)).abs().max() > 1e-2
    torch.testing.assert_close(got.norm(dim=1), torch.ones(7), rtol=0, atol=1e-5)


def test_the_modality_must_be_said(model, tmp_path, capsys):
    with pytest.raises(TypeError, match="modality"):
        export_model(model, tmp_path / "deen.onnx")
    with pytest.raises(SystemExit):
        main(["export", "test_deen_resnet", str(tmp_path / "deen.onnx")])
    assert "--modality" in capsys.readouterr().err


def test_ablation(tmp_path):
    baseline = deen_zoo.create_model("test_deen_resnet", dee=False, mfa=False, num_classes=0)
    report = export_model(baseline, tmp_path / "baseline.pt2", modality="input")
    assert max(report.differences.values()) < 1e-5 and baseline.training


@pytest.mark.slow
def test_full_size(tmp_path):
    model = deen_zoo.create_model("deen_resnet50_regdb", num_classes=3)
    seeded.fill(model)
    report = export_model(model, tmp_path / "regdb.onnx", modality="infrared")
    assert max(report.differences.values()) < 1e-4
    names = weights(tmp_path / "regdb.onnx")
    assert any("infrared_stem" in name for name in names)
    assert not any("visible_stem" in name for name in names)  # the other stem is out


@pytest.mark.parametrize("suffix", sorted(export.FORMATS))
@pytest.mark.parametrize("error", [0.001, np.nan])
def test_wrong_numbers_are_not_written(suffix, error, model, tmp_path, monkeypatch):
    def broken(function, example, path, *rest):
        path.write_bytes(b"wrong")
        return lambda x: function(**x) + (error if len(x["images"]) == 3 else 0)

    monkeypatch.setitem(export.WRITERS, suffix, broken)
    with pytest.raises(UserError, match=r"not written.*batch of 3"):
        export_model(model, tmp_path / f"deen{suffix}", modality="visible")
    assert not list(tmp_path.iterdir())


def test_mistakes(model, tmp_path, monkeypatch):
    for name, path, kwargs in (
        (".onnx, .xml, .pt, .pt2", "deen.txt", {}),
        ("embedding, logits", "deen.onnx", {"output": "features"}),
        ("visible, infrared, input", "deen.onnx", {"modality": "thermal"}),
        ("official", "deen.onnx", {"descriptor": "best"}),
        ("even number", "deen.onnx", {"size": (36, 36)}),
        ("size 1 0", "deen.onnx", {"size": (1, 0)}),
        ("4096", "deen.onnx", {"size": (1, 10**20)}),  # a traceback
    ):
        with pytest.raises(UserError, match=name):
            export_model(model, tmp_path / path, **{"modality": "visible", **kwargs})
    for option in ({"descriptor": "bn"}, {"flip": False}, {"normalize": True}):
        with pytest.raises(UserError, match=f"{next(iter(option))}.*leave.*embedding"):
            export_model(model, tmp_path / "a.pt", modality="input", output="logits", **option)
    assert not list(tmp_path.iterdir())
    headless = deen_zoo.create_model("test_deen_resnet", num_classes=0)
    with pytest.raises(UserError, match="no classifier"):
        export_model(headless, tmp_path / "deen.onnx", modality="input", output="logits")
    with pytest.raises(UserError, match="there is no folder"):
        export_model(model, tmp_path / "absent" / "deen.pt2", modality="visible")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"deen-zoo\[export\]"):
        export_model(model, tmp_path / "deen.onnx", modality="input")


def test_command(model, tmp_path, capsys):
    folder = deen_zoo.save_pretrained(model, tmp_path / "checkpoint")
    target = tmp_path / "deen.pt"
    assert main(["export", str(folder), str(target), "--modality", "infrared", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(target) and target.exists()
    assert set(report["differences"]) == {"1 infrared", "3 infrared"}
    assert main(["export", str(folder), str(tmp_path / "deen.txt"), "--modality=visible"]) == 2
    assert ".onnx" in capsys.readouterr().err
    for option in ("--no-flip", "--raw", "--descriptor=bn"):
        logits = ["--modality", "visible", "--output", "logits", option]
        assert main(["export", str(folder), str(tmp_path / "logits.pt"), *logits]) == 2
        assert "leave" in capsys.readouterr().err and not (tmp_path / "logits.pt").exists()
    x, _ = batch(model, 3)
    command = ["export", str(folder), str(target), "--modality", "visible"]
    assert main([*command, "--raw", "--no-flip"]) == 0
    assert "visible only" in capsys.readouterr().out
    with torch.no_grad():
        wanted = model.for_modality("visible", flip=False, normalize=False)(x)
    torch.testing.assert_close(torch.jit.load(target)(x), wanted, rtol=0, atol=1e-4)
