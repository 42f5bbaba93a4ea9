"""Pictures: the right images in the right frames, in the formats asked for."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deen_zoo
from deen_zoo import visualize
from deen_zoo.cli import main
from deen_zoo.errors import UserError
from deen_zoo.features.extractor import FeatureExtractor
from deen_zoo.features.files import FeatureTable, write_feature_table
from deen_zoo.search import calibrate, search
from tests import seeded

PEOPLE = 6


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> FeatureTable:
    """Two visible and two infrared images of each person, of one colour each."""
    folder = tmp_path_factory.mktemp("people")
    ids = torch.arange(PEOPLE).repeat_interleave(4)
    infrared = torch.arange(4 * PEOPLE) % 4 > 1
    rng = torch.Generator().manual_seed(0)
    rows = torch.eye(PEOPLE)[ids] + 0.2 * torch.randn(4 * PEOPLE, PEOPLE, generator=rng)
    paths = []
    for i, identity in enumerate(ids.tolist()):
        paths.append(str(folder / f"{i}.png"))
        color = (90, 90, 90) if infrared[i] else (40 * identity, 250 - 40 * identity, 99)
        Image.new("RGB", (9, 24), color).save(paths[-1])
    labels = {"identity": ids, "infrared": infrared, "camera": infrared.long() + 1}
    labels = {name: values.numpy() for name, values in labels.items()}
    return FeatureTable("people", torch.nn.functional.normalize(rows), paths, labels)


def pixels(file: Path, color: str) -> int:
    """How many pixels have that colour."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.asarray(Image.open(file).convert("RGB")) == wanted).all(axis=2).sum())


def test_frames_say_what_is_right(table, tmp_path):
    infrared = table.labels["infrared"]
    query, gallery = table.select(infrared), table.select(~infrared)
    result = search(query, gallery, 2)
    assert result.correct.all()
    visualize.ranking_sheet(result, tmp_path / "right.png", [0, 3])
    assert pixels(tmp_path / "right.png", visualize.RIGHT) > 1000
    assert pixels(tmp_path / "right.png", visualize.WRONG) < 500  # the legend
    result.query.labels["identity"][:] = 99
    visualize.ranking_sheet(result, tmp_path / "wrong.png", [0, 3])
    assert pixels(tmp_path / "wrong.png", visualize.RIGHT) < 500
    assert pixels(tmp_path / "wrong.png", visualize.WRONG) > 1000
    del result.query.labels["identity"]
    visualize.ranking_sheet(result, tmp_path / "plain.png", [0, 3])
    assert pixels(tmp_path / "plain.png", visualize.WRONG) == 0
    assert pixels(tmp_path / "plain.png", visualize.PLAIN) > 1000


def test_images_stand_where_the_ranking_has_them(table, tmp_path):
    infrared = table.labels["infrared"]
    gallery = table.select(~infrared)
    result = search(table.select(infrared), gallery, 3)
    visualize.ranking_sheet(result, tmp_path / "sheet.png", [0])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    places = []
    for i in result.indices[0].tolist():
        color = np.asarray(Image.open(gallery.paths[i]))[0, 0].astype(int)
        at = (abs(sheet - color).max(axis=2) <= 1).nonzero()[1]
        assert len(at) > 500
        places.append(np.median(at))
    twins = result.indices[0, :2] // 2  # the two images of a person have one colour
    assert twins[0] == twins[1] and places[0] == places[1] < places[2]


def test_faded_below_the_threshold(table, tmp_path):
    infrared = table.labels["infrared"]
    result = search(table.select(infrared), table.select(~infrared), 2)
    color = np.asarray(Image.open(result.gallery.paths[result.indices[0, 0]]))[0, 0]
    code = "#" + "".join(f"{value:02x}" for value in color)
    visualize.ranking_sheet(result, tmp_path / "a.png", [0])
    visualize.ranking_sheet(result, tmp_path / "b.png", [0], threshold=2.0)
    assert pixels(tmp_path / "a.png", code) > 500 and pixels(tmp_path / "b.png", code) == 0


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("kind", ["ranking", "tsne", "similarities"])
def test_command(kind, suffix, table, tmp_path, capsys):
    features, file = tmp_path / "f.safetensors", tmp_path / f"picture.{suffix}"
    write_feature_table(features, [table])
    arguments = ["visualize", kind, str(features), "-o", str(file), "--people", "4"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{file}\n"
    first = file.read_bytes()
    if suffix == "png":
        assert min(Image.open(file).size) > 200
    else:
        text = first.decode()
        wanted = {"ranking": "<image", "tsne": "<path", "similarities": "<path"}[kind]
        assert text.startswith("<?xml") and wanted in text
    assert main(arguments) == 0
    assert file.read_bytes() == first  # the same numbers, the same file


def test_tsne_draws_persons_of_both_modalities(table, tmp_path, monkeypatch):
    lonely = table.select(~((table.labels["identity"] == 0) & table.labels["infrared"]))
    drawn = []
    from matplotlib.axes import Axes

    scatter = Axes.scatter

    def watch(axes, x, y, **options):
        drawn.append((options["marker"], len(x)))
        return scatter(axes, x, y, **options)

    monkeypatch.setattr(Axes, "scatter", watch)
    visualize.tsne(lonely, tmp_path / "t.png")
    for marker in "o^":
        assert [n for m, n in drawn if m == marker] == [0] + [2] * (PEOPLE - 1)


def test_similarities_counts_the_pairs_across_modalities(table, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    seen = []
    monkeypatch.setattr(Axes, "hist", lambda axes, x, *a, **options: seen.append(np.sort(x)))
    visualize.similarities(table, tmp_path / "d.png")
    infrared, ids = table.labels["infrared"], table.labels["identity"]
    wanted: dict[bool, list[float]] = {True: [], False: []}
    for i in np.flatnonzero(infrared):
        for j in np.flatnonzero(~infrared):
            similarity = table.features[i] @ table.features[j]
            wanted[bool(ids[i] == ids[j])].append(float(similarity))
    for got, same in zip(seen, (False, True), strict=True):
        np.testing.assert_allclose(got, np.sort(wanted[same]), atol=1e-6)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    model = deen_zoo.create_model("test_deen_resnet", num_classes=0)
    seeded.fill(model)
    return FeatureExtractor(model, "cpu", threads=1)


def test_the_threshold_is_that_of_calibrate(table, tmp_path, monkeypatch):
    """E: the histogram spoke of distances where search and calibrate speak of similarities."""
    from matplotlib.axes import Axes

    lines = []
    monkeypatch.setattr(Axes, "axvline", lambda axes, x, **options: lines.append(x))
    visualize.similarities(table, tmp_path / "d.png", false_match_rate=0.1)
    assert lines == [calibrate(table, false_match_rate=0.1).threshold]


def test_curves(tmp_path, monkeypatch):
    """E: epochs are whole numbers from 1, terms follow the record, the legend covers nothing."""
    from matplotlib.figure import Figure

    def row(epoch, r1):
        terms = {"loss": 3.0 / epoch, "mine": 2.0 / epoch, "other": 1.0 / epoch}
        score = {"r1": r1, "mAP": r1}
        return {"epoch": epoch, "lr": 0.1, **terms, "seconds": 1.0, **score}

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    visualize.curves([row(1, None), row(2, 0.25), row(3, None)], tmp_path / "c.png")
    left, right = figures[0].axes
    shown = {line.get_label(): list(line.get_xydata()[:, 1]) for line in left.lines}
    assert shown == {"sum": [3, 1.5, 1], "mine": [2, 1, 2 / 3], "other": [1, 0.5, 1 / 3]}
    assert [list(line.get_xydata()[0]) for line in right.lines] == [[2, 25], [2, 25]]
    for axes in (left, right):
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
        box = axes.get_legend().get_window_extent()
        assert not box.overlaps(axes.get_window_extent())
    with pytest.raises(UserError, match="epoch"):
        visualize.curves([], tmp_path / "d.png")


def test_activations_are_wrapped(extractor, table, tmp_path):
    """E: many images made one row of thousands of pixels."""
    paths = [table.paths[0]] * 11
    visualize.activation_maps(extractor, paths, tmp_path / "a.png", "visible", columns=4)
    visualize.activation_maps(extractor, paths[:4], tmp_path / "b.png", "visible", columns=4)
    (wide, high), (width, height) = (Image.open(tmp_path / f"{n}.png").size for n in "ab")
    assert abs(wide - width) < 10 and high > 2.5 * height


def test_activation_maps(extractor, table, tmp_path):
    paths = [table.paths[i] for i in (0, 2, 4)]
    modality = ["visible", "infrared", "visible"]
    file = tmp_path / "maps.png"
    maps = visualize.activation_maps(extractor, paths, file, modality)
    assert maps.shape == (3, 3, 8, 4) and min(Image.open(file).size) > 200
    images, infrared = extractor.preprocess(paths, modality)
    with torch.inference_mode():
        deep = extractor.model.forward_features(images, infrared)
    channels = deep.shape[1] // 3
    for branch in range(3):
        part = deep[:, branch * channels : (branch + 1) * channels]
        torch.testing.assert_close(maps[:, branch], part.square().sum(1).sqrt())


def test_pictures_are_scaled_as_the_features_were(extractor, tmp_path, monkeypatch):
    """B3: images of 16 bits were drawn nearly black, whatever rule their features were made by."""
    for i in range(2):
        counts = np.random.default_rng(i).integers(7000, 9000, (64, 32), dtype=np.uint16)
        Image.fromarray(counts).save(tmp_path / f"{i}.png")
    make = FeatureExtractor(extractor.model, "cpu", intensity=(7000, 9000))
    drawn, whole = [], visualize.resize

    def watch(image, size):
        drawn.append(np.ptp(np.asarray(image)))
        return whole(image, size)

    monkeypatch.setattr(visualize, "resize", watch)
    table = make.table(sorted(tmp_path.glob("*.png")), "infrared")
    visualize.ranking_sheet(search(table, table, 1), tmp_path / "sheet.png", [0])
    visualize.activation_maps(make, table.paths[:1], tmp_path / "maps.png", "infrared")
    assert len(drawn) == 3 and min(drawn) > 250
    other = replace(table, provenance={"intensity": "of another program"})
    assert other.intensity == "full"


def test_activations_command(extractor, table, tmp_path, capsys):
    folder = deen_zoo.save_pretrained(extractor.model, tmp_path / "model")
    file = tmp_path / "maps.svg"
    arguments = ["visualize", "activations", table.paths[0], "-o", str(file)]
    assert main([*arguments, "--modality", "visible", "--model", str(folder)]) == 0
    one, (arguments[2], people) = file.read_bytes(), (str(tmp_path / "people"), tmp_path / "people")
    people.mkdir()
    (people / "a.png").symlink_to(table.paths[0])
    assert main([*arguments, "--modality", "visible", "--model", str(folder)]) == 0
    assert file.read_bytes() == one  # a folder is its images
    assert file.read_text().startswith("<?xml")
    assert main([*arguments, "--modality", "visible"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main([*arguments, "--model", str(folder)]) == 2
    assert "'visible', 'infrared' or 'auto'" in capsys.readouterr().err


def test_the_pictures_name_is_looked_at_before_the_work(tmp_path, capsys):
    arguments = ["search", "--query", "absent.npz", "--gallery", "absent.npz", "-o", "r.gif"]
    assert main(arguments) == 2
    assert "r.gif: " in capsys.readouterr().err


def test_only_image_files_have_activations(extractor, tmp_path):
    with pytest.raises(UserError, match="image files"):
        visualize.activation_maps(extractor, [Image.new("RGB", (9, 9))], tmp_path / "x.png", "auto")


@pytest.mark.parametrize("kind", ["ranking", "similarities", "tsne"])
def test_rows_that_are_no_numbers_are_not_drawn(kind, table, tmp_path, capsys):
    """t-SNE had a traceback, and the similarities a picture and exit code 0."""
    rows = table.features.clone()
    rows[5, 2] = float("nan")
    file, picture = tmp_path / "f.npz", tmp_path / "x.png"
    write_feature_table(file, [replace(table, features=rows)])
    assert main(["visualize", kind, str(file), "-o", str(picture)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert f"the features of {table.paths[5]} are NaN" in err[-1] and not picture.exists()


def test_where_the_picture_goes_is_looked_at_before_the_fit(table, tmp_path, monkeypatch, capsys):
    from sklearn.manifold import TSNE

    monkeypatch.setattr(TSNE, "fit_transform", None)
    with pytest.raises(UserError, match="there is no folder"):
        visualize.tsne(table, tmp_path / "absent" / "x.png")
    for kind in ("tsne", "activations"):
        arguments = ["visualize", kind, "absent.npz", "-o", str(tmp_path / "absent" / "x.png")]
        assert main(arguments) == 2 and "there is no folder" in capsys.readouterr().err


def test_mistakes(table, tmp_path):
    with pytest.raises(UserError, match=r"\.png, \.svg, \.pdf"):
        visualize.similarities(table, tmp_path / "d.gif")
    visible = table.select(~table.labels["infrared"])
    for draw, message in (
        (visualize.similarities, "pairs of one person"),
        (visualize.tsne, "two identities"),
        (visualize.sample_ranking, "has no infrared images"),
    ):
        with pytest.raises(UserError, match=message):
            draw(visible, tmp_path / "x.png")
    with pytest.raises(UserError, match="queries -2"):
        visualize.sample_ranking(table, tmp_path / "x.png", queries=-2)
    with pytest.raises(UserError, match="needs two identities .*, not 1"):
        visualize.tsne(table, tmp_path / "x.png", people=1)
    assert not list(tmp_path.iterdir())


def benchmark(name: str):
    file = Path(__file__).parents[1] / f"benchmarks/{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_pictures_of_the_docs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--output", str(tmp_path), "--people=4"])
    benchmark("pictures").main()
    docs = Path(__file__).parents[1] / "docs"
    names = {"ranking.png", "tsne.png", "similarities.png", "activations.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert names < {path.name for path in docs.iterdir()}
    assert all(min(Image.open(path).size) > 200 for path in tmp_path.iterdir())


def test_a_table_of_the_docs_is_replaced_by_its_head(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("before\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\n| a |\n|---|\n| 5 |\n")
    benchmark("descriptors").update(file, ["| a | b |", "|---|---|", "| 6 | 7 |"])
    text = "before\n\n| a | b |\n|---|---|\n| 6 | 7 |\n\n| a |\n|---|\n| 5 |\n"
    assert file.read_text() == text
