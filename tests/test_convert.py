"""Official checkpoints: key names, strictness both ways, pickles that want to run code."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import deen_zoo
from deen_zoo.cli import main
from deen_zoo.errors import UserError
from deen_zoo.models.convert import SOURCES, convert, read_checkpoint, recognise
from tests import forked, parity
from tests.reference import needs_official

# Our key -> the official one, spelled out by hand for one key of each kind.
SPELLED_OUT = {
    "infrared_stem.conv1.weight": "thermal_module.thermal.conv1.weight",
    "visible_stem.bn1.running_var": "visible_module.visible.bn1.running_var",
    "stages.0.blocks.2.conv3.weight": "base_resnet.base.layer1.2.conv3.weight",
    "stages.1.blocks.0.downsample.1.bias": "base_resnet.base.layer2.0.downsample.1.bias",
    "stages.0.cnl.g.weight": "MFA1.CNL.g.weight",
    "stages.1.pnl.theta.bias": "MFA2.PNL.theta.bias",
    "stages.1.cnl.proj.conv.weight": "MFA2.CNL.W.0.weight",
    "stages.1.pnl.proj.bn.running_mean": "MFA2.PNL.W.1.running_mean",
    "stages.2.dee.reduce.0.2.weight": "DEE.FC13.weight",
    "stages.2.dee.reduce.1.0.weight": "DEE.FC21.weight",
    "stages.2.dee.expand.1.bias": "DEE.FC2.bias",
    "bottleneck.bias": "bottleneck.bias",
    "classifier.weight": "classifier.weight",
}


def official_names(ours):
    """Official names of our keys, built the other way round from what the package does."""
    out = {}
    for key in ours:
        name = key
        for stage in range(3):
            name = name.replace(f"stages.{stage}.blocks", f"base_resnet.base.layer{stage + 1}")
            name = name.replace(f"stages.{stage}.cnl", f"MFA{stage + 1}.CNL")
            name = name.replace(f"stages.{stage}.pnl", f"MFA{stage + 1}.PNL")
        name = name.replace("proj.conv", "W.0").replace("proj.bn", "W.1")
        for branch in range(2):
            for dilation in range(3):
                name = name.replace(
                    f"stages.2.dee.reduce.{branch}.{dilation}", f"DEE.FC{branch + 1}{dilation + 1}"
                )
            name = name.replace(f"stages.2.dee.expand.{branch}", f"DEE.FC{branch + 1}")
        name = name.replace("visible_stem", "visible_module.visible")
        name = name.replace("infrared_stem", "thermal_module.thermal")
        out[key] = name
    return out


@pytest.fixture(scope="module")
def regdb():
    """A RegDB model with 5 identities and the official state dict of the same weights."""
    torch.manual_seed(0)
    model = deen_zoo.create_model("deen_resnet50_regdb", num_classes=5)
    state = model.state_dict()
    names = official_names(state)
    official = {names[key]: value.clone() for key, value in state.items()}
    for unused in (
        "thermal_module.thermal.layer3.0.conv1.weight",
        "visible_module.visible.layer1.0.bn1.weight",
        "base_resnet.base.conv1.weight",
        "base_resnet.base.layer4.0.conv1.weight",
    ):
        official[unused] = torch.zeros(2)
    return model, official


@pytest.fixture
def checkpoint(regdb, tmp_path):
    path = tmp_path / "best.t"
    scores = {"cmc": np.linspace(0.5, 1, 20), "mAP": np.float64(0.25), "mINP": np.float32(0.125)}
    torch.save({"net": regdb[1], "epoch": 7, **scores}, path)
    return path


def test_every_key_is_translated(regdb):
    model, official = regdb
    ours = SOURCES["llcm-official"].translate(official)
    assert set(ours) == set(model.state_dict())
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())
    names = official_names(model.state_dict())
    assert {key: names[key] for key in SPELLED_OUT} == SPELLED_OUT


def test_convert_writes_a_folder_that_timm_loads(regdb, checkpoint, tmp_path, capsys):
    folder = tmp_path / "weights"
    arguments = ["convert", str(checkpoint), str(folder), "--model", "deen_resnet50_regdb"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["keys"] == len(regdb[0].state_dict())
    assert (report["identities"], report["epoch"], report["rank1"]) == (5, 7, 0.5)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for key, value in regdb[0].state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_file_of_ours_is_said_to_be_one(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    assert main(["convert", str(tmp_path / "model.safetensors"), "--install"]) == 2
    assert f"local-dir:{tmp_path}" in capsys.readouterr().err


def test_the_folder_loads_in_a_process_that_only_imported_deen_zoo(checkpoint, tmp_path):
    folder = tmp_path / "weights"
    main(["convert", str(checkpoint), str(folder), "--model", "deen_resnet50_regdb"])
    code = """import sys
assert not [name for name in sys.modules if name.startswith(("deen_zoo", "timm"))]
import deen_zoo, timm
print(timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).num_classes)"""
    done = forked.run("-c", code, folder, again=("deen_zoo", "timm"))
    assert done.stdout == "5\n", done.stderr


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("MFA2.CNL.g.weight"), "missing: stages.1.cnl.g.weight"),
        (lambda s: s.update({"MFA9.x": torch.zeros(1)}), "surplus: MFA9.x"),
        (
            lambda s: s.update({"DEE.FC1.bias": torch.zeros(3)}),
            r"misshapen: stages.2.dee.expand.0.bias \(3,\) for \(512,\)",
        ),
    ],
    ids=["missing", "surplus", "misshapen"],
)
def test_a_misfit_is_named(regdb, tmp_path, spoil, message, capsys):
    official = dict(regdb[1])
    spoil(official)
    with pytest.raises(UserError, match=message):
        recognise(official, model="deen_resnet50_regdb", source="llcm-official")
    path = tmp_path / "spoilt.t"
    torch.save({"net": official}, path)
    assert main(["convert", str(path), str(tmp_path / "w"), "--model", "deen_resnet50_regdb"]) == 2
    assert not (tmp_path / "w").exists()
    assert capsys.readouterr().err.count("\n") == 1


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"net": RunsCode()}, "evil.t")
    (tmp_path / "bare.t").write_bytes(pickle.dumps(RunsCode()))
    for name in ("evil.t", "bare.t"):
        assert main(["convert", name, "w", "--model", "deen_resnet50_llcm"]) == 2
        error = capsys.readouterr().err
        assert "refused: " in error and "run " in error
        assert name == "bare.t" or "run posix.system" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "pwned").exists()


def test_other_bad_files(tmp_path, checkpoint):
    (tmp_path / "empty.t").write_bytes(b"")
    (tmp_path / "text.t").write_text("hello")
    (tmp_path / "cut.t").write_bytes(checkpoint.read_bytes()[:100_000])
    torch.save([1, 2], tmp_path / "list.t")
    (tmp_path / "folder.t").mkdir()
    for name in ("absent.t", "empty.t", "text.t", "cut.t", "list.t", "folder.t"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read_checkpoint(tmp_path / name)


def test_class_count(regdb, tmp_path):
    """timm would drop a classifier of another size in silence."""
    folder = deen_zoo.save_pretrained(regdb[0], tmp_path / "five")
    overlay = {"file": str(folder / "model.safetensors")}
    name = "deen_resnet50_regdb"
    with pytest.raises(UserError, match="5 identities .* 206"):
        deen_zoo.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    whole = deen_zoo.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5
    )
    assert torch.equal(whole.classifier.weight, regdb[0].classifier.weight)
    for classes in (0, 9):
        other = deen_zoo.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes
        )
        assert torch.equal(other.bottleneck.weight, regdb[0].bottleneck.weight)


def test_saved_config_has_no_source_and_no_class_count_twice(regdb, tmp_path):
    folder = deen_zoo.save_pretrained(regdb[0], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == 5 and "num_classes" not in config["model_args"]
    assert not {"file", "url", "hf_hub_id"} & set(config["pretrained_cfg"])
    assert set(load_file(folder / "model.safetensors")) == set(regdb[0].state_dict())


@needs_official
@pytest.mark.parametrize("dataset", list(parity.MODELS))
def test_a_real_official_network_converts(dataset, tmp_path):
    net, _ = parity.theirs(dataset, torch.float32)
    path = tmp_path / "best.t"
    torch.save({"net": net.state_dict(), "cmc": np.ones(20), "mAP": 0.5, "epoch": 1}, path)
    convert(path, tmp_path / "w", parity.MODELS[dataset])
    loaded = timm.create_model(f"local-dir:{tmp_path / 'w'}", pretrained=True)
    wanted = parity.run_theirs(net, {}, (128, 64), "visible", train=False)
    got = parity.run_ours(loaded, (128, 64), "visible", train=False)
    assert (got["logits"] - wanted["logits"]).norm() < 1e-5 * wanted["logits"].norm()
    if dataset == "llcm":
        size = (tmp_path / "w" / "model.safetensors").stat().st_size
        assert size < 0.48 * path.stat().st_size
