"""config.json from strangers: it builds the very model that was saved, or one line says why not."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deen_zoo
from deen_zoo.errors import UserError
from deen_zoo.features.extractor import FeatureExtractor
from deen_zoo.models import pretrained

from .test_fuzz import TRY
from .test_fuzz import changed as anywhere

ARGS, BACKBONE, CFG = ("model_args",), ("model_args", "backbone_args"), ("pretrained_cfg",)
NAN, INF = float("nan"), float("inf")
VALUES = {
    ("num_classes",): [-5, "3", None, 1.5, True, 10**12, [3], 4],
    ("num_features",): ["x", None, -1],
    ("global_pool",): ["max", None, 5, ""],
    ("architecture",): [None, 5, "resnet50", ["a"], {}],
    ARGS: [None, [], 5, "x", {}],
    CFG: [None, [], {}],
    ("deen_zoo",): [None, [], 5, {"format": "1"}, {"format": 2.5}, {"weights_sha256": 5}],
    (*ARGS, "backbone"): [None, 5, "", "nothing", "vit_tiny_patch16_224", "resnet50", ["resnet18"]],
    BACKBONE: [None, [], "x", 5, {}, {"checkpoint_path": "x"}],
    (*BACKBONE, "layers"): [[100000] * 4, [1, 1, 1], [0, 1, 1, 1], "x", [1.5, 1, 1, 1]],
    (*BACKBONE, "channels"): [[8] * 3, [10**9] * 4, "x", [-8] * 4, None],
    (*BACKBONE, "stem_width"): [-1, 0, 10**9, "x", None, 1e300],
    (*BACKBONE, "stem_type"): ["x", 5],
    (*BACKBONE, "output_stride"): [8, 7],
    (*BACKBONE, "block"): ["x"],
    (*ARGS, "num_stages"): [3, 2, -1, "4", 4.0, True, 10**9],
    (*ARGS, "dee"): [False, None, "yes"],
    (*ARGS, "modality"): ["ir", 5, True],
    (*ARGS, "drop_rate"): [-1, 2, "x", None, NAN, INF],
    (*ARGS, "drop_path_rate"): [-1, "x", 5],
    (*ARGS, "num_classes"): [7, -1],
    (*ARGS, "in_chans"): [0, 1, -3, "x", 10**9],
    (*ARGS, "pretrained"): [True],
    (*CFG, "std"): [[0, 0, 0], [-1, 1, 1], "x", [1], [NAN] * 3, None, 0.5],
    (*CFG, "mean"): [[123.7, 116.3, 103.5], [0.5], [None] * 3, {}, "x"],
    (*CFG, "input_size"): [[3, 0, 0], [3, -1, 5], [3, 128], [3, 1e9, 1e9], "x", [5, 128, 64], None],
    (*CFG, "crop_pct"): [0, -1, "x", 5, None],
    (*CFG, "crop_mode"): ["x", 5],
    (*CFG, "interpolation"): ["x", 5],
    (*CFG, "num_classes"): [-1, "x"],
    (*CFG, "custom_load"): [True, "hf"],
    (*CFG, "label_offset"): [1],
    (*CFG, "first_conv"): ["x", 5, [5], None],
    (*CFG, "classifier"): ["x", 5, ["classifier"], None],
    (*CFG, "pool_size"): ["x", [0, 0]],
    (*CFG, "source"): ["hf-hub", "local-dir", "x"],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = deen_zoo.create_model("test_deen_resnet", num_classes=3)
    folder = deen_zoo.save_pretrained(model, tmp_path_factory.mktemp("saved"))
    return model.state_dict(), folder, json.loads((folder / "config.json").read_text())


def changed(config, path, value):
    config = copy.deepcopy(config)
    part = config
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return config


def builds_the_same_or_says_why(saved, config):
    """Whatever loads has the saved tensors, and makes finite numbers of an image."""
    weights, folder, _ = saved
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = deen_zoo.create_model(f"local-dir:{folder}", pretrained=True)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    assert model.num_classes in (0, 3)
    if config.get("pretrained_cfg") == saved[2]["pretrained_cfg"]:
        return
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    rows = (torch.rand(3, 64, 64) - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
    with torch.inference_mode():
        assert model.eval().forward_embedding(rows[None], "visible").isfinite().all()


@pytest.mark.parametrize("path", VALUES, ids=".".join)
def test_odd_values(saved, path):
    """B9: 44 of 95 such values raised a traceback; std of zeros, 100,000 layers and -5 classes
    loaded."""
    for value in VALUES[path]:
        builds_the_same_or_says_why(saved, changed(saved[2], path, value))


@pytest.mark.slow
@TRY
@given(st.data())
def test_any_value(saved, data):
    """B9: any JSON in the place of any field, or no such field."""
    builds_the_same_or_says_why(saved, anywhere(data, saved[2]))


def test_a_larger_classifier_than_the_files_is_refused_before_it_is_built(saved, monkeypatch):
    """Ten million identities took gigabytes, and were refused after that."""
    _, folder, config = saved
    many = changed(config, ("num_classes",), 10**7)
    (folder / "config.json").write_text(json.dumps(many))
    monkeypatch.setattr(pretrained, "build_model_with_cfg", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="trained on 3 identities .* 10000000"):
        deen_zoo.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("size", [[3, 1, 1], [3, 16, 16], [3, 100, 50]])
def test_a_size_that_the_model_cannot_take_is_one_line(saved, size):
    _, folder, config = saved
    config = changed(config, ("pretrained_cfg", "input_size"), size)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="multiple of 32"):
        FeatureExtractor(folder, "cpu")([np.zeros((64, 32, 3), np.uint8)], "visible")


@pytest.mark.parametrize("form", ["official", "paper"])
def test_configurations_of_0_1_0(saved, form):
    """``form`` had two meanings, and "visible" was written where no modality had been given."""
    config = copy.deepcopy(saved[2])
    for key in ("dee_mean", "mfa_softmax", "flip", "drop_path_rate", "drop_block_rate"):
        del config["model_args"][key]
    config["model_args"] |= {"form": form, "modality": "visible"}
    (saved[1] / "config.json").write_text(json.dumps(config))
    model = deen_zoo.create_model(f"local-dir:{saved[1]}", pretrained=True)
    assert model.model_args["mfa_softmax"] == (form == "paper") != model.model_args["dee_mean"]
    assert model.modality is None
