"""Images of one's own: folders and CSV files."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from deen_zoo.cli import main
from deen_zoo.data import Sample, check_dataset, open_dataset
from deen_zoo.data.folder import UNKNOWN, list_images, read_csv
from deen_zoo.errors import UserError
from deen_zoo.evaluation import evaluate

from .trees import write


def test_images_at_any_depth_sorted_and_the_other_files(tmp_path):
    for name in ("b/10.jpg", "b/9.jpg", "a.bmp", ".hidden/x.jpg", "b/._9.jpg"):
        write(tmp_path / name, "visible")
    (tmp_path / "b" / "notes.txt").write_text("x")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    images, others = list_images(tmp_path)
    assert [os.path.relpath(p, tmp_path) for p in images] == ["a.bmp", "b/10.jpg", "b/9.jpg"]
    assert [os.path.relpath(p, tmp_path) for p in others] == ["b/notes.txt"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_images(tmp_path / "absent")


def test_csv(tmp_path):
    file = tmp_path / "images.csv"
    file.write_text(
        "\ufeffcamera, path ,identity,modality,note\n"
        "3,a/1.jpg,0007,infrared,x\n,/b.jpg,,visible,\n",
        encoding="utf-8",
    )
    assert read_csv(file) == [
        Sample(str(tmp_path / "a/1.jpg"), 7, 3, "infrared"),
        Sample("/b.jpg", UNKNOWN, UNKNOWN, "visible"),
    ]
    file.write_text("path\nx.jpg\n")
    assert read_csv(file, "infrared")[0].modality == "infrared"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line is ''; write path,identity,camera,modality"),
        ("file,identity\nx.jpg,1\n", "the first line is 'file,identity'"),
        ("path,modality\n", "no rows"),
        ("path,modality\nx.jpg,nir\n", "line 2: modality 'nir'; write 'visible' or 'infrared'"),
        ("path,modality\nx.jpg,auto\n", "line 2: modality 'auto'"),
        ("path\nx.jpg\n", "line 2: modality ''"),
        ("path,modality\n,visible\n", "line 2: no path"),
        ("path,modality,identity\nx.jpg,visible,-7\n", "line 2: identity '-7'"),
        ("path,modality,camera\nx.jpg,visible,-1\n", "line 2: camera '-1'"),
        ("path,modality\nx.jpg\n", "line 2: not 2 cells"),
        ("path,modality\nx.jpg,visible,3\n", "line 2: not 2 cells"),
    ],
)
def test_csv_faults_are_named_by_line(text, message, tmp_path):
    file = tmp_path / "images.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_csv(file)
    assert str(file) in str(caught.value)


def test_csv_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_csv(tmp_path / "absent.csv")
    (tmp_path / "latin.csv").write_bytes(b"path,modality\n\xe9.jpg,visible\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_csv(tmp_path / "latin.csv")


def test_two_folders(tmp_path):
    write(tmp_path / "visible/0007/a.jpg", "visible")
    write(tmp_path / "visible/12/cam3/b.jpg", "visible")
    write(tmp_path / "infrared/7/x.bmp", "infrared")
    samples = open_dataset("own", tmp_path).test()
    assert [(os.path.relpath(s.path, tmp_path), *s[1:]) for s in samples] == [
        ("visible/0007/a.jpg", 7, 1, "visible"),
        ("visible/12/cam3/b.jpg", 12, 3, "visible"),
        ("infrared/7/x.bmp", 7, 2, "infrared"),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["visible/1/a.jpg"], "no folder infrared"),
        (["a.jpg"], "no folder visible and infrared"),
        (["visible/a.jpg", "infrared/1/a.jpg"], "visible/a.jpg: not visible/IDENTITY"),
        (["visible/1/a/b/c.jpg", "infrared/1/a.jpg"], "not visible/IDENTITY"),
        (["visible/1/a.jpg", "infrared/1/a.txt"], "no infrared image"),
        (["visible/-1/a.jpg", "infrared/1/a.jpg"], "visible/-1/a.jpg: identity '-1'; write"),
    ],
)
def test_other_layouts_are_refused(names, message, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        open_dataset("own", tmp_path).test()


def own_tree(root):
    """Eight people to train on, in folders; two to test on, in a CSV file."""
    for identity in range(1, 9):
        for modality in ("visible", "infrared"):
            for n in range(2):
                write(root / f"train/{modality}/{identity}/{n}.jpg", modality, identity + n)
    rows = ["path,identity,camera,modality"]
    for identity in (17, 19):
        for n, modality in enumerate(("infrared", "visible", "visible")):
            write(root / f"test/all/{identity}-{n}.jpg", modality, identity + n)
            rows.append(f"all/{identity}-{n}.jpg,{identity},,{modality}")
    (root / "test/images.csv").write_text("\n".join(rows))
    return root


def test_own_data_is_a_dataset(tmp_path):
    dataset = open_dataset("own", own_tree(tmp_path))
    assert len(dataset.train()) == 32 and {s.identity for s in dataset.train()} == {*range(1, 9)}
    assert [(s.identity, s.camera) for s in dataset.test("infrared")] == [(17, 2), (19, 2)]
    assert len(dataset.query("own-vis2ir")) == 4 and len(dataset.gallery("own-vis2ir")) == 2
    report = check_dataset("own", tmp_path)
    assert report.usable and report.complete
    assert [note.where for note in report.notes] == ["test/images.csv", "infrared"]  # one channel
    assert report.counts["test"]["identities"] == 2
    assert main(["check", "own", str(tmp_path)]) == 0
    write(tmp_path / "train/visible/17/x.jpg", "visible")
    write(tmp_path / "train/infrared/17/x.jpg", "infrared")
    assert main(["check", "own", str(tmp_path)]) == 1
    with pytest.raises(UserError, match="identity 17: "):
        open_dataset("own", tmp_path).train()


def test_own_data_mistakes(tmp_path, capsys):
    for message in ("there is no such folder", "it has no folder visible and infrared"):
        assert main(["check", "own", str(tmp_path / "data")]) == 2
        assert message in capsys.readouterr().err
        (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "images.csv").write_text("path,modality\nx.jpg,visible\n")
    with pytest.raises(UserError, match=r"images\.csv: 1 row"):
        open_dataset("own", tmp_path).test()


def test_own_protocols_over_a_feature_file(tmp_path, capsys):
    samples = open_dataset("own", own_tree(tmp_path)).test("visible")
    samples += open_dataset("own", tmp_path).test("infrared")
    features = np.eye(20)[[s.identity for s in samples]]
    file = tmp_path / "f.npz"
    np.savez(file, features=features, paths=[s.path for s in samples])
    arguments = ["evaluate", str(file), "--data-root", str(tmp_path), "--json"]
    for protocol in ("own-ir2vis", "own-vis2ir"):
        assert main([*arguments, "--protocol", protocol]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["mean"]["mAP"] == 1 and result["published"] == []


@pytest.mark.slow
def test_own_data_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)  # no pictures
    root = own_tree(tmp_path / "own")
    arguments = ["reproduce", "own", "--data-root", str(root), "--output", str(tmp_path / "run")]
    arguments += ["--model", "test_deen_resnet", "--recipe", "synthetic", "--epochs", "1"]
    arguments += ["--set", "data.image_size=[64, 32]"]
    assert main([*arguments, "--threads", "1", "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["protocols"]) == {"own-ir2vis", "own-vis2ir"}
    assert results["protocols"]["own-ir2vis"]["counts"]["queries"] == 2


def test_people_who_never_meet_are_found_before_training(tmp_path, capsys):
    """Training went on until the first test, which then had no match."""
    for part, modality, people in (
        ("train", "visible", "12"), ("train", "infrared", "12"),
        ("test", "visible", "34"), ("test", "infrared", "56"),
    ):  # fmt: skip
        for person in people:
            write(tmp_path / f"own/{part}/{modality}/{person}/a.jpg", modality)
    command = ["reproduce", "own", "--data-root", str(tmp_path / "own"), "--device", "cpu"]
    command += ["--model", "test_deen_resnet", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "own-ir2vis" in error and "gallery" in error
    assert not (tmp_path / "run" / "states").exists()


def test_identities_may_be_words(tmp_path):
    """C9: person_001 was refused."""
    for identity in ("person_001", "0007", "alice"):
        for modality in ("visible", "infrared"):
            write(tmp_path / modality / identity / "cam2/a.jpg", modality)
    dataset = open_dataset("own", tmp_path)
    samples = dataset.test("visible") + dataset.test("infrared")
    assert {s.identity for s in samples} == {"person_001", 7, "alice"}
    features = np.eye(3)[[["person_001", 7, "alice"].index(s.identity) for s in samples]]
    assert evaluate(features, samples, "own-ir2vis").mean["mAP"] == 1
    table = tmp_path / "test.csv"
    table.write_text("path,modality,identity,camera\nx.jpg,visible,alice,door\n")
    assert read_csv(table)[0][1:3] == ("alice", "door")
    assert check_dataset("own", tmp_path).usable


def test_one_layout_for_evaluation_and_below_train_and_test_for_training(tmp_path, capsys):
    """C11: README's layout was refused by `check own` and `reproduce own`."""
    for modality in ("visible", "infrared"):
        write(tmp_path / f"own/{modality}/1/a.jpg", modality)
    root = tmp_path / "own"
    assert main(["check", "own", str(root)]) == 0
    assert "not trained on" in capsys.readouterr().out
    dataset = open_dataset("own", root)
    assert not dataset.trainable and len(dataset.query("own-ir2vis")) == 1
    assert dataset.fingerprint()["images"] == 2
    with pytest.raises(UserError, match="ROOT/train"):
        dataset.train()


def test_an_identity_without_images_is_a_fault(tmp_path):
    """B11: `reproduce own` trained without that person."""
    root = own_tree(tmp_path)
    (root / "train/visible/9").mkdir()
    (root / "train/visible/9/a.heic").write_bytes(b"x")
    with pytest.raises(UserError, match="train/visible/9: no image"):
        open_dataset("own", root).train()
    assert [f.where for f in check_dataset("own", root).faults] == ["train/visible/9"]
    with pytest.warns(UserWarning, match="training set") as caught:
        open_dataset("own", root, skip_broken=True).train()
    said = " ".join(str(warning.message) for warning in caught)
    assert "1 fault" in said and "train/visible/9/a.heic" in said
