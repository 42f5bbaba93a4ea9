"""From a public file to a ranked picture and a protocol table, as the README says, per family."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

import deen_zoo
from deen_zoo.cli import main
from deen_zoo.models.catalog import weights_home
from deen_zoo.models.convert import SOURCES

from . import seeded, trees
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
    assert protocol in report and "image and mirrored image" in report

    sides = {"llcm": ("test_nir", "test_vis"), "sysu": ("cam3", "cam1")}[dataset]
    night = sorted((tree / sides[0]).rglob("*.jpg"))[:2]
    day = sorted((tree / sides[1]).rglob("*.jpg"))[:6]
    picture = tmp_path / "ranking.png"
    search = ["search", "--query", *map(str, night), "--query-modality", "infrared", "--gallery"]
    search += [*map(str, day), "--gallery-modality", "visible", "--model", name, "-k", "3"]
    assert main([*search, "-o", str(picture)]) == 0, capsys.readouterr().err
    with Image.open(picture) as image:
        assert image.width > 100 and image.height > 100


def test_the_ten_splits_are_evaluated_in_one_command(tmp_path, monkeypatch, capsys):
    """Each on its own split, averaged, next to what their source published and the difference."""
    monkeypatch.setenv("DEEN_ZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)  # no pictures
    root = trees.regdb(tmp_path / "regdb", 6, 2)
    name, protocol = "test_deen_resnet", "regdb-ir2vis"
    for split in range(1, 11):
        torch.manual_seed(split)
        model = deen_zoo.create_model(name, num_classes=3, flip=False)
        model.trained_on = {"source": "yyds", "dataset": "regdb", "split": split}
        deen_zoo.save_pretrained(model, weights_home() / f"{name}.yyds-split{split}")
    command = ["reproduce", "regdb", "--data-root", str(root), "--threads", "1", "--protocols",
               protocol, "--device", "cpu", "--eval-only"]  # fmt: skip

    def evaluated(source, output, *options):
        assert main([*command, source, "--output", str(tmp_path / output), *options]) == 0
        return json.loads((tmp_path / output / "results.json").read_text())

    results = evaluated(f"{name}.yyds", "all")
    found = results["protocols"][protocol]
    assert [trial["trial"] for trial in found["trials"]] == list(range(1, 11))
    assert found["mean"]["mAP"] == pytest.approx(sum(t["mAP"] for t in found["trials"]) / 10)
    assert [model["trial"] for model in results["models"]] == list(range(1, 11))
    assert len({model["last"]["sha256"] for model in results["models"]}) == 10
    folder = str(weights_home() / f"{name}.yyds-split3")
    alone = evaluated(folder, "three", "--trials", "3")["protocols"][protocol]
    assert alone["trials"] == [found["trials"][2]]
    tagless = evaluated(name, "named", "--trials", "3", "7")["protocols"][protocol]
    assert tagless["trials"] == [found["trials"][2], found["trials"][6]]

    report = (tmp_path / "all" / "report.md").read_text()
    rows = [line.split("|")[1:-1] for line in report.splitlines() if line.startswith("| ")]
    measured, published, difference = ([cell.strip() for cell in row] for row in rows[2:5])
    assert measured[0] == protocol and "10 split trials, image alone" in measured[1]
    assert "YYDS" in published[1] and "10 split trials, image alone" in published[1]
    assert published[2] == "89.13" and published[6] == "81.76" and difference[1] == "difference"
    assert float(difference[2]) == pytest.approx(float(measured[2].split()[0]) - 89.13, abs=0.006)

    capsys.readouterr()
    for file in (weights_home() / f"{name}.yyds-split4").iterdir():
        file.unlink()
    assert main([*command, f"{name}.yyds", "--output", str(tmp_path / "less")]) == 2
    error = capsys.readouterr().err
    assert "split 4" in error and "--trials 1 2 3 5" in error and error.count("\n") == 1
