"""Weights by name: installed ones, none at all, and what is never asked for."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import timm
import torch

import deen_zoo
from deen_zoo.errors import UserError
from deen_zoo.models import catalog, pretrained

NAME = "deen_resnet50_regdb"
SMALL = dict(backbone="resnet10t", backbone_args=dict(channels=(8, 8, 8, 8)))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEN_ZOO_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "HUB_ORGANISATION", None)
    pretrained._say_once.cache_clear()
    return catalog.weights_home()


def install(home, tag, classes=4):
    model = deen_zoo.create_model(NAME, num_classes=classes, **SMALL)
    model.trained_on = {"source": tag, "dataset": "regdb"}
    return model, deen_zoo.save_pretrained(model, home / f"{NAME}.{tag}")


def test_an_empty_machine_says_where_weights_are(home, monkeypatch):
    """D4: the default organisation, which anybody may register, was asked for weights."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    places: dict[str, set[str]] = {}
    for entry in catalog.entries():
        places.setdefault(entry["model"], set()).add(entry["repository"])
    assert set(deen_zoo.list_models("deen_*")) <= set(places)
    for name, repositories in places.items():
        for create in (deen_zoo.create_model, timm.create_model):
            with pytest.raises(UserError) as caught:
                create(name, pretrained=True)
            message = str(caught.value)
            assert "\n" not in message
            for part in (*repositories, "deen-zoo convert FILE --install", name):
                assert part in message
            assert f"create_model('{name}', pretrained=True)" in message
    with pytest.raises(UserError, match="No public weights") as caught:
        deen_zoo.create_model("agw_resnet50_llcm", pretrained=True)
    assert "convert" not in str(caught.value) and "deen-zoo reproduce" in str(caught.value)
    with pytest.raises(UserError, match=r"official has no weights .*_model\('deen_resnet50_llcm',"):
        deen_zoo.create_model("deen_resnet50_llcm.official", pretrained=True)
    with pytest.raises(UserError, match="not on the Hub"):
        deen_zoo.create_model(NAME, pretrained=True, revision="v1")


def test_the_oldest_pillow_reads_images_rightly():
    """D5: Pillow 9.3 turned TIFFs twice, and 10.2 called good JPEGs broken."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    oldest = re.search(r'"pillow>=([\d.]+)"', project)
    assert oldest and tuple(map(int, oldest[1].split("."))) >= (10, 3)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.mine"])
@pytest.mark.parametrize("create", [deen_zoo.create_model, timm.create_model])
def test_installed_weights_are_found_by_name_and_tag(home, name, create, capsys):
    model, _folder = install(home, "mine")
    for _ in range(2):
        found = create(name, pretrained=True)
    assert capsys.readouterr().err.count("using the installed") == 1
    assert found.num_classes == 4 and found.trained_on == model.trained_on
    assert found.pretrained_cfg["input_size"] == (3, 384, 144)  # timm's tools add a tuple
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)
    assert create(name, pretrained=True, num_classes=0).num_classes == 0
    with pytest.raises(UserError, match=r"other has no weights .*mine"):
        create(f"{NAME}.other", pretrained=True)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"deen_zoo": []}', '{"deen_zoo": 5}'])
def test_installed_weights_with_a_broken_configuration_are_one_line(home, text):
    _, folder = install(home, "mine")
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="mine.*(not JSON|configuration|config.json|architecture)"):
        deen_zoo.create_model(NAME, pretrained=True)


def test_weights_come_from_the_caller_then_this_machine_then_the_hub(home, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def download(repo, filename, revision, cache_dir):
        raise Asked(repo, revision)

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    monkeypatch.setitem(pretrained.PINNED, NAME, ("deen-zoo/model@" + "a" * 40, "b" * 64))
    other = deen_zoo.create_model(NAME, num_classes=3, **SMALL)
    deen_zoo.save_pretrained(other, tmp_path / "named")
    with pytest.raises(Asked, match=f"deen-zoo/model.*{'a' * 40}"):  # what is pinned, and only that
        deen_zoo.create_model(NAME, pretrained=True)
    with pytest.raises(UserError, match="no weights"):
        deen_zoo.create_model("deen_resnet50_sysu", pretrained=True)
    monkeypatch.setattr(pretrained, "HUB_ORGANISATION", "lab")
    with pytest.raises(Asked, match=f"lab/{NAME}.*None"):
        deen_zoo.create_model(NAME, pretrained=True)
    install(home, "mine")
    assert deen_zoo.create_model(NAME, pretrained=True).num_classes == 4
    with pytest.raises(Asked, match="ORG/NAME"):
        deen_zoo.create_model("hf-hub:ORG/NAME", pretrained=True)
    named = deen_zoo.create_model(f"local-dir:{tmp_path / 'named'}", pretrained=True)
    assert named.num_classes == 3
    overlay = {"file": str(tmp_path / "named" / "model.safetensors")}
    named = deen_zoo.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **SMALL
    )
    assert torch.equal(named.bottleneck.weight, other.bottleneck.weight)
    assert torch.equal(named.classifier.weight, other.classifier.weight)


def test_several_installed_weights_are_named(home):
    install(home, "yyds-split1"), install(home, "yyds-split2")
    for name in (NAME, f"{NAME}.yyds"):
        with pytest.raises(UserError, match="yyds-split1, .*yyds-split2"):
            deen_zoo.create_model(name, pretrained=True)
    assert deen_zoo.create_model(f"{NAME}.yyds-split2", pretrained=True).num_classes == 4


def test_only_what_can_be_had_is_listed():
    """C6: three models without weights were listed."""
    ours = set(deen_zoo.list_models())
    assert ours & set(timm.list_models(pretrained=True)) == {"test_deen_resnet"}
    assert [name for name in ours if timm.is_model_pretrained(name)] == ["test_deen_resnet"]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    """D1: timm before 1.0.26 ran it."""
    import pickle

    class Malice:
        def __reduce__(self):
            return shutil.rmtree, (str(tmp_path / "victim"),)

    (tmp_path / "victim").mkdir()
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps({"classifier.weight": Malice()}))
    overlay = {"pretrained_cfg_overlay": {"file": str(evil)}}
    backbone = dict(backbone="resnet10t", pretrained_backbone=True)
    for create in (deen_zoo.create_model, timm.create_model):
        for kwargs in (
            dict(checkpoint_path=str(evil)),
            dict(pretrained=True, **overlay),
            dict(backbone_args=overlay, **backbone),
            dict(backbone_args={"checkpoint_path": str(evil)}),
        ):
            with pytest.raises(Exception, match=r"weights_only|not loaded"):
                create("test_deen_resnet", **kwargs)
    assert (tmp_path / "victim").exists()
    if sys.version_info >= (3, 11):
        from pathlib import Path

        import tomllib

        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
        assert "timm>=1.0.26" in project["project"]["dependencies"]
