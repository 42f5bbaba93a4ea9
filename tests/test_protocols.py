"""Named protocols: who is compared to whom in each trial, against the reference's own script."""

from __future__ import annotations

import csv
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from deen_zoo.data import PROTOCOLS, Sample, draw_gallery, open_dataset
from deen_zoo.errors import UserError
from deen_zoo.evaluation import KReciprocal, evaluate, evaluate_ranking, images_of, merge_trials
from deen_zoo.evaluation.results import METRICS

from .reference import needs_official, official

GOLDEN = Path(__file__).parent / "golden" / "protocols.json"


def world(identities=24, cameras=(1, 2, 3, 4), images=3) -> list[Sample]:
    return [
        Sample(f"{modality}/cam{camera}/{identity:04d}/{n}.jpg", identity, camera, modality)
        for modality in ("visible", "infrared")
        for camera in cameras
        for identity in range(1, identities + 1)
        for n in range(1 + (identity + camera) % images)
    ]


def features_of(samples: list[Sample], size=16, noise=1.2, seed=0) -> np.ndarray:
    """Rows that depend on the path alone, so that any order of samples gives the same."""
    means = np.random.default_rng(seed).standard_normal((1000, size))
    return np.stack(
        [
            means[s.identity]
            + noise * np.random.default_rng(zlib.crc32(s.path[-24:].encode())).standard_normal(size)
            for s in samples
        ]
    )


WORLD = world()
FEATURES = features_of(WORLD)
# SYSU-MM01 has visible cameras 1, 2, 4, 5 and infrared ones 3, 6: the same images in the same order
_SYSU_CAMERAS = {"visible": {3: 4, 4: 5}, "infrared": {1: 6, 2: 6, 4: 6}}


def world_of(protocol: str) -> list[Sample]:
    """WORLD, with cameras that the protocol has."""
    if not protocol.startswith("sysu"):
        return WORLD
    return [s._replace(camera=_SYSU_CAMERAS[s.modality].get(s.camera, s.camera)) for s in WORLD]


def by_hand(protocol: str, trial: int, shots=1) -> dict[str, float]:
    """One trial by the table of the protocols, with a similarity of its own."""
    terms, samples = PROTOCOLS[protocol], world_of(protocol)
    rows = {side: [i for i, s in enumerate(samples) if s.modality == side] for side in
            ("visible", "infrared")}  # fmt: skip
    query, gallery = rows[terms.query], rows[terms.gallery]
    if protocol == "sysu-indoor":
        gallery = [i for i in gallery if samples[i].camera in (1, 2)]
    if protocol == "llcm-vis2ir-official":
        query = [query[i] for i in draw_gallery([samples[i] for i in query], trial, shots)]
    elif terms.sampled:
        gallery = [gallery[i] for i in draw_gallery([samples[i] for i in gallery], trial, shots)]
    result = evaluate_ranking(
        FEATURES[query] @ FEATURES[gallery].T,
        [samples[i].identity for i in query],
        [samples[i].identity for i in gallery],
        [samples[i].camera for i in query],
        [samples[i].camera for i in gallery],
        rule=terms.rule,
    )
    ranks = {f"r{k}": result.cmc[k - 1] for k in (1, 5, 10, 20)}
    return {**ranks, "mAP": result.mAP, "mINP": result.mINP}


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_trials_equal_those_made_by_hand(protocol, shots):
    if not PROTOCOLS[protocol].sampled:
        numbers, shots = [3] if protocol.startswith("regdb") else [1], 1
        result = evaluate(FEATURES, world_of(protocol), protocol, trials=numbers)
        assert (result.draw, result.shots) == (None, None)
    else:
        numbers = list(range(10))
        result = evaluate(FEATURES, world_of(protocol), protocol, shots=shots)
        assert (result.draw, result.shots) == ("seeded", shots)
    expected = [by_hand(protocol, t, shots) for t in numbers]
    assert [t.number for t in result.trials] == numbers
    for trial, values in zip(result.trials, expected, strict=True):
        assert trial.metrics == pytest.approx(values, abs=1e-12)
    for key in METRICS:
        values = [e[key] for e in expected]
        assert result.mean[key] == pytest.approx(np.mean(values), abs=1e-12)
        assert result.std[key] == pytest.approx(np.std(values), abs=1e-12)
    if len(numbers) > 1:
        assert result.std["r1"] > 0  # the draws do differ


def reference_run(protocol: str, root: Path) -> list[tuple[np.ndarray, float, float]]:
    """The ten trials of the reference's test.py, over features of ours."""
    manager, evaluators = official("data_manager"), official("eval_metrics")
    dataset, _, mode = protocol.partition("-")

    def rows(paths):
        return features_of([Sample(path, int(Path(path).parent.name), 0, "") for path in paths])

    trials = []
    for trial in range(10):
        if dataset == "sysu":
            query = manager.process_query_sysu(str(root), mode=mode)
            gallery = manager.process_gallery_sysu(str(root), mode=mode, trial=trial)
        elif mode == "vis2ir-official":  # its test_mode [2, 1]: what it drew becomes the queries
            gallery = manager.process_query_llcm(str(root), mode=1)
            query = manager.process_gallery_llcm(str(root), mode=2, trial=trial)
        else:
            of_query, of_gallery = (2, 1) if mode == "ir2vis" else (1, 2)
            query = manager.process_query_llcm(str(root), mode=of_query)
            gallery = manager.process_gallery_llcm(str(root), mode=of_gallery, trial=trial)
        distance = -(rows(query[0]) @ rows(gallery[0]).T)
        evaluator = getattr(evaluators, f"eval_{dataset}")
        trials.append(evaluator(distance, query[1], gallery[1], query[2], gallery[2]))
    return trials


def write_names(layout: str, root: Path) -> Path:
    """A test set of empty files: neither our reader nor the reference's opens them. Its galleries
    have more than 20 identities, for the reference cannot stack curves of different lengths."""
    ids = range(1, 27)
    folders = {
        "sysu": [(f"cam{c}", "") for c in range(1, 7)] + [("exp", None)],
        "llcm": [(f"test_vis/cam{c}", "vis") for c in range(1, 10)]
        + [(f"test_nir/cam{c}", "nir") for c in (1, 2, 4, 5, 6, 7, 8, 9)]
        + [(name, None) for name in ("vis", "nir", "idx")],
    }[layout]
    for folder, side in folders:
        (root / folder).mkdir(parents=True)
        camera = int(folder[-1]) if side is not None else 0
        for identity in ids if camera else ():
            (root / folder / f"{identity:04d}").mkdir()
            for n in range(1, 2 + (identity * camera) % 3):
                name = f"{n:04d}" if side == "" else f"{identity:04d}_c{camera:02d}_s{n}_f1_{side}"
                (root / folder / f"{identity:04d}" / f"{name}.jpg").touch()
    where = root / ("exp" if layout == "sysu" else "idx")
    (where / "test_id.txt").write_text(",".join(map(str, ids)))
    return root


@needs_official
@pytest.mark.parametrize("protocol", [p for p in PROTOCOLS if p.startswith(("sysu", "llcm"))])
def test_whole_protocols_equal_the_reference_live(protocol, tmp_path):
    name = PROTOCOLS[protocol].dataset
    root = write_names(name, tmp_path / "data")
    dataset = open_dataset(name, root)
    samples = dataset.test("infrared") + dataset.test("visible")
    result = evaluate(features_of(samples), samples, protocol)
    expected = reference_run(protocol, root)
    assert result.mean["r1"] < 1 and len(expected) == len(result.trials) == 10
    for trial, (cmc, precision, penalty) in zip(result.trials, expected, strict=True):
        np.testing.assert_array_equal(trial.ranking.cmc.astype(np.float32), cmc)
        assert trial.ranking.mAP == pytest.approx(precision, abs=1e-12)
        assert trial.ranking.mINP == pytest.approx(penalty, abs=1e-12)


@pytest.mark.parametrize("protocol", json.loads(GOLDEN.read_text()))
def test_recorded_numbers(protocol):
    recorded = json.loads(GOLDEN.read_text())[protocol]
    result = evaluate(FEATURES, world_of(protocol), protocol)
    assert result.mean == pytest.approx(recorded["mean"], abs=1e-9)
    assert result.std == pytest.approx(recorded["std"], abs=1e-9)


def test_order_of_the_samples_and_other_images_change_nothing():
    extra = [Sample("visible/other.jpg", 900, 7, "visible")]  # a camera that indoor ignores
    samples = world_of("sysu-indoor") + extra
    order = np.random.default_rng(0).permutation(len(samples))
    shuffled = [samples[i] for i in order]
    before = evaluate(FEATURES, world_of("sysu-indoor"), "sysu-indoor")
    after = evaluate(features_of(shuffled), shuffled, "sysu-indoor")
    assert after.mean == pytest.approx(before.mean, abs=1e-12)
    assert [[s.path for s in t.gallery] for t in after.trials] == [
        [s.path for s in t.gallery] for t in before.trials
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_features(dtype):
    features = torch.from_numpy(FEATURES).to(dtype).requires_grad_()
    result = evaluate(features, WORLD, "llcm-ir2vis", trials=2)
    same = evaluate(features.detach().double().numpy(), WORLD, "llcm-ir2vis", trials=2)
    assert result.mean == pytest.approx(same.mean, abs=1e-6)


def test_one_product_for_all_trials(monkeypatch):
    products = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: products.append(a.shape) or matmul(a, b)
    )
    evaluate(FEATURES, WORLD, "llcm-ir2vis")
    evaluate(FEATURES, WORLD, "llcm-vis2ir-official", rerank=KReciprocal(4, 2))
    assert len(products) == 2


def test_official_draw():
    samples = [
        Sample(f"cam{camera}/{identity:04d}/{n:04d}.jpg", identity, camera, modality)
        for identity in (5, 9)
        for camera, modality in ((1, "visible"), (4, "visible"), (6, "infrared"))
        for n in (1, 2, 3)
    ]
    rows = [[3, 1, 2], [2, 3, 1]] * 5  # one permutation a trial
    permutations = {(identity, camera): rows for identity in (5, 9) for camera in (1, 4)}
    features = features_of(samples)
    result = evaluate(
        features, samples, "sysu-all", draw="official", permutations=permutations, trials=2
    )
    assert result.to_dict()["draw"] == "official"
    names = [[Path(s.path).name for s in t.gallery] for t in result.trials]
    assert names == [["0003.jpg"] * 4, ["0002.jpg"] * 4]


def test_regdb_splits_are_merged():
    splits = [evaluate(FEATURES, WORLD, "regdb-vis2ir", trials=[t]) for t in (2, 1, 3)]
    merged = merge_trials(splits)
    assert [t.number for t in merged.trials] == [1, 2, 3]
    assert merged.mean == pytest.approx(splits[0].mean) and merged.std["mAP"] == 0
    with pytest.raises(UserError, match=r"twice among \[1, 1\]"):
        merge_trials([splits[1], splits[1]])
    with pytest.raises(UserError, match="cannot join"):
        merge_trials([splits[0], evaluate(FEATURES, WORLD, "regdb-ir2vis")])
    with pytest.raises(UserError, match="no results"):
        merge_trials([])


def test_camera_pairs():
    result = evaluate(FEATURES, WORLD, "llcm-ir2vis", trials=3, camera_pairs=True)
    pairs = {(p.query_camera, p.gallery_camera): p for p in result.camera_pairs}
    assert list(pairs) == [(a, b) for a in (1, 2, 3, 4) for b in (1, 2, 3, 4)]
    assert pairs[2, 2].r1 is None and pairs[2, 2].queries == 0  # the rule ignores its matches
    expected = []
    for t in result.trials:
        q = [i for i, s in enumerate(WORLD) if s in t.queries and s.camera == 1]
        g = [WORLD.index(s) for s in t.gallery if s.camera == 3]
        ids = [[WORLD[i].identity for i in side] for side in (q, g)]
        expected.append(evaluate_ranking(FEATURES[q] @ FEATURES[g].T, *ids, rule="regdb").mAP)
    assert pairs[1, 3].mAP == pytest.approx(np.mean(expected))
    assert json.dumps(result.to_dict()["camera_pairs"])


def test_per_query_csv(tmp_path):
    samples = [*WORLD, Sample("infrared/alone.jpg", 500, 1, "infrared")]
    result = evaluate(features_of(samples), samples, "llcm-ir2vis", trials=2)
    result.write_queries(tmp_path / "queries.csv")
    with open(tmp_path / "queries.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * sum(s.modality == "infrared" for s in samples)
    valid = [row for row in rows if row["first_rank"]]
    assert [row["path"] for row in rows if not row["first_rank"]] == ["infrared/alone.jpg"] * 2
    assert np.mean([row["first_rank"] == "1" for row in valid]) == pytest.approx(result.mean["r1"])
    precisions = [float(row["average_precision"]) for row in valid]
    assert np.mean(precisions) == pytest.approx(result.mean["mAP"])


def test_to_dict_is_plain_and_complete():
    result = json.loads(json.dumps(evaluate(FEATURES, world_of("sysu-all"), "sysu-all").to_dict()))
    infrared = [s for s in WORLD if s.modality == "infrared"]
    assert result["counts"] == {
        "queries": len(infrared),
        "valid_queries": len(infrared),
        "gallery": 24 * 4,
        "identities": 24,
    }
    assert result["expected_counts"] == {"queries": 3803, "gallery": 301, "identities": 96}
    assert set(result["mean"]) == set(result["std"]) == set(METRICS)
    assert len(result["trials"]) == 10 and set(result["trials"][0]) == {"trial", *METRICS}
    assert result["published"][0]["r1"] == 0.747


def changed(**fields) -> list[Sample]:
    return [WORLD[0]._replace(**fields), *WORLD[1:]]


NAN = FEATURES.copy()
NAN[3, 5] = np.nan
BAD = {
    "protocol": (dict(protocol="llcm"), "protocol 'llcm': choose from sysu-all"),
    "draw": (dict(draw="random"), "draw 'random'"),
    "official_llcm": (dict(draw="official"), "llcm-ir2vis has no official draw"),
    "no_permutations": (dict(protocol="sysu-all", draw="official"), "read_permutations"),
    "permutations": (dict(permutations={}), "read_permutations"),
    "shots": (dict(shots=0), "shots 0"),
    "regdb_shots": (dict(protocol="regdb-ir2vis", shots=10), "takes the whole gallery"),
    "regdb_trials": (dict(protocol="regdb-ir2vis", trials=10), "another split"),
    "trials": (dict(trials=11), "trials is 11; llcm-ir2vis has 1 to 10"),
    "no_trials": (dict(trials=0), "trials is 0"),
    "trial": (dict(trials=[10]), r"llcm-ir2vis has trials 0 to 9, not \[10\]"),
    "infrared_cameras": (  # B14: cameras 1 and 2, which are no infrared ones, were scored
        dict(protocol="sysu-all"),
        "infrared/cam1/0001/0.jpg: sysu-all has no infrared camera 1",
    ),
    "rows": (dict(features=FEATURES[:-1]), "rows of features for"),
    "integers": (dict(features=np.ones((len(WORLD), 4), int)), "floats"),
    "vector": (dict(features=FEATURES[:, 0]), "floats"),
    "nan": (dict(features=NAN), f"1 image are NaN.*{WORLD[3].path}"),
    "no_identity": (dict(samples=changed(identity=-1)), f"{WORLD[0].path}: its identity is not"),
    "no_camera": (dict(samples=changed(camera=-1)), f"{WORLD[0].path}: its camera is not known"),
    "modality": (dict(samples=changed(modality="thermal")), "modality 'thermal'"),
    "twice": (dict(samples=changed(path=WORLD[1].path)), "comes twice"),
    "indoor": (
        dict(
            protocol="sysu-indoor",
            samples=[s._replace(camera=5 if s.modality == "visible" else 3) for s in WORLD],
        ),
        "no gallery: no visible image of cameras",
    ),
    "one_side": (
        dict(samples=[s._replace(modality="visible") for s in WORLD]),
        "no query: no infrared image",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_clear_line(name):
    change, message = BAD[name]
    arguments = {"features": FEATURES, "samples": WORLD, "protocol": "llcm-ir2vis", **change}
    with pytest.raises(UserError, match=message) as caught:
        evaluate(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("trials", [None, 1])
def test_only_the_images_that_are_drawn_count(protocol, trials):
    """The other rows may hold anything, and every row that is drawn changes something."""
    drawn = images_of(world_of(protocol), protocol, trials)
    others = np.setdiff1d(np.arange(len(WORLD)), drawn)
    spoilt = FEATURES.copy()
    spoilt[others] = 99.0
    wanted = evaluate(FEATURES, world_of(protocol), protocol, trials=trials)
    assert evaluate(spoilt, world_of(protocol), protocol, trials=trials).mean == wanted.mean
    compared = {s.path for t in wanted.trials for side in (t.queries, t.gallery) for s in side}
    assert {WORLD[i].path for i in drawn} == compared
    if protocol == "sysu-indoor" or (trials == 1 and PROTOCOLS[protocol].sampled):
        assert len(others)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_labels_may_be_strings_or_words(protocol):
    """B2, C9: the draws, the camera rules and the scores are those of the numbers."""
    trials = 3 if PROTOCOLS[protocol].sampled else 1
    samples = world_of(protocol)
    expected = evaluate(FEATURES, samples, protocol, trials=trials).mean
    strings = [s._replace(identity=f"{s.identity:04d}", camera=str(s.camera)) for s in samples]
    assert evaluate(FEATURES, strings, protocol, trials=trials).mean == expected
    unsigned = [
        s._replace(identity=np.uint16(s.identity), camera=np.uint8(s.camera)) for s in samples
    ]
    assert evaluate(FEATURES, unsigned, protocol, trials=trials).mean == expected
    words = [s._replace(identity=f"person_{s.identity:03d}") for s in samples]  # in the same order
    assert evaluate(FEATURES, words, protocol, trials=trials).mean == expected


def test_people_that_nobody_knows_are_not_one_person():
    """B2: images of a CSV file without identities were all of -1, and scored as one person."""
    unknown = [s._replace(identity=-1) for s in WORLD]
    with pytest.raises(UserError, match="identity is not known"):
        evaluate(FEATURES, unknown, "own-ir2vis")
    nowhere = [s._replace(camera=-1) for s in WORLD]  # RegDB's rule asks for no camera
    expected = evaluate(FEATURES, WORLD, "own-ir2vis").mean
    assert evaluate(FEATURES, nowhere, "own-ir2vis").mean == expected
    with pytest.raises(UserError, match="camera is not known"):
        evaluate(FEATURES, nowhere, "llcm-ir2vis")


def test_pairs_of_cameras_of_which_some_are_words():
    """B2: a camera with a number and one with a name were told to share no person."""
    cameras = sorted({s.camera for s in WORLD})
    names = {camera: f"door {camera}" if camera % 2 else camera for camera in cameras}
    named = [s._replace(camera=names[s.camera]) for s in WORLD]
    pairs = [
        {(names.get(a, a), names.get(b, b)): rest for a, b, *rest in found.camera_pairs}
        for found in (
            evaluate(FEATURES, samples, "regdb-ir2vis", camera_pairs=True)
            for samples in (WORLD, named)
        )
    ]
    assert pairs[0] == pairs[1] and any(r1 is not None for _, r1, _ in pairs[0].values())
