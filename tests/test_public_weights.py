"""From a public file to a ranked picture and a protocol table, as the README says, per family."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

import deen_zoo
from deen_zoo.cli import main
from deen_zoo.io import sha256
from deen_zoo.models.catalog import weights_home
from deen_zoo.models.convert import SOURCES
from deen_zoo.synthetic import synthesize

from . import seeded, trees
from .reference import needs_official, official, official_net
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
        model.train()(seeded.tensor("images", (4, 3, 128, 64)).float() * 200, "infrared")
    names = source.names(NAMES[key])
    ours = model.state_dict()
    state = {
        theirs: ours[names[theirs]] if theirs in names else torch.tensor(0.0).expand(shape)
        for theirs, shape in NAMES[key].items()
    }
    torch.save({"net": state, "epoch": 1}, path)
    return name


def shrink(folder, size):
    """Make images smaller, to save time."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"]["input_size"] = [3, *size]
    file.write_text(json.dumps(config))


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## Weights of real people\n")[1].split("\n## ")[0]
# The words of the README that differ for another family: the file, the model.
FILE, NAME = "sysu_deen_p4_n4_lr_0.1_seed_0_best.t", "deen_resnet50_sysu"
FILES = {"yyds": FILE, "agw": "sysu_agw_p4_n8_lr_0.1_seed_0_best.t"}


@pytest.mark.slow
@pytest.mark.parametrize("key", ["yyds sysu", "agw sysu"])
def test_the_readmes_words_lead_to_a_picture_and_a_table(key, tmp_path, monkeypatch, capsys):
    """Every block of its section on weights, in order, with a made file and a drawn tree."""
    monkeypatch.setenv("DEEN_ZOO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tag, dataset = key.split()
    if tag == "agw":  # the report's pictures are drawn once
        monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)
    tree = tmp_path / dataset  # of few images: these networks and images are of full size
    synthesize(dataset, tree, 4, images_per_camera=1, test_fraction=0.5, workers=1)
    name = public_file(tmp_path / FILES[tag], key)
    for folder, camera, count in (("night", "cam3", 1), ("day", "cam1", 3)):
        Path(folder).mkdir()
        for i, path in enumerate(sorted((tree / camera).rglob("*.jpg"))[:count]):
            shutil.copy(path, Path(folder, f"{i}.jpg"))

    done: list[str] = []
    for block in re.findall(r"^```sh\n(.*?)^```", SECTION, re.M | re.S):
        block = block.replace(FILE, FILES[tag]).replace(NAME, name)
        block = block.replace("/data/SYSU-MM01", str(tree))
        for line in block.splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "deen-zoo" and main(words) == 0, capsys.readouterr().err
            done.append(words[0])
            if words[0] == "convert" and tag == "yyds":  # AGW's has its full size
                (folder,) = weights_home().iterdir()
                shrink(folder, (192, 72))
    assert done == ["convert", "reproduce", "search"]
    assert f'create_model("{NAME}", pretrained=True)' in SECTION
    assert deen_zoo.create_model(name, pretrained=True).trained_on["source"] == tag

    capsys.readouterr()
    assert main(["weights", name, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["weights"]
    assert [w["source"] for w in listed if w["installed"]] == [tag]
    results = json.loads(Path("runs/sysu/results.json").read_text())
    assert 0 <= results["protocols"]["sysu-all"]["mean"]["r1"] <= 1
    (installed,) = weights_home().iterdir()
    digest = sha256(installed / "model.safetensors")
    assert results["models"][0]["last"]["sha256"] == digest  # it says which weights these are
    report = Path("runs/sysu/report.md").read_text()
    descriptor = {"yyds": "image and mirrored image", "agw": "image alone"}[tag]
    assert "sysu-all" in report and descriptor in report and digest in report
    with Image.open("people.png") as image:
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
        capsys.readouterr()
        assert main([*command, source, "--output", str(tmp_path / output), *options]) == 0
        printed = capsys.readouterr().out
        assert "YYDS" in printed and "89.13" in printed and "difference" in printed
        return json.loads((tmp_path / output / "results.json").read_text())

    results = evaluated(f"{name}.yyds", "all")
    found = results["protocols"][protocol]
    assert [trial["trial"] for trial in found["trials"]] == list(range(1, 11))
    assert found["mean"]["mAP"] == pytest.approx(sum(t["mAP"] for t in found["trials"]) / 10)
    assert [model["split"] for model in results["models"]] == list(range(1, 11))
    assert len({model["last"]["sha256"] for model in results["models"]}) == 10
    folder = str(weights_home() / f"{name}.yyds-split3")
    alone = evaluated(folder, "three", "--splits", "3")["protocols"][protocol]
    assert alone["trials"] == [found["trials"][2]]
    tagless = evaluated(name, "named", "--splits", "3", "7")["protocols"][protocol]
    assert tagless["trials"] == [found["trials"][2], found["trials"][6]]

    report = (tmp_path / "all" / "report.md").read_text()
    rows = [line.split("|")[1:-1] for line in report.splitlines() if line.startswith("| ")]
    measured, published, difference = ([cell.strip() for cell in row] for row in rows[2:5])
    assert measured[0] == protocol and "10 splits, image alone" in measured[1]
    assert "YYDS" in published[1] and "10 splits, image alone" in published[1]
    assert published[2] == "89.13" and published[6] == "81.76" and difference[1] == "difference"
    assert float(difference[2]) == pytest.approx(float(measured[2].split()[0]) - 89.13, abs=0.006)

    capsys.readouterr()
    for file in (weights_home() / f"{name}.yyds-split4").iterdir():
        file.unlink()
    assert main([*command, f"{name}.yyds", "--output", str(tmp_path / "less")]) == 2
    error = capsys.readouterr().err
    assert "split 4" in error and "--splits 1 2 3 5" in error and error.count("\n") == 1


@needs_official
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the reference, which is of 2023
def test_a_checkpoint_of_the_references_training_scores_as_in_its_own_test(
    llcm_tree, tmp_path, monkeypatch, capsys
):
    """Trained a few steps by its classes, converted, installed, evaluated by both programs."""
    monkeypatch.setenv("DEEN_ZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Image, "ANTIALIAS", Image.Resampling.LANCZOS, raising=False)
    root, size = f"{llcm_tree}/", (96, 48)
    net = train_reference(root, size)
    file = tmp_path / "llcm_deen_p2_n3_lr_0.1_seed_0_best.t"
    scores = {"cmc": np.linspace(0.5, 1, 20), "mAP": np.float64(0.5), "mINP": np.float64(0.5)}
    torch.save({"net": net.state_dict(), **scores, "epoch": 2}, file)

    manager, metrics, data = map(official, ("data_manager", "eval_metrics", "data_loader"))
    net.eval()

    @torch.no_grad()
    def describe(images, ids, modal):
        """The six features of test.py in one row: its distmat7 is the sum of their products."""
        rows = torch.stack([x for x, _ in data.TestData(images, ids, to_input(size), size[::-1])])
        both = zip(net(rows, rows, modal), net(rows.flip(3), rows.flip(3), modal), strict=True)
        return torch.cat([f for a, b in both for f in (a + b).chunk(3)], 1).double().numpy()

    theirs = []
    query, q_ids, q_cams = manager.process_query_llcm(root, mode=2)
    rows = describe(query, q_ids, 2)
    for trial in range(3):
        gallery, g_ids, g_cams = manager.process_gallery_llcm(root, mode=1, trial=trial)
        labels = (q_ids, g_ids, q_cams, g_cams)
        # With fewer than 20 identities its CMC of 20 ranks has rows of different lengths.
        distances = -rows @ describe(gallery, g_ids, 1).T
        cmc, m_ap, m_inp = metrics.eval_llcm(distances, *labels, max_rank=1)
        theirs.append((float(cmc[0]), float(m_ap), float(m_inp)))

    installed, ours = converted(file, size, root, "llcm-ir2vis", tmp_path / "run", capsys)
    assert installed == "deen_resnet50_llcm.llcm-official"
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-9
    assert ours[0][1] < 0.999  # not trivially perfect
    assert len({m_ap for _, m_ap, _ in ours}) == 3  # the galleries differ


def converted(file, size, root, protocol, output, capsys):
    """Convert, install and evaluate with images of that size: the name of the weights, and rank-1,
    mAP and mINP of three trials."""
    assert main(["convert", str(file), "--install", "--json"]) == 0
    folder = Path(json.loads(capsys.readouterr().out)["folder"])
    shrink(folder, size)
    words = ["reproduce", protocol.partition("-")[0], "--data-root", root, "--output", str(output)]
    words += ["--eval-only", folder.name, "--protocols", protocol, "--precision", "float32"]
    assert main(words) == 0
    trials = json.loads((output / "results.json").read_text())["protocols"][protocol]["trials"]
    # The references' CMC is in float32.
    return folder.name, [(float(np.float32(t["r1"])), t["mAP"], t["mINP"]) for t in trials[:3]]


def to_input(size):
    """The reference's test transform."""
    normalise = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    steps = [transforms.ToPILImage(), transforms.Resize(size), transforms.ToTensor(), normalise]
    return transforms.Compose(steps)


def train_reference(root, size):
    """A few steps as in the reference's train.py: its data, sampler, losses and optimiser."""
    utils, losses = official("utils"), official("loss")
    data = official("data_loader").LLCMData(root, 1, to_input(size))
    labels = data.train_color_label, data.train_thermal_label
    torch.manual_seed(0)
    np.random.seed(0)
    sampler = utils.IdentitySampler(*labels, *utils.GenIdx(*labels), 2, 3, 0)
    data.cIndex, data.tIndex = sampler.index1, sampler.index2
    net = official_net(713, "llcm").train()
    for module in net.modules():  # a few steps leave the running statistics behind otherwise
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    triplet, cpm = losses.OriTripletLoss(6, 0.3), losses.CPMLoss(margin=0.2)
    optimiser = torch.optim.SGD(net.parameters(), 0.001, 0.9, weight_decay=5e-4, nesterov=True)
    loader = torch.utils.data.DataLoader(data, 6, sampler=sampler, drop_last=True)
    for (visible, infrared, label1, label2), _ in zip(loader, range(3), strict=False):
        twice = torch.cat((label1, label2, label1, label2))
        told = torch.cat((twice, label1, label2))
        feat, out, orthogonality = net(visible, infrared)
        first, second, third = feat.chunk(3)
        pairs = [cpm(torch.cat((first, other)), twice) for other in (second, third)]
        loss = nn.CrossEntropyLoss()(out, told) + triplet(feat, told) + 0.8 * sum(pairs)
        optimiser.zero_grad()
        (loss + 0.01 * orthogonality).backward()
        optimiser.step()
    return net
