"""Every fault, injected one by one: ``check`` names it, and the readers stop or count it."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deen_zoo.cli import main
from deen_zoo.data import IdentitySampler, check_dataset, open_dataset, open_image
from deen_zoo.data.check import SHOWN
from deen_zoo.data.datasets import LLCM, RegDB, SysuMM01
from deen_zoo.errors import UserError

from . import trees

NAMES = ("sysu", "regdb", "llcm")
TRAIN_IMAGE = {
    "sysu": "cam1/0002/0001.jpg",
    "regdb": "Visible/2/male_back_v_00000_2.bmp",
    "llcm": "vis/0002/0002_c01_s1_f1_vis.jpg",
}
TEST_IMAGE = {
    "sysu": "cam3/0006/0001.jpg",
    "regdb": "Thermal/3/male_back_t_00001_3.bmp",
    "llcm": "test_nir/cam1/0006/0006_c01_s1_f0_nir.jpg",
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    place = tmp_path_factory.mktemp("check")
    return {name: trees.MAKERS[name](place / name) for name in NAMES}


@pytest.fixture
def copy(roots, tmp_path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(roots[name], tmp_path / name))


def edit(path: Path, pattern: str, replacement: str, count: int = 1) -> None:
    text = path.read_text()
    changed = re.sub(pattern, replacement, text, count=count)
    assert changed != text
    path.write_text(changed)


def read_everything(name: str, root: Path, skip_broken: bool = False) -> Iterator[str]:
    """What training and evaluation do with a dataset: list all samples, then decode them."""
    dataset = open_dataset(name, root, skip_broken)
    for trial in dataset.splits:
        samples = dataset.train(trial) + dataset.test("visible", trial)
        for sample in samples + dataset.test("infrared", trial):
            open_image(sample.path)
            yield dataset.relative(sample.path)


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_tree_has_no_fault(roots, name):
    report = check_dataset(name, roots[name])
    assert report.usable and not report.faults
    assert {note.kind for note in report.notes} <= {"one channel", "official draw"}
    assert report.decoded == len(set(read_everything(name, roots[name])))
    assert report.fingerprint == open_dataset(name, roots[name]).fingerprint()
    assert not report.complete  # it is tiny


@pytest.mark.parametrize("name", NAMES)
def test_the_synthetic_world_has_no_fault(request, name):
    report = check_dataset(name, request.getfixturevalue(f"{name}_tree"))
    cameras = {f"test_{side}/cam{n}/" for side in ("vis", "nir") for n in range(1, 10)}
    assert report.usable
    assert {note.where for note in report.notes} <= {"infrared", *cameras}


DAMAGE = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
    "broken": (lambda path: path.write_bytes(b"\xff\xd8" + b"\x00" * 500), "not an image|broken"),
    "text": (lambda path: path.write_text("404 not found"), "not an image"),
    "dangling link": (
        lambda path: (path.unlink(), path.symlink_to("/nowhere/x.jpg")),
        "there is no such file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("where", [TRAIN_IMAGE, TEST_IMAGE], ids=["train", "test"])
@pytest.mark.parametrize("name", NAMES)
def test_unreadable_images_are_named(copy, name, where, damage):
    root = copy(name)
    inflict, words = DAMAGE[damage]
    inflict(root / where[name])
    report = check_dataset(name, root)
    assert [(fault.kind, fault.where) for fault in report.faults] == [("unreadable", where[name])]
    assert re.match(words, report.faults[0].detail)
    with pytest.raises(UserError, match=f"{re.escape(where[name])}: ({words})"):
        list(read_everything(name, root))
    fast = check_dataset(name, root, decode=False)
    assert fast.usable is (damage in ("truncated", "broken", "text"))
    assert fast.decoded == 0


def lose(*patterns: str) -> Callable[[Path], None]:
    """Removes everything that matches."""

    def inflict(root: Path) -> None:
        for pattern in patterns:
            found = list(root.glob(pattern))
            assert found
            for path in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return inflict


def move(source: str, target: str) -> Callable[[Path], None]:
    return lambda root: (root / source).rename(root / target) and None


def leak(folder: Path, side: str) -> None:
    """Adds the first identity of a training list of RegDB to the test list next to it."""
    lines = (folder / f"train_{side}_2.txt").read_text().splitlines()
    with (folder / f"test_{side}_2.txt").open("a") as file:
        file.writelines(line.removesuffix("0") + "9\n" for line in lines if line.endswith(" 0"))


# dataset, what is done to the tree, the kind and the place that check names; the readers take one
# of an index file as an error, with skip_broken too, any other as an error or a counted warning
FAULTS = {
    "id in another id's folder (test)": (
        "llcm",
        move(TEST_IMAGE["llcm"], "test_nir/cam1/0003/0006_c01_s1_f0_nir.jpg"),
        ("mislabelled", "test_nir/cam1/0003/0006_c01_s1_f0_nir.jpg", "the name says identity 6"),
    ),
    "image in another camera's folder": (
        "llcm",
        move(TEST_IMAGE["llcm"], "test_nir/cam4/0006/0006_c01_s1_f0_nir.jpg"),
        ("mislabelled", "test_nir/cam4/0006/0006_c01_s1_f0_nir.jpg", "the name says camera 1"),
    ),
    "image in the other modality's folder": (
        "llcm",
        move(TEST_IMAGE["llcm"], "test_vis/cam1/0006/0006_c01_s1_f0_nir.jpg"),
        ("mislabelled", "test_vis/cam1/0006/0006_c01_s1_f0_nir.jpg", "the name says nir"),
    ),
    "id in another id's folder (train)": (
        "llcm",
        lambda root: (
            move(TRAIN_IMAGE["llcm"], "vis/0001/0002_c01_s1_f1_vis.jpg")(root),
            edit(root / "idx/train_vis.txt", "vis/0002/0002_c01", "vis/0001/0002_c01"),
        ),
        ("mislabelled", "vis/0001/0002_c01_s1_f1_vis.jpg", "the name says identity 2"),
    ),
    "RegDB id in another id's folder": (
        "regdb",
        lambda root: (
            move(TRAIN_IMAGE["regdb"], "Visible/3/male_back_v_00000_2.bmp")(root),
            [
                edit(index, r"Visible/2/(male_back_v_00000)", r"Visible/3/\1")
                for index in (root / "idx").iterdir()
                if "Visible/2/" in index.read_text()
            ],
        ),
        ("mislabelled", "Visible/3/male_back_v_00000_2.bmp", "the name says v and identity 2"),
    ),
    "label of another identity": (
        "llcm",
        lambda root: edit(root / "idx/train_nir.txt", r"(nir/0002/0002_c04\S+) 1", r"\1 2"),
        ("mislabelled", "nir/0002/0002_c04_s1_f4_nir.jpg", "label 2 in idx/train_nir.txt contra"),
    ),
    "labels that differ between the modalities": (
        "llcm",
        lambda root: edit(root / "idx/train_nir.txt", r" 0\n", " 9\n", count=0),
        ("mislabelled", "nir/0001/0001_c01_s1_f1_nir.jpg", "label 9 in idx/train_nir.txt contra"),
    ),
    "listed but absent": (
        "llcm",
        lose(TRAIN_IMAGE["llcm"]),
        ("missing", TRAIN_IMAGE["llcm"], "listed in idx/train_vis.txt, not on disk"),
    ),
    "listed but absent, RegDB": (
        "regdb",
        lose(TEST_IMAGE["regdb"]),
        ("missing", TEST_IMAGE["regdb"], "listed in idx/"),
    ),
    "listed twice": (
        "regdb",
        lambda root: edit(root / "idx/test_thermal_3.txt", r"^(.*\n)", r"\1\1"),
        ("index", "Thermal/", "listed twice, at last in idx/test_thermal_3.txt"),
    ),
    "a path of another layout in the index": (
        "llcm",
        lambda root: edit(root / "idx/train_vis.txt", "^vis/0001/", "Visible/0001/"),
        ("index", "Visible/0001/", "not vis/IDENTITY/"),
    ),
    "one modality only in training": (
        "sysu",
        lose("cam3/0002", "cam6/0002"),
        ("one-modality", "identity 2", "only visible in training"),
    ),
    "one modality only in training, LLCM": (
        "llcm",
        lambda root: edit(root / "idx/train_vis.txt", r"vis/0002.*\n", "", count=0),
        ("one-modality", "identity 2", "only infrared in training"),
    ),
    "no image of a test identity": (
        "sysu",
        lose("cam?/0006"),
        ("missing", "identity 6", "has no images"),
    ),
    "no image of a training identity": (
        "sysu",
        lose("cam?/0002"),
        ("missing", "identity 2", "has no images"),
    ),
    "no image of a test identity, LLCM": (
        "llcm",
        lose("test_*/cam?/0006"),
        ("missing", "identity 6", "has no images"),
    ),
    "identity in training and test": (
        "sysu",
        lambda root: edit(root / "exp/train_id.txt", "^1", "6,1"),
        ("leak", "identity 6", "in both training and test"),
    ),
    "identity in training and test, LLCM": (
        "llcm",
        lambda root: edit(root / "idx/test_id.txt", "^3", "1,3"),
        ("leak", "identity 1", "in both training and test"),
    ),
    "identity in training and test, RegDB": (
        "regdb",
        lambda root: [leak(root / "idx", side) for side in ("visible", "thermal")],
        ("leak", "identity", "in both training and test"),
    ),
    "index file missing": (
        "sysu",
        lose("exp/test_id.txt"),
        ("index", "index files", "exp/test_id.txt: this index file of SYSU-MM01 is missing; it"),
    ),
    "index file missing, of validation": (
        "sysu",
        lose("exp/val_id.txt"),
        ("index", "index files", "exp/val_id.txt: this index file of SYSU-MM01 is missing"),
    ),
    "index file missing, LLCM": (
        "llcm",
        lose("idx/train_nir.txt"),
        ("index", "index files", "idx/train_nir.txt: this index file of LLCM is missing"),
    ),
    "index file missing, RegDB": (
        "regdb",
        lose("idx/test_thermal_7.txt"),
        ("index", "index files", "idx/test_thermal_7.txt: this index file of RegDB is missing"),
    ),
    "index file empty": (
        "sysu",
        lambda root: (root / "exp/train_id.txt").write_text(" ,\r\n"),
        ("index", "index files", "exp/train_id.txt: an empty file"),
    ),
    "index file of words": (
        "llcm",
        lambda root: edit(root / "idx/test_id.txt", "3", "three"),
        ("index", "index files", "idx/test_id.txt: 'three' is not an identity"),
    ),
    "index file that is no text": (
        "sysu",
        lambda root: (root / "exp/test_id.txt").write_bytes("3,6,10".encode("utf-16")),
        ("index", "index files", "exp/test_id.txt: not a text file"),
    ),
    "line without a label": (
        "regdb",
        lambda root: edit(root / "idx/train_visible_1.txt", r" 0\n", "\n"),
        ("index", "index files", "idx/train_visible_1.txt, line 1: 'Visible/"),
    ),
}


# what else such a fault brings about
FOLLOWING = {
    "labels that differ between the modalities": {"one-modality"},
    "identity in training and test, LLCM": {"missing"},
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_labels_and_lists_are_named(copy, case, capsys):
    name, inflict, (kind, where, detail) = FAULTS[case]
    in_an_index = where == "index files"
    root = copy(name)
    inflict(root)
    report = check_dataset(name, root)
    found = [f for f in report.faults if f.kind == kind and f.where.startswith(where)]
    assert found and detail in found[0].detail, report.faults
    assert {fault.kind for fault in report.faults} == {kind} | FOLLOWING.get(case, set())
    assert not report.usable and found[0].where in str(report) and found[0].detail in str(report)
    assert (report.fingerprint is None) is in_an_index

    with pytest.raises(UserError) as error:
        list(read_everything(name, root))
    assert "\n" not in str(error.value)
    assert any(fault.detail in str(error.value) for fault in report.faults)

    if in_an_index:
        with pytest.raises(UserError):
            list(read_everything(name, root, skip_broken=True))
        return
    with pytest.warns(UserWarning, match=r": \d+ faults? in the \w+ set") as caught:
        left = set(read_everything(name, root, skip_broken=True))
    assert any(detail in str(warning.message) for warning in caught)
    assert not {fault.where for fault in report.faults} & left or kind == "index"
    if kind in ("one-modality", "leak"):
        dataset = open_dataset(name, root, skip_broken=True)
        with pytest.warns(UserWarning, match="fault"):
            identities = {s.identity for s in dataset.train(2 if name == "regdb" else 1)}
        assert int(found[0].where.split()[1]) not in identities


@pytest.mark.parametrize("name", NAMES)
def test_a_test_identity_of_one_modality_is_noted_and_counted(copy, name):
    root = copy(name)
    if name == "regdb":
        identity = next(iter({s.identity for s in open_dataset(name, root).test("visible", 1)}))
        edit(root / "idx/test_visible_1.txt", rf"Visible/{identity}/.*\n", "", count=0)
    else:
        identity = 6
        lose("cam[1245]/0006" if name == "sysu" else "test_vis/*/0006")(root)
    report = check_dataset(name, root)
    assert report.usable
    lonely = [note.where for note in report.notes if note.kind == "one-modality"]
    assert lonely == [f"identity {identity}"]
    protocol = {"sysu": "sysu-all", "regdb": "regdb-ir2vis", "llcm": "llcm-ir2vis"}[name]
    with pytest.warns(UserWarning, match=rf"1 test identity .* such as {identity} \(infrared\)"):
        queries = open_dataset(name, root).query(protocol)
    assert identity in {sample.identity for sample in queries}


@pytest.mark.parametrize("name", NAMES)
def test_stray_files_are_named_and_change_nothing(copy, name):
    root = copy(name)
    before = check_dataset(name, root)
    folder = (root / TRAIN_IMAGE[name]).parent
    strays = [folder / x for x in ("Thumbs.db", ".DS_Store", "._0001.jpg", "notes.txt")]
    strays += [folder.parent / "0001.jpg", root / "train_rgb_resized_img.npy"]
    if name == "sysu":  # in the other two a name that is not listed is "unused"
        strays.append(folder / "0001 (copy).jpg")
    for stray in strays:
        stray.write_bytes(b"stray")
    (root / "__MACOSX").mkdir()
    report = check_dataset(name, root)
    assert report.usable and report.counts == before.counts
    assert report.fingerprint == before.fingerprint
    named = {note.where for note in report.notes if note.kind == "stray"}
    assert named == {str(stray.relative_to(root)) for stray in strays} | {"__MACOSX/"}


def test_images_in_no_split_are_counted(copy):
    root = copy("llcm")
    for n in range(3):
        trees.write(root / f"vis/0003/0003_c0{n + 1}_s1_f1_vis.jpg", "visible")
    notes = [note for note in check_dataset("llcm", root).notes if note.kind == "unused"]
    assert len(notes) == 1 and notes[0].where == "vis/"
    assert notes[0].detail.startswith("3 images in no split, such as vis/0003/0003_c01")
    (root / "test_nir/cam1/0777").mkdir()
    notes = check_dataset("llcm", root).notes
    assert ("empty folder", "test_nir/cam1/0777/") in [note[:2] for note in notes]


def test_a_link_to_a_folder_above_does_not_hang(copy):
    root = copy("sysu")
    (root / "cam1/0006/up").symlink_to(root)
    report = check_dataset("sysu", root)
    assert report.usable and any(note.where.startswith("cam1/0006/up/") for note in report.notes)


def test_official_draw_is_checked_beforehand(copy):
    pytest.importorskip("scipy")
    from .test_draws import write_permutations

    root = copy("sysu")
    write_permutations(root)
    assert not [n for n in check_dataset("sysu", root).notes if n.kind == "official draw"]
    write_permutations(root, drop=2)
    notes = [n for n in check_dataset("sysu", root).notes if n.kind == "official draw"]
    assert len(notes) == 1 and "not on disk" in notes[0].detail


def test_counts_stand_beside_the_expected_ones(roots, monkeypatch):
    report = check_dataset("sysu", roots["sysu"], decode=False)
    rows = report.to_dict()["counts"]
    assert rows["train"]["visible"] == {"found": 44, "expected": 22258}
    assert rows["test"]["infrared camera 3"]["expected"] == 1883
    assert rows["sysu-all"]["gallery"]["expected"] == 301
    text = str(check_dataset("regdb", roots["regdb"], decode=False))
    assert re.search(r"train 1,2,3,4,5,6,7,8,9,10 +identities +3 +206  differs\n", text), text
    assert text.count("identities") == 2
    whole = check_dataset("regdb", roots["regdb"], decode=False)
    monkeypatch.setattr(RegDB, "expected", whole.counts)
    assert whole.complete and "differs" not in str(whole) and "on request" not in str(whole)


def test_expected_counts_add_up():
    sysu, llcm = SysuMM01.expected, LLCM.expected
    images = [sysu["train"]["visible"], sysu["train"]["infrared"], *sysu["sysu-all"].values()]
    assert sum(images) == 38271
    for modality in ("visible", "infrared"):
        cameras = [n for what, n in sysu["test"].items() if what.startswith(f"{modality} ")]
        assert sum(cameras) == sysu["test"][modality]
    sides = [llcm[split][side] for split in ("train", "test") for side in ("visible", "infrared")]
    assert sum(sides) == 46767 and llcm["train"]["identities"] + llcm["test"]["identities"] == 1064
    assert sysu["train"]["identities"] + sysu["test"]["identities"] == 491
    for trial in range(1, 11):
        halves = [RegDB.expected[f"{split} {trial}"] for split in ("train", "test")]
        assert sum(half["identities"] for half in halves) == 412
        assert sum(half["visible"] + half["infrared"] for half in halves) == 8240


def test_command(copy, capsys):
    root = copy("llcm")
    assert main(["check", "llcm", str(root)]) == 0
    text = capsys.readouterr()
    assert "usable, counts differ" in text.out and text.err == f"checking llcm at {root}\n"
    image = root / TEST_IMAGE["llcm"]
    image.write_bytes(image.read_bytes()[:-100])
    assert main(["check", "llcm", str(root), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] is False and report["counts"]["train"]["identities"]["found"] == 3
    assert report["faults"][0]["where"] == TEST_IMAGE["llcm"]
    assert main(["check", "llcm", str(root), "--fast"]) == 0
    capsys.readouterr()
    for wrong, words in ((root.parent, f"did you mean {root}?"), (root / "no", "no such folder")):
        assert main(["check", "llcm", str(wrong)]) == 2
        error = capsys.readouterr()
        assert error.out == "" and words in error.err and "Traceback" not in error.err
        assert error.err.splitlines()[-1].startswith("deen-zoo check: error: ")
    assert main(["check", "market", str(root)]) == 2
    assert "sysu" in capsys.readouterr().err


def test_long_lists_are_cut_in_the_text_alone(copy):
    root = copy("sysu")
    for n in range(SHOWN + 7):
        (root / f"cam1/0006/._{n:03d}.jpg").write_bytes(b"")
    (root / "cam1/0006" / os.fsdecode(b"\xff\xfe.db")).write_bytes(b"")  # a name that is not UTF-8
    report = check_dataset("sysu", root)
    assert len([note for note in report.notes if note.kind == "stray"]) == SHOWN + 8
    assert "8 more of stray" in str(report)
    str(report).encode()
    json.dumps(report.to_dict())


def test_check_is_silent_about_what_it_reports(copy):
    root = copy("sysu")
    lose("cam3/0002", "cam6/0002", "cam[1245]/0006")(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not check_dataset("sysu", root).usable


def test_identities_that_lose_a_modality_to_broken_images_are_left_out_too(copy):
    """B15: the sampler refused after "usable", and the fingerprint counted unused images."""
    root = copy("llcm")
    broken = sorted((root / "nir/0002").iterdir())
    for image in broken:
        image.write_bytes(b"broken")
    report = check_dataset("llcm", root)
    assert [f.kind for f in report.faults] == ["unreadable"] * len(broken) + ["one-modality"]
    assert report.faults[-1].where == "identity 2"
    dataset = open_dataset("llcm", root, skip_broken=True)
    dataset.leave_out(fault.where for fault in report.faults if fault.kind == "unreadable")
    with pytest.warns(UserWarning, match="1 fault .*identity 2"):
        samples = dataset.train()
    assert {s.identity for s in samples} == {1, 4}
    IdentitySampler(*([s.identity for s in samples if s.modality == m]
                      for m in ("visible", "infrared")), 2, 1)  # fmt: skip
    used = dataset.fingerprint()
    assert used["counts"]["train"]["identities"] == 2
    assert used["images"] < report.fingerprint["images"] - len(broken)
