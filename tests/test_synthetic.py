"""The synthetic world: its trees, its determinism, its speed, and that it is hard the right way."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deen_zoo.cli import main
from deen_zoo.data import check_dataset, open_dataset
from deen_zoo.errors import UserError
from deen_zoo.synthetic import LAYOUTS, Person, contact_sheet, picture, synthesize, tree
from deen_zoo.synthetic.tree import _signals_wait

from . import forked

DOCS = Path(__file__).parents[1] / "docs"
NAMES = {
    "sysu": r"cam[1-6]/\d{4}/\d{4}\.jpg",
    "regdb": r"(Visible/(\d+)/(fe)?male_(front|back)_v_\d{5}_\2"
    r"|Thermal/(\d+)/(fe)?male_(front|back)_t_\d{5}_\5)\.bmp",
    "llcm": r"(vis/(\d{4})/\2_c0[1-9]_s\d{6}_f\d+_vis|nir/(\d{4})/\3_c0[1-9]_s\d{6}_f\d+_nir"
    r"|test_vis/cam([1-9])/(\d{4})/\5_c0\4_s\d{6}_f\d+_vis"
    r"|test_nir/cam([124-9])/(\d{4})/\7_c0\6_s\d{6}_f\d+_nir)\.jpg",
}


@pytest.fixture(params=["sysu", "regdb", "llcm"])
def world(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return request.param, request.getfixturevalue(f"{request.param}_tree")


def images(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in (".jpg", ".bmp"))


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    rows = [f"{f.relative_to(root)} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files]
    return "\n".join(rows)


def test_files_are_named_and_counted_as_in_the_real_dataset(world: tuple[str, Path]) -> None:
    name, root = world
    found = [str(path.relative_to(root)) for path in images(root)]
    assert not [path for path in found if not re.fullmatch(NAMES[name], path)]
    note = json.loads((root / "synthetic.json").read_text())
    assert note["visible_images"] + note["infrared_images"] == len(found)
    modes = {(p.split("/")[0], Image.open(root / p).mode) for p in found}
    assert {mode for _, mode in modes} == {"RGB"}  # the reference cannot read one channel
    assert not list(root.glob(".*"))


def test_readers_find_every_image_and_check_passes(world: tuple[str, Path]) -> None:
    name, root = world
    dataset, note = open_dataset(name, root), json.loads((root / "synthetic.json").read_text())
    train, test = dataset.train(), dataset.test("visible") + dataset.test("infrared")
    trained, tested = ({s.identity for s in side} for side in (train, test))
    if name != "regdb":  # whose labels number each side from 0
        assert not trained & tested
    assert len(trained) + len(tested) == note["identities"] == 10
    assert len(tested) == note["test_identities"]
    paths = {str(Path(s.path).relative_to(root)) for s in train + test}
    assert paths == {str(path.relative_to(root)) for path in images(root)}
    assert check_dataset(name, root).usable


@pytest.mark.parametrize("layout", ["sysu", "llcm"])
def test_every_query_has_a_match_that_its_rule_allows(layout: str) -> None:
    for identity in range(1, 400):
        shots = tree._sightings(layout, 3, identity, 1, test=True)
        seen = {m: {s.camera for s in shots if s.modality == m} for m in ("visible", "infrared")}
        assert seen["visible"] <= set(LAYOUTS[layout].visible)
        assert seen["infrared"] <= set(LAYOUTS[layout].infrared)
        if layout == "sysu":  # camera 3 ignores camera 2, indoors there is camera 1 besides
            assert 1 in seen["visible"] and len(seen["visible"]) > 1
        else:  # the same camera is ignored, and test_nir has no camera 3
            assert min(map(len, seen.values())) > 1 and 3 not in seen["infrared"]


def test_regdb_trials_split_the_people_in_halves(regdb_tree: Path) -> None:
    def people(side: str, trial: int) -> frozenset[str]:
        lines = (regdb_tree / f"idx/{side}_visible_{trial}.txt").read_text().splitlines()
        return frozenset(line.split("/")[1] for line in lines)

    for trial in range(1, 11):
        assert len(people("train", trial)) == len(people("test", trial)) == 5
        assert not people("train", trial) & people("test", trial)
    assert len({people("test", trial) for trial in range(1, 11)}) > 5


def test_official_gallery_draws_are_a_matlab_file(sysu_tree: Path) -> None:
    loadmat = pytest.importorskip("scipy.io").loadmat
    cells = loadmat(sysu_tree / "exp/rand_perm_cam.mat")["rand_perm_cam"]
    assert cells.shape == (6, 1)
    for camera in range(1, 7):
        for identity in range(1, 11):
            rows = cells[camera - 1][0].squeeze()[identity - 1]
            files = list((sysu_tree / f"cam{camera}/{identity:04d}").glob("*.jpg"))
            assert rows.shape == ((10, 3) if files else (0, 0))
            assert all(sorted(row) == [1, 2, 3] for row in rows.tolist())


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_seed_is_the_same_to_the_byte_for_any_number_of_workers(
    layout: str, tmp_path: Path
) -> None:
    def make(name: str, seed: int, workers: int) -> str:
        synthesize(layout, tmp_path / name, 6, seed, images_per_camera=1, workers=workers)
        return digest(tmp_path / name)

    one = make("one", 5, 1)
    assert make("two", 5, 2) == one
    assert make("other", 6, 1) != one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "market"}, "'market': choose from sysu, regdb, llcm"),
        ({"people": 3}, "people is 3; give a number from 4 to 9999"),
        ({"test_fraction": 1.5}, "test_fraction is 1.5"),
    ],
)
def test_bad_numbers_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        synthesize(**{"layout": "llcm", "root": tmp_path / "new", **change})  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["synthesize", "llcm", str(tmp_path)]) == 2
    out = capsys.readouterr()
    assert out.out == "" and "is not empty" in out.err and out.err.count("\n") == 1
    with pytest.raises(UserError, match="is a file"):
        synthesize("llcm", tmp_path / "precious.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_tree_never_looks_complete(
    existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, drawn = tmp_path / "tree", []
    if existed:
        root.mkdir()

    def slow(*shot: object) -> Image.Image:
        drawn.append(shot)
        assert (tmp_path / "tree.partial").is_dir() and not any(root.glob("*"))
        if len(drawn) == 9:
            raise KeyboardInterrupt
        return Image.new("L", (4, 4))

    monkeypatch.setattr(tree, "picture", slow)
    with pytest.raises(KeyboardInterrupt):
        synthesize("sysu", root, 8, workers=1)
    assert len(drawn) == 9
    assert root.exists() == existed and not any(root.glob("*"))
    assert [path.name for path in tmp_path.iterdir()] == (["tree"] if existed else [])


DRAW = """
import sys
from deen_zoo.synthetic import synthesize
print("begun", flush=True)
synthesize("llcm", sys.argv[1], 16, images_per_camera=1, workers=3)
"""


def drawing(root: Path) -> forked.Program:
    """A process that draws a tree, in a group of its own."""
    process = forked.Program("-c", DRAW, root)
    while process.said(0) != "begun\n":
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    return process


def group_is_gone(group: int) -> bool:
    """Whether no process of the group is left, within a minute."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_killed_tree_is_drawn_again(tmp_path: Path) -> None:
    """A3: kill -9 while a tree is drawn leaves no folder of that name and no worker behind."""
    root = tmp_path / "data"
    process = drawing(root)
    while not any(tmp_path.glob("data.partial/*/*/*.jpg")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not root.exists() and group_is_gone(process.pid)
    synthesize("llcm", root, 4, images_per_camera=1, workers=1)
    assert check_dataset("llcm", root).usable
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.slow
def test_an_interrupt_while_the_pool_starts_ends_everything(tmp_path: Path) -> None:
    """A5: Ctrl-C around the start of the pool: KeyboardInterrupt, no deadlock and no orphan."""
    for n in range(12):
        process = drawing(tmp_path / f"{n}")
        time.sleep(n / 100)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=1000)
        assert process.returncode and said.rstrip().endswith("KeyboardInterrupt")
        assert group_is_gone(process.pid) and not (tmp_path / f"{n}").exists()


def test_an_interrupt_that_another_thread_receives_waits_for_the_pool() -> None:
    """A5: the system gives a signal to any thread, tqdm's monitor or NumPy's too."""
    end, reached = threading.Event(), threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()

    def start() -> None:
        with _signals_wait():
            signal.pthread_kill(other.ident, signal.SIGINT)
            time.sleep(0.2)
            reached.set()

    with pytest.raises(KeyboardInterrupt):
        start()
    end.set()
    assert reached.is_set() and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_scipy_the_matlab_file_is_left_out_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.warns(UserWarning, match=r"rand_perm_cam.mat is not written.*deen-zoo\[mat\]"):
        synthesize("sysu", tmp_path / "tree", 4, images_per_camera=1)
    assert check_dataset("sysu", tmp_path / "tree").usable


def test_command_writes_a_tree_and_a_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, sheet = tmp_path / "deep/regdb", tmp_path / "sheet.png"
    options = ["--people", "4", "--images-per-camera", "1", "--test-fraction", "0.75"]
    assert main(["synthesize", "regdb", str(root), *options, "--json", "--sheet", str(sheet)]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["identities"], out["test_identities"], out["visible_images"]) == (4, 2, 4)
    assert Image.open(sheet).size == (4 * 3 * 64 + 12, 2 * (128 + 4))
    assert main(["synthesize", "regdb", str(tmp_path / "more"), *options]) == 0
    assert "8 images (4 visible, 4 infrared) of 4 people" in capsys.readouterr().out


def test_where_the_sheet_goes_is_looked_at_before_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, sheet = tmp_path / "regdb", tmp_path / "absent" / "sheet.png"
    options = ["--people", "4", "--images-per-camera", "1"]
    assert main(["synthesize", "regdb", str(root), *options, "--sheet", str(sheet)]) == 2
    assert "sheet.png: " in capsys.readouterr().err and not root.exists()
    inside = str(root / "sheet.png")
    assert main(["synthesize", "regdb", str(root), *options, "--sheet", inside]) == 0
    assert Path(inside).exists()


def test_the_picture_in_the_docs_is_of_this_world() -> None:
    committed = DOCS / "synthetic.png"
    assert committed.stat().st_size < 400_000
    fresh = contact_sheet("sysu", seed=1).convert("RGB")
    with Image.open(committed) as image:
        old = np.asarray(image.convert("RGB"), float)
    assert abs(np.asarray(fresh, float) - old).mean() < 2  # other versions of Pillow may round


def test_infrared_brightness_says_nothing_about_colour() -> None:
    people = [Person(0, identity) for identity in range(600)]
    cloths = [cloth for p in people for cloth in (p.top, p.bottom, p.shoes, p.bag_cloth)]
    colour = np.array([[np.mean(rgb) for rgb in cloth.visible] for cloth in cloths])
    infrared = np.array([cloth.infrared for cloth in cloths])
    assert abs(np.corrcoef(colour[:, 0], infrared[:, 0])[0, 1]) < 0.06
    same_sign = (np.diff(colour) > 0) == (np.diff(infrared) > 0)
    assert abs(same_sign.mean() - 0.5) < 0.04  # even which of ground and motif is brighter
    assert np.abs(np.diff(infrared)).min() > 0.29 and np.abs(np.diff(colour)).min() > 0.24


def rank1(query: np.ndarray, gallery: np.ndarray, people: int) -> float:
    """Share of rows of ``query`` whose nearest row of ``gallery`` (by cosine) is its own person."""

    def centred(rows: np.ndarray) -> np.ndarray:
        flat = rows.reshape(len(rows), -1).astype(float)
        return np.asarray(flat - flat.mean(1, keepdims=True))

    query, gallery = centred(query), centred(gallery)
    similarity = query @ (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).T
    return float((similarity.argmax(1) % people == np.arange(len(query)) % people).mean())


def test_pixels_and_colours_match_within_a_modality_and_not_across() -> None:
    people, size = 80, (32, 64)

    def look(camera: int, modality: str) -> np.ndarray:
        shots = [picture("sysu", 0, n, camera, modality, 0) for n in range(1, people + 1)]
        return np.stack([np.asarray(s.convert("RGB").resize(size)) for s in shots])

    def colours(pictures: np.ndarray) -> np.ndarray:  # the middle of the picture, in six bands
        bands = [band for p in pictures[:, :, 8:24] for band in np.array_split(p, 6)]
        counts = [np.histogram(b[..., c], 12, (0, 256))[0] for b in bands for c in range(3)]
        return np.reshape(counts, (people, -1))

    visible, other, infrared = look(1, "visible"), look(2, "visible"), look(3, "infrared")
    for describe, within in ((lambda p: p.mean(3), 0.12), (colours, 0.25)):
        seen = [describe(pictures) for pictures in (visible, other, infrared)]
        assert rank1(seen[0], seen[1], people) > within  # so the measure can see something
        assert rank1(seen[2], seen[0], people) < 3.5 / people  # chance is 1 / people
        assert rank1(seen[0], seen[2], people) < 3.5 / people
