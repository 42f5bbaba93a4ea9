"""Ranked galleries next to a sort over all scores; thresholds next to a count of all pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deen_zoo
from deen_zoo import search as module
from deen_zoo.cli import main
from deen_zoo.data import open_dataset
from deen_zoo.errors import UserError
from deen_zoo.features.extractor import FeatureExtractor
from deen_zoo.features.files import FeatureTable, read_feature_table, write_feature_table
from deen_zoo.models.pretrained import TINY_WEIGHTS
from deen_zoo.search import calibrate, search
from deen_zoo.synthetic import synthesize
from tests import seeded


def table(
    count, seed=0, width=24, people=10, dtype=torch.float32, noise=1.1, **changes
) -> FeatureTable:
    """Unit rows around a centre for each person, the infrared ones next to it."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(people, (count,), generator=rng)
    centres = torch.randn(people, width, generator=torch.Generator().manual_seed(99))
    rows = centres[ids] + noise * torch.randn(count, width, generator=rng)
    labels = {"identity": ids.numpy(), "infrared": np.arange(count) % 2 == 1}
    rows = torch.nn.functional.normalize(rows).to(dtype)
    values = {"features": rows, "paths": [f"{seed}/{i}.jpg" for i in range(count)]}
    return FeatureTable(**{"source": f"table {seed}", "labels": labels, **values, **changes})


def exact_table(count, seed) -> FeatureTable:
    """Rows whose products have no rounding, and many ties."""
    made = table(count, seed)
    return table(count, seed, features=(made.features * 16).round() / 16)


def oracle(query, gallery, k):
    """(score, index) of the k best, by a sort of all pairs; equal scores in the gallery's order."""
    out = []
    for row in query.features.double().numpy():
        scores = [float(row @ other) for other in gallery.features.double().numpy()]
        order = sorted(range(len(scores)), key=lambda i, s=scores: (-s[i], i))
        out.append([(scores[i], i) for i in order[:k]])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "k"), [(1, 3), (57, 8), (200, 200)])
def test_equal_to_a_sort_of_all_pairs(dtype, count, k, monkeypatch):
    monkeypatch.setattr(module, "FLOATS", 24 * 16)  # blocks of 16 rows
    monkeypatch.setattr(module, "QUERIES", 3)
    query, gallery = table(7, 1, dtype=dtype), table(count, 2, dtype=dtype)
    result = search(query, gallery, k)
    wanted = oracle(query, gallery, k)
    assert result.indices.tolist() == [[i for _, i in row] for row in wanted]
    scores = torch.tensor([[s for s, _ in row] for row in wanted])
    torch.testing.assert_close(result.scores, scores, rtol=0, atol=1e-6)
    assert result.indices.shape == (7, min(k, count))


@pytest.mark.parametrize(("count", "k"), [(50, 8), (5, 5), (67, 9)])
def test_copies_of_a_row_keep_the_gallery_order(count, k):
    """B12: BLAS rounded the last columns differently, and of 50 copies the 49th came first."""
    for queries in (1, 3):
        for width in (24, 100, 512):
            rows = table(1, 2, width=width).features.repeat(count, 1)
            gallery = table(count, 2, features=rows)
            result = search(table(queries, 1, width=width), gallery, k)
            assert result.indices.tolist() == [list(range(k))] * queries


@pytest.mark.parametrize("k", [1, 4, 9])
def test_ties_at_the_last_place_keep_the_gallery_order(k, monkeypatch):
    """B12: any of the rows that tie at rank k came, and others from another index."""
    monkeypatch.setattr(module, "FLOATS", 24 * 7)
    query, gallery = exact_table(20, 1), exact_table(60, 2)
    copies = gallery.features[torch.arange(60) % 5]
    gallery = table(60, 2, features=copies)
    wanted = [[i for _, i in row] for row in oracle(query, gallery, k)]
    assert search(query, gallery, k).indices.tolist() == wanted


def test_words_and_numbers_of_one_person():
    """C9: identities may be words; a number equals its digits."""
    query, gallery = table(20, 1), table(30, 2)
    words = {**gallery.labels, "identity": gallery.labels["identity"].astype(str)}
    named = table(30, 2, labels=words)
    assert torch.equal(search(query, gallery).correct, search(query, named).correct)
    assert calibrate(query, named, 0.1) == calibrate(query, gallery, 0.1)
    assert search(query, named).to_dict()[0]["hits"][0]["identity"] in words["identity"]


def test_numbers_and_words_that_never_meet_are_said():
    """B2: with 1 on one side and "1.0" on the other every hit was marked as wrong."""
    query, gallery = table(20, 1), table(30, 2)
    words = np.array([f"{i}.0" for i in gallery.labels["identity"].tolist()])
    named = table(30, 2, labels={**gallery.labels, "identity": words})
    with pytest.warns(UserWarning, match="numbers .* words"):
        result = search(query, named)
    assert result.correct is None and "correct" not in result.to_dict()[0]["hits"][0]
    with pytest.raises(UserError, match="numbers .* words"):
        calibrate(query, named, 0.1)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_digits_with_zeros_before_them_are_that_number(suffix, tmp_path):
    """B2: no hit was correct, and pairs of one person counted as two, without a word."""
    query, gallery = table(20, 1), table(30, 2)
    digits = np.array([f"{i:04d}" for i in gallery.labels["identity"].tolist()])
    padded = table(30, 2, labels={**gallery.labels, "identity": digits})
    file = tmp_path / f"padded{suffix}"
    write_feature_table(file, [padded])
    for named in (padded, read_feature_table(file)):
        assert torch.equal(search(query, gallery).correct, search(query, named).correct)
        assert calibrate(query, named, 0.1) == calibrate(query, gallery, 0.1)
    assert (
        read_feature_table(file).labels["identity"].tolist() == gallery.labels["identity"].tolist()
    )


@pytest.mark.parametrize(
    ("query", "gallery", "options", "message"),
    [
        (table(1), table(2), {"k": 0}, "k is 0"),
        (table(1), table(0), {}, "a gallery of 0"),
        (table(0), table(2), {}, "0 queries"),
        (table(1), table(2, width=8), {}, "one model"),
        (table(1), table(2, provenance={"weights_sha256": "ab"}), {}, "does not say what made"),
    ],
)
def test_mistakes(query, gallery, options, message):
    with pytest.raises(UserError, match=message):
        search(query, gallery, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_refused(value):
    """B7: a threshold of NaN, or rows that were left out."""
    rows = table(30, 2).features.clone()
    rows[7, 3:5] = torch.tensor([value, -value])
    with pytest.raises(UserError, match="2/7.jpg are NaN"):
        search(table(2, 1), table(30, 2, features=rows), 3)
    with pytest.raises(UserError, match="2/7.jpg are NaN"):
        calibrate(table(30, 1), table(30, 2, features=rows), 0.1)


def test_result_as_dict_and_table():
    result = search(table(2, 1), table(30, 2), 3)
    first = result.to_dict()[0]
    assert first["path"] == "1/0.jpg" and first["modality"] == "visible"
    assert [hit["rank"] for hit in first["hits"]] == [1, 2, 3]
    ids, gallery_ids = result.query.labels["identity"], result.gallery.labels["identity"]
    for q, row in enumerate(result.to_dict()):
        for hit in row["hits"]:
            i = result.gallery.paths.index(hit["path"])
            assert hit["correct"] == (ids[q] == gallery_ids[i])
            assert hit["identity"] == gallery_ids[i]
    limit = first["hits"][1]["score"]
    assert len(result.to_dict(limit)[0]["hits"]) == 2
    assert str(result).splitlines()[0] == "1/0.jpg" and "+ 2/" in str(result)
    assert "2.0000" in result.table(2.0)
    unlabelled = search(table(2, 1, labels={}), table(30, 2), 3)
    assert unlabelled.correct is None and "correct" not in unlabelled.to_dict()[0]["hits"][0]


@pytest.mark.parametrize("rate", [0.002, 0.01, 0.3, 0.999])
@pytest.mark.parametrize("joined", [True, False])
def test_threshold_equals_a_count_of_all_pairs(rate, joined, monkeypatch):
    monkeypatch.setattr(module, "FLOATS", 24 * 16)
    monkeypatch.setattr(module, "QUERIES", 7)
    if joined:
        both = exact_table(90, 3)
        found = calibrate(both, false_match_rate=rate)
        infrared = both.labels["infrared"]
        a, b = both.select(infrared), both.select(~infrared)
    else:
        a, b = exact_table(40, 1), exact_table(50, 2)
        found = calibrate(a, b, rate)
    pairs = [
        (float(x @ y), bool(i == j))
        for x, i in zip(a.features, a.labels["identity"], strict=True)
        for y, j in zip(b.features, b.labels["identity"], strict=True)
    ]
    different = [score for score, same in pairs if not same]
    same = [score for score, same in pairs if same]
    taken = sum(score >= found.threshold for score in different)
    assert (found.different_pairs, found.same_pairs) == (len(different), len(same))
    assert found.false_matches == taken and found.false_match_rate == taken / len(different)
    assert found.true_match_rate == pytest.approx(np.mean([s >= found.threshold for s in same]))
    assert taken <= rate * len(different)
    lower = max(score for score in different if score < found.threshold)
    assert sum(score >= lower for score in different) > rate * len(different)  # none lower will do


@pytest.mark.parametrize("rate", [0, 1, 1e-9, -0.5])
def test_rates_that_the_pairs_do_not_give(rate):
    with pytest.raises(UserError, match="more images"):
        calibrate(table(40, 1), table(50, 2), rate)


def test_calibration_needs_labels():
    with pytest.raises(UserError, match="no infrared in it"):
        calibrate(table(9, labels={}))
    unknown = {"identity": np.full(9, -1), "infrared": np.arange(9) > 4}
    with pytest.raises(UserError, match="identity .*4 of 4"):
        calibrate(table(9, labels=unknown))


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    model = deen_zoo.create_model("test_deen_resnet", num_classes=0)
    seeded.fill(model)
    return str(deen_zoo.save_pretrained(model, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def people(llcm_tree, checkpoint, tmp_path_factory):
    """Feature files of infrared and visible images, in another than the usual descriptor."""
    dataset, folder = open_dataset("llcm", llcm_tree), tmp_path_factory.mktemp("features")
    make = FeatureExtractor(checkpoint, "cpu", threads=1, descriptor="bn", flip=False)
    out = {}
    for modality in ("infrared", "visible"):
        out[modality] = folder / f"{modality}.safetensors"
        make.write(dataset.test(modality), out[modality])
    return out


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["search", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_of_many_queries_the_first_ten_are_printed(people):
    """The five lines of README printed 350."""
    gallery = module.read_feature_table(people["visible"])
    result = module.search(gallery, gallery, k=2)
    lines = str(result).splitlines()
    assert len(gallery) > 10 and len(lines) == 10 * 3 + 1 and str(len(gallery) - 10) in lines[-1]
    assert len(result.table().splitlines()) == 3 * len(gallery)


def test_command_on_feature_files(people, capsys):
    sides = ("--query", people["infrared"], "--gallery", people["visible"])
    result = search(people["infrared"], people["visible"], 4)
    code, out, err = command(capsys, *sides, "-k", 4, "--json")
    assert code == 0 and "searching" in err
    assert json.loads(out)["queries"] == result.to_dict()
    assert json.loads(out)["provenance"]["descriptor"] == "bn"
    assert command(capsys, *sides, "-k", 4)[1].rstrip() == result.table()
    limit = float(result.scores.median())
    code, out, _ = command(capsys, *sides, "-k", 4, "--json", "--threshold", limit)
    assert json.loads(out)["queries"] == result.to_dict(limit)


def test_command_extracts_images_as_the_file_beside_them(people, checkpoint, capsys):
    query = search(people["infrared"], people["visible"], 3).query.paths[0]
    arguments = ["--query", query, "--query-modality", "infrared", "--gallery", people["visible"]]
    code, out, _ = command(capsys, *arguments, "-k", 3, "--json", "--model", checkpoint)
    wanted = search(people["infrared"], people["visible"], 3).to_dict()[0]["hits"]
    (found,) = json.loads(out)["queries"]
    assert code == 0 and [h["path"] for h in found["hits"]] == [h["path"] for h in wanted]
    assert found["hits"][0]["score"] == pytest.approx(wanted[0]["score"], abs=1e-5)


def test_command_scales_images_as_the_file_next_to_them(checkpoint, tmp_path, capsys):
    """A gallery by minmax was compared with a query by the full range, which is nearly black."""
    rng = np.random.default_rng(0)
    for i in range(3):
        counts = rng.integers(7000, 9000, (64, 32), dtype=np.uint16)
        Image.fromarray(counts).save(tmp_path / f"{i}.png")
    images, gallery = sorted(tmp_path.glob("*.png")), tmp_path / "g.safetensors"
    make = FeatureExtractor(checkpoint, "cpu", threads=1, intensity=(7000, 9000))
    make.write(images, gallery, "infrared")
    arguments = ["--query", images[1], "--query-modality", "infrared", "--gallery", gallery]
    code, out, _ = command(capsys, *arguments, "--model", checkpoint, "--json")
    best = json.loads(out)["queries"][0]["hits"][0]
    assert code == 0 and best["path"] == str(images[1])
    assert best["score"] == pytest.approx(1, abs=1e-5)
    with pytest.warns(UserWarning, match=r"intensity full and \(7000.0, 9000.0\)"):
        command(capsys, *arguments, "--model", checkpoint, "--intensity", "full")


def test_command_on_images_of_both_sides(llcm_tree, checkpoint, tmp_path, capsys):
    for name in ("query", "gallery"):
        (tmp_path / name).mkdir()
    dataset = open_dataset("llcm", llcm_tree)
    for n, sample in enumerate(dataset.test("infrared")[:2]):
        (tmp_path / "query" / f"{n}.jpg").symlink_to(sample.path)
    for n, sample in enumerate(dataset.test("visible")[:5]):
        (tmp_path / "gallery" / f"{n}.jpg").symlink_to(sample.path)
    (tmp_path / "gallery" / "broken.jpg").write_bytes(b"\xff\xd8")
    arguments = ["--query", tmp_path / "query", "--gallery", tmp_path / "gallery"]
    arguments += ["--model", checkpoint, "--threads", 1, "--json"]
    modalities = ["--query-modality", "infrared", "--gallery-modality", "visible"]
    code, out, err = command(capsys, *arguments, *modalities)
    assert code == 1 and f"unreadable: {tmp_path}/gallery/broken.jpg" in err
    assert [len(query["hits"]) for query in json.loads(out)["queries"]] == [5, 5]
    code, out, err = command(capsys, *arguments, *modalities[:2])
    assert code == 2 and "--gallery-modality" in err


def test_command_calibrates(people, tmp_path, capsys):
    sides = ("--query", people["infrared"], "--gallery", people["visible"], "--calibrate", 0.05)
    for unused in (("-o", tmp_path / "ranking.png"), ("--threshold", 0.5)):
        code, out, said = command(capsys, *sides, *unused)
        assert (code, out) == (2, "") and "--output" in said
    found = calibrate(people["infrared"], people["visible"], 0.05)
    code, out, _ = command(capsys, *sides, "--json")
    assert code == 0 and json.loads(out) == vars(found)
    code, out, err = command(capsys, *sides)
    assert f"threshold {found.threshold:.4f}: " in out and "%" in out
    assert ("only" in err) == (found.false_matches < 30)
    both = tmp_path / "both.safetensors"
    tables = [module.read_feature_table(file) for file in people.values()]
    write_feature_table(both, tables)
    code, out, _ = command(capsys, "--gallery", both, "--calibrate", 0.05, "--json")
    assert json.loads(out) == vars(found)


def test_command_mistakes(people, checkpoint, tmp_path, capsys):
    gallery = ["--gallery", people["visible"]]
    for arguments, message in (
        (gallery, "--query is missing"),
        (["--query", __file__, *gallery], "--query is of images: name the --model"),
        (["--query", "x.jpg", people["infrared"], *gallery], "feature files and images"),
        (["--query", tmp_path / "no.npz", *gallery], "there is no such file"),
        (["--query", __file__, *gallery, "--model", checkpoint], "--query-modality"),
    ):
        code, out, err = command(capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and not out
    other = deen_zoo.create_model("test_deen_resnet", num_classes=0)
    deen_zoo.save_pretrained(other, tmp_path / "other")
    query = module.read_feature_table(people["infrared"]).paths[0]
    arguments = ["--query", query, "--query-modality", "infrared", "--model", tmp_path / "other"]
    code, out, err = command(capsys, *arguments, *gallery)
    assert code == 2 and "are not comparable: weights" in err


FIVE_LINES = """
from deen_zoo import FeatureExtractor
from deen_zoo.search import search

extract = FeatureExtractor("test_deen_resnet")
people = extract.table("gallery", modality="visible")
print(search(extract.table("night", modality="infrared"), people, k=5))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path(TINY_WEIGHTS).exists(), reason="needs the shipped tiny weights")
def test_the_readmes_lines_find_the_right_person(tmp_path, monkeypatch, capsys):
    synthesize("llcm", tmp_path / "people", 16, seed=3, images_per_camera=1, test_fraction=0.5)
    dataset = open_dataset("llcm", tmp_path / "people")
    for name, modality in (("night", "infrared"), ("gallery", "visible")):
        (tmp_path / name).mkdir()
        for n, sample in enumerate(dataset.test(modality)):
            (tmp_path / name / f"{sample.identity:03}-{n}.jpg").symlink_to(sample.path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(FIVE_LINES, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("night/")
    found = search(names["extract"].table("night", modality="infrared"), names["people"], k=1)
    people = len({Path(path).name[:3] for path in found.gallery.paths})
    right = [
        Path(query["path"]).name[:3] == Path(query["hits"][0]["path"]).name[:3]
        for query in found.to_dict()
    ]
    assert people == 8 and np.mean(right) > 0.5  # by chance it would be 0.125


def test_a_side_that_is_not_there_is_named(tmp_path, capsys):
    """The message asked for --model."""
    missing = str(tmp_path / "night.jpg")
    assert main(["search", "--query", missing, "--gallery", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"--query {missing}" in error and "--model" not in error
