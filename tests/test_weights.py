"""The catalog of public weights, and ``deen-zoo weights``."""

from __future__ import annotations

import json

import pytest

from deen_zoo.cli import main
from deen_zoo.models import catalog


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEN_ZOO_HOME", str(tmp_path))
    return catalog.weights_home()


def pretend(home, name):
    folder = home / name
    folder.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_text("")
    return folder


def test_every_public_file_is_listed(home, capsys):
    pretend(home, "deen_resnet50_regdb.yyds-split3")
    pretend(home, "deen_resnet50_sysu.mine")
    (home / "deen_resnet50_llcm.yyds").mkdir()  # of a killed process: not whole
    assert main(["weights", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    models = {(w["source"], w["model"]): w for w in found["weights"]}
    assert len(models) == len(catalog.entries()) == 8
    assert models["yyds", "deen_resnet50_sysu"]["published"][0]["r1"] == 0.7236
    assert [bool(w["installed"]) for w in models.values()].count(True) == 1
    assert models["yyds", "deen_resnet50_regdb"]["installed"]
    assert list(found["other_installed"]) == ["deen_resnet50_sysu.mine"]
    assert main(["weights"]) == 0
    text = capsys.readouterr().out
    for entry in catalog.entries():
        assert all(entry[key] in text for key in entry if key != "source")
    assert "72.36 / 68.24" in text and str(home) in text


def test_one_model(home, capsys):
    assert main(["weights", "agw_resnet50_sysu"]) == 0
    text = capsys.readouterr().out
    assert "agw_resnet50_sysu.agw" in text and "agw_resnet50_sysu.caj" in text
    assert "deen_resnet50" not in text
    assert main(["weights", "resnet50"]) == 2
    assert "deen_resnet50_sysu" in capsys.readouterr().err


def test_where_names_the_place_and_the_commands():
    line = catalog.public_weights("deen_resnet50_sysu")
    assert line.count("\n") == 0
    for words in ("YYDS", "deen-zoo convert FILE --install", "deen-zoo weights"):
        assert words in line
