"""From a public file to a ranked picture and a protocol table, as the README says, per family."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

import deen_zoo
from deen_zoo.cli import main
from deen_zoo.models.convert import SOURCES

from . import seeded
from .test_sources import NAMES


def public_file(path, key):
    """A file with the names and shapes of a source, of seeded weights that tell people apart."""
    tag, dataset = key.split()
    source = SOURCES[tag]
    name = f"{source.family}_resnet50_{dataset}"
    model = deen_zoo.create_model(name, **source.arguments(name))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        height = model.pretrained_cfg["input_size"][1]
        model.train()(seeded.tensor("images", (4, 3, height, 144)).float() * 200, "infrared")
    names = source.names(NAMES[key])
    ours = model.state_dict()
    state = {
        theirs: ours[names[theirs]] if theirs in names else torch.tensor(0.0).expand(shape)
        for theirs, shape in NAMES[key].items()
    }
    torch.save({"net": state, "epoch": 1}, path)
    return name


@pytest.mark.slow
@pytest.mark.parametrize("key", ["yyds llcm", "agw sysu"])
def test_two_commands_to_a_picture_and_a_table(
    key, llcm_tree, sysu_tree, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("DEEN_ZOO_HOME", str(tmp_path / "home"))
    tag, dataset = key.split()
    tree = {"llcm": llcm_tree, "sysu": sysu_tree}[dataset]
    file = tmp_path / f"{dataset}_{tag}_best.t"
    name = public_file(file, key)

    assert main(["convert", str(file), "--install"]) == 0
    capsys.readouterr()
    assert main(["weights", name, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["weights"]
    assert [w["source"] for w in listed if w["installed"]] == [tag]

    protocol = {"llcm": "llcm-ir2vis", "sysu": "sysu-all"}[dataset]
    run = tmp_path / "run"
    arguments = ["reproduce", dataset, "--data-root", str(tree), "--output", str(run)]
    assert main([*arguments, "--eval-only", name, "--protocols", protocol]) == 0
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["protocols"][protocol]["mean"]["r1"] <= 1
    report = (run / "report.md").read_text()
    assert protocol in report and "Descriptor: official" in report

    sides = {"llcm": ("test_nir", "test_vis"), "sysu": ("cam3", "cam1")}[dataset]
    night = sorted((tree / sides[0]).rglob("*.jpg"))[:2]
    day = sorted((tree / sides[1]).rglob("*.jpg"))[:6]
    picture = tmp_path / "ranking.png"
    search = ["search", "--query", *map(str, night), "--query-modality", "infrared", "--gallery"]
    search += [*map(str, day), "--gallery-modality", "visible", "--model", name, "-k", "3"]
    assert main([*search, "-o", str(picture)]) == 0, capsys.readouterr().err
    with Image.open(picture) as image:
        assert image.width > 100 and image.height > 100
