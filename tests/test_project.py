"""PCA, whitened in part, next to a plain SVD, and its way from fit to extraction."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from deen_zoo.cli import main
from deen_zoo.errors import UserError
from deen_zoo.features import project
from deen_zoo.features.extractor import FeatureExtractor
from deen_zoo.features.files import FeatureTable
from deen_zoo.features.project import Head, fit_head, read_head, size_table, write_head


def table(count: int, width: int = 40, people: int = 12, seed: int = 0) -> FeatureTable:
    """People are told apart in five directions; the others are louder and the same for all."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(people, (count,), generator=rng)
    centres = torch.randn(people, 5, generator=torch.Generator().manual_seed(9))
    rows = torch.randn(count, width, generator=rng) * torch.linspace(3, 0.05, width)
    rows[:, 10:15] = centres[ids] + 0.3 * torch.randn(count, 5, generator=rng)
    labels = {"identity": ids.numpy(), "infrared": np.arange(count) % 2 == 1}
    return FeatureTable("table", rows, [f"{seed}/{i}" for i in range(count)], labels)


@pytest.mark.parametrize(("count", "dim"), [(300, 8), (30, 8), (300, 40)])
def test_projected_rows_are_white_and_equal_an_svd(count, dim):
    made = table(count)
    head = fit_head(made, dim, whiten=1)
    rows = made.features - made.features.mean(0)
    _, values, vectors = torch.linalg.svd(rows.double(), full_matrices=False)
    wanted = rows.double() @ vectors[:dim].T / (values[:dim] / (count - 1) ** 0.5)
    found = (made.features - head.mean) @ head.components
    torch.testing.assert_close(found.abs(), wanted.abs().float(), rtol=0, atol=2e-3)
    covariance = found.T @ found / (count - 1)
    torch.testing.assert_close(covariance, torch.eye(dim), rtol=0, atol=2e-3)
    torch.testing.assert_close(head(made.features).norm(dim=1), torch.ones(count))


@pytest.mark.parametrize("whiten", [0.0, 0.5])
def test_rows_are_whitened_as_far_as_is_asked(whiten):
    made = table(300)
    head = fit_head(made, 40, whiten)
    found = (made.features - head.mean) @ head.components
    rows = made.features - made.features.mean(0)
    deviation = torch.linalg.svdvals(rows.double()) / (299) ** 0.5
    torch.testing.assert_close(found.std(0).double(), deviation ** (1 - whiten), rtol=1e-4, atol=0)
    if whiten == 0:  # a rotation
        torch.testing.assert_close(torch.pdist(found), torch.pdist(rows), rtol=1e-4, atol=0)


def test_mistakes(tmp_path):
    for made, dim, message in (
        (table(30), 30, "at most 29 directions"),
        (table(300), 41, "at most 40"),
        (table(30), 0, "dim 0"),
        (table(30, width=40).select(np.zeros(30, int)), 3, "directions only"),
    ):
        with pytest.raises(UserError, match=message):
            fit_head(made, dim)
    with pytest.raises(UserError, match=r"whiten 1\.5"):
        fit_head(table(30), 3, 1.5)
    head = fit_head(table(30), 3)
    for name in ("model.safetensors", "head.npz", "absent/head.safetensors"):
        with pytest.raises(UserError, match="head"):
            write_head(head, tmp_path / name)
    for mean, components in (
        (torch.ones(3), torch.ones(4, 2)),
        (torch.ones(3).double(), torch.ones(3, 2)),
        (torch.ones(3), torch.ones(3, 2).to(torch.float8_e4m3fn)),
    ):
        write_head(Head(mean, components, {}), tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=r"bad\.safetensors: not a head"):
            read_head(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="no such file"):
        read_head(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a head"):
        read_head(tmp_path / "bad.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_there_are_fewer_directions_than_rows_that_are_fitted_on(monkeypatch):
    """Of many rows some are taken; beyond these the directions are of rounding alone."""
    monkeypatch.setattr(project, "ROWS", 20)
    assert fit_head(table(300), 19).dim == 19
    with pytest.raises(UserError, match="19 directions"):
        fit_head(table(300), 20)
    assert [row["dim"] for row in size_table(table(300), table(200), dims=(15, 25))] == [15, 40]


def test_a_table_of_sizes():
    rows = size_table(table(400), table(200, seed=1), dims=(5, 15, 512))
    assert [row["dim"] for row in rows] == [5, 15, 40]
    assert all(0 < row["mAP"] <= 1 and 0 <= row["r1"] <= 1 for row in rows)
    assert rows[1]["mAP"] > rows[0]["mAP"]  # the five directions that tell people apart come later


def test_a_table_of_rows_that_vary_in_few_directions():
    """It ended with an error: the shipped model's 768 numbers vary in about 500."""
    fitted, held_out = table(400), table(200, seed=1)
    fitted.features[:, 30:] = 0
    assert [row["dim"] for row in size_table(fitted, held_out, dims=(15, 35))] == [15, 40]


def test_from_fit_to_extraction(tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(24):
        pixels = rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 96)).save(folder / f"{i:02}.png")
    common = ["--model", "test_deen_resnet", "--modality", "visible", "--device", "cpu"]
    features, head = str(tmp_path / "f.safetensors"), str(tmp_path / "head.safetensors")
    assert main(["extract", str(folder), "-o", features, *common]) == 0
    capsys.readouterr()
    with pytest.warns(UserWarning, match="24 rows .* 60 or more"):
        assert main(["project", features, "-o", head, "--dim", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dim"] == 6
    make = FeatureExtractor("test_deen_resnet", "cpu", project=head)
    rows = make(folder, "visible")
    assert rows.shape == (24, 6) and make.dim == 6
    plain = FeatureExtractor("test_deen_resnet", "cpu")(folder, "visible")
    torch.testing.assert_close(rows, read_head(head)(plain))
    with pytest.raises(UserError, match="flip 'true'"):
        FeatureExtractor("test_deen_resnet", "cpu", flip=False, project=head)
    arguments = ["search", "--query", str(folder / "00.png"), "--gallery", features, *common[:2]]
    arguments += ["--query-modality", "visible", "--project", head]
    assert main(arguments) == 2
    assert "features of 768 numbers" in capsys.readouterr().err
