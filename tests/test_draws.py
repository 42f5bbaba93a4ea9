"""Gallery draws and query lists, name for name those of the reference and of the SYSU authors."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from deen_zoo.data import PROTOCOLS, Sample, draw_gallery, open_dataset
from deen_zoo.data.protocols import read_permutations
from deen_zoo.errors import MissingExtraError, UserError

from . import trees
from .reference import needs_official, official

GOLDEN = Path(__file__).parent / "golden" / "draws.json"  # the reference's own output
STRAYS = ("Thumbs.db", ".DS_Store", "._0001.jpg", "0001.jpg.part", "desktop.ini")
IDENTITIES = (2, 10, 101, 999)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    # "cam" in the root's path breaks the reference; here it must not matter
    place = tmp_path_factory.mktemp("cam3")
    makers = {"sysu": trees.sysu, "llcm": trees.llcm}
    return {name: make(place / name, test=IDENTITIES, images=3) for name, make in makers.items()}


@pytest.fixture(scope="module")
def official_roots(roots, tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    return {name: Path(shutil.copytree(root, place / name)) for name, root in roots.items()}


def our_lists(root: Path, name: str) -> dict[str, list[str]]:
    dataset = open_dataset(name, root)
    lists = {}
    for protocol, terms in PROTOCOLS.items():
        for trial in terms.trials if terms.dataset == name else ():
            for side, read in (("query", dataset.query), ("gallery", dataset.gallery)):
                if trial == 0 or terms.sampled == side:
                    names = [dataset.relative(sample.path) for sample in read(protocol, trial)]
                    lists[f"{protocol} {side} {trial}"] = names
    return lists


def official_lists(root: Path, name: str) -> dict[str, list[str]]:
    manager = official("data_manager")
    query = getattr(manager, f"process_query_{name}")
    gallery = getattr(manager, f"process_gallery_{name}")
    # the reference's mode, and how its two sides are used: (query mode, gallery mode, sampled)
    modes = {
        "sysu-all": ("all", "all", "gallery"),
        "sysu-indoor": ("indoor", "indoor", "gallery"),
        "llcm-ir2vis": (2, 1, "gallery"),
        "llcm-vis2ir": (1, 2, "gallery"),
        "llcm-vis2ir-official": (1, 2, "query"),  # test_mode [2, 1]: it swaps the two at the end
    }
    lists = {}
    for protocol, (query_mode, gallery_mode, sampled) in modes.items():
        if not protocol.startswith(name):
            continue
        whole = "gallery" if sampled == "query" else "query"
        lists[f"{protocol} {whole} 0"] = query(str(root), query_mode)
        for trial in range(10):
            lists[f"{protocol} {sampled} {trial}"] = gallery(str(root), gallery_mode, trial)
    strip = len(str(root)) + 1
    return {key: [path[strip:] for path in paths] for key, (paths, _, _) in lists.items()}


@pytest.mark.parametrize("name", ["sysu", "llcm"])
def test_lists_equal_the_golden_ones(roots, name):
    golden = json.loads(GOLDEN.read_text())[name]
    ours = our_lists(roots[name], name)
    assert ours.keys() == golden.keys()
    for key in golden:
        assert ours[key] == golden[key], key


@needs_official
@pytest.mark.parametrize("name", ["sysu", "llcm"])
def test_golden_lists_are_what_the_reference_says(official_roots, name):
    assert official_lists(official_roots[name], name) == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", ["sysu", "llcm"])
def test_stray_files_change_no_draw(tmp_path, name):
    root = trees.MAKERS[name](tmp_path)
    clean = our_lists(root, name)
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        for stray in STRAYS:
            (folder / stray).write_bytes(b"stray")
        if any(folder.glob("*.jpg")):
            (folder / "0000.jpg").mkdir()
    assert our_lists(root, name) == clean


def test_the_global_random_state_is_left_alone(roots):
    random.seed(7)
    before = random.getstate()
    open_dataset("sysu", roots["sysu"]).gallery("sysu-all", 4)
    assert random.getstate() == before


def side(images: int) -> list[Sample]:
    return [
        Sample(f"cam{camera}/{identity:04d}/{n:04d}.jpg", identity, camera, "visible")
        for identity in (3, 20, 100)
        for camera in (1, 2, 5)
        for n in range(1, images + 1)
    ]


@pytest.mark.parametrize(("images", "each"), [(4, 4), (10, 10), (25, 10)])
def test_multi_shot_takes_ten_or_all_of_each_identity_and_camera(images, each):
    samples = side(images)
    drawn = draw_gallery(samples, 0, shots=10)
    assert len(drawn) == len(set(drawn)) == 9 * each
    keys = [(samples[i].identity, samples[i].camera) for i in drawn]
    assert keys == sorted(keys)
    assert all(keys.count(key) == each for key in keys)
    assert drawn == draw_gallery(samples, 0, shots=10)
    assert images <= 10 or drawn != draw_gallery(samples, 1, shots=10)


def test_a_trial_may_be_an_integer_of_numpy():
    assert draw_gallery(side(6), np.int64(4)) == draw_gallery(side(6), 4)


def test_shots_must_be_positive():
    with pytest.raises(UserError, match="shots 0"):
        draw_gallery(side(2), 0, shots=0)


def write_permutations(root: Path, drop: int = 0) -> dict[tuple[int, int], np.ndarray]:
    """The authors' file for a tree: a cell of six cameras, each a cell of identities."""
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    known, cells = {}, np.empty((6, 1), object)
    for camera in range(1, 7):
        folders = sorted((root / f"cam{camera}").iterdir())
        last = int(folders[-1].name)
        cells[camera - 1, 0] = np.empty((last, 1), object)
        for identity in range(1, last + 1):
            n = len(list((root / f"cam{camera}/{identity:04d}").glob("*.jpg"))) + drop
            rows = [rng.permutation(n) + 1 for _ in range(10)]
            cells[camera - 1, 0][identity - 1, 0] = np.array(rows, np.uint8).reshape(10, n)
            known[identity, camera] = cells[camera - 1, 0][identity - 1, 0]
    savemat(root / "exp/rand_perm_cam.mat", {"rand_perm_cam": cells})
    return known


@pytest.fixture(scope="module")
def permuted(tmp_path_factory):
    """A tree with the authors' file, and what that holds."""
    pytest.importorskip("scipy")
    root = trees.sysu(tmp_path_factory.mktemp("permuted"), images=4)
    return open_dataset("sysu", root), write_permutations(root)


@pytest.mark.parametrize("shots", [1, 10])
@pytest.mark.parametrize(
    ("protocol", "cameras"), [("sysu-all", (1, 2, 4, 5)), ("sysu-indoor", (1, 2))]
)
def test_official_draw_takes_the_first_of_the_permutation(permuted, protocol, cameras, shots):
    dataset, known = permuted
    for trial in (0, 3, 9):
        gallery = dataset.gallery(protocol, trial, draw="official", shots=shots)
        assert [dataset.relative(s.path) for s in gallery] == [
            f"cam{camera}/{identity:04d}/{number:04d}.jpg"
            for identity in trees.TEST
            for camera in cameras
            for number in known[identity, camera][trial][:shots]
        ]


def test_official_draw_errors(tmp_path):
    pytest.importorskip("scipy")
    dataset = open_dataset("sysu", trees.sysu(tmp_path))
    with pytest.raises(UserError, match=r"rand_perm_cam\.mat: .*no such file"):
        dataset.gallery("sysu-all", draw="official")
    mat = tmp_path / "exp/rand_perm_cam.mat"
    mat.write_bytes(b"not a mat file")
    with pytest.raises(UserError, match="not the authors'"):
        read_permutations(tmp_path)
    write_permutations(tmp_path, drop=3)  # drawn for a tree with three more images in each folder
    with pytest.raises(UserError, match="not on disk"):
        dataset.gallery("sysu-all", draw="official", shots=10)
    with pytest.raises(UserError, match="has no trial 10"):
        draw_gallery(dataset.test("visible"), 10, permutations=read_permutations(tmp_path))


def test_official_draw_without_scipy_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/rand_perm_cam.mat").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deen-zoo\[mat\]'"):
        read_permutations(tmp_path)


def test_draw_arguments_are_checked(tmp_path):
    llcm = open_dataset("llcm", trees.llcm(tmp_path / "llcm"))
    regdb = open_dataset("regdb", trees.regdb(tmp_path / "regdb"))
    with pytest.raises(UserError, match="has no official draw"):
        llcm.gallery("llcm-ir2vis", draw="official")
    with pytest.raises(UserError, match="draw 'random'"):
        llcm.gallery("llcm-ir2vis", draw="random")
    for arguments in ({"shots": 10}, {"draw": "official"}):
        with pytest.raises(UserError, match="takes the whole gallery"):
            regdb.gallery("regdb-vis2ir", **arguments)
    with pytest.raises(UserError, match="takes the whole gallery"):
        llcm.gallery("llcm-vis2ir-official", shots=10)
    with pytest.raises(UserError, match="trials 0 to 9, not"):
        llcm.gallery("llcm-ir2vis", 10)
    with pytest.raises(UserError, match="trials 1 to 10, not"):
        regdb.query("regdb-vis2ir", 0)
    with pytest.raises(UserError, match=r"sysu-all.*llcm-ir2vis"):
        llcm.query("sysu-all")
