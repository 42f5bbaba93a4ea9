"""Other people's packages, unedited, on this package's models and files: see docs/clients.md.

Each is skipped where it is not installed; ``pip install '.[clients]'`` brings them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deen_zoo

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> deen_zoo.models.ReidModel:
    return deen_zoo.create_model("test_deen_resnet", pretrained=True).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 128, 64, generator=torch.Generator().manual_seed(0))


def test_pytorch_metric_learning(model, images) -> None:
    """Its inference model and its loss on the single-input module."""
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.utils.inference import InferenceModel

    trunk = model.for_modality("infrared")
    wanted = trunk(images)
    client = InferenceModel(trunk, normalize_embeddings=False)
    torch.testing.assert_close(client.get_embeddings(images), wanted.detach())
    client.train_knn(images)
    _, indices = client.get_nearest_neighbors(images, k=1)
    assert indices.flatten().tolist() == [0, 1, 2, 3]
    labels = torch.tensor([0, 0, 1, 1])
    assert torch.isfinite(TripletMarginLoss()(wanted, labels))


def test_pytorch_grad_cam(model, images) -> None:
    """C4: one map per image, of the last stage."""
    pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam import GradCAM

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x, "infrared")

    with GradCAM(Logits(), [model.stages[-1]]) as cam:
        maps = cam(images, targets=None)
    assert maps.shape == (4, 128, 64) and np.isfinite(maps).all() and maps.max() > 0


def test_captum(model, images) -> None:
    """Integrated gradients of one similarity: they add up to its difference from the baseline."""
    pytest.importorskip("captum")
    from captum.attr import IntegratedGradients

    describe = model.for_modality("visible", normalize=False)
    target = describe(images[:1]).detach()

    def similarity(x: torch.Tensor) -> torch.Tensor:
        return (describe(x) * target).sum(1)

    given, delta = IntegratedGradients(similarity).attribute(
        images[1:2], n_steps=64, return_convergence_delta=True
    )
    assert given.shape == (1, 3, 128, 64)
    change = similarity(images[1:2]) - similarity(torch.zeros_like(images[1:2]))
    assert abs(float(delta)) < 0.1 * max(1.0, abs(float(change)))


def test_a_vector_database(tmp_path, capsys) -> None:
    """Issue 16: the same first hits as the exact search, filtered by camera and time."""
    pytest.importorskip("lancedb")
    example = example_of("search_in_a_database")
    found = example.main(["--output", str(tmp_path)])
    assert found.database == found.exact and len(found.exact) > 4
    assert set(found.filtered_cameras) == {found.camera}


def test_ray(tmp_path, llcm_tree) -> None:
    """Issue 16: two actors give the extractor's rows; a killed actor loses nothing."""
    pytest.importorskip("ray")
    folder, target = llcm_tree / "test_nir", tmp_path / "rows"
    command = [sys.executable, str(ROOT / "examples/extract_with_ray.py"), str(folder),
               "--modality", "infrared", "--output", str(target), "--kill-one"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-2000:]
    import pyarrow.parquet as pq

    table = pq.read_table(target)
    rows = dict(zip(table["path"].to_pylist(), table["features"].to_pylist(), strict=True))
    paths = sorted(str(p) for p in folder.rglob("*.jpg"))
    assert sorted(rows) == paths
    wanted = deen_zoo.FeatureExtractor("test_deen_resnet", "cpu")(paths, modality="infrared")
    np.testing.assert_allclose([rows[p] for p in paths], wanted.numpy(), atol=1e-5)


TIMM = os.environ.get("TIMM_CHECKOUT", "")


@pytest.mark.skipif(not TIMM, reason="TIMM_CHECKOUT names no checkout of timm")
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("benchmark.py", "--model test_deen_resnet --bench infer --device cpu -b 4 "
         "--num-warm-iter 1 --num-bench-iter 2"),
        ("onnx_export.py", "{out}/deen.onnx --model test_deen_resnet --img-size 128"),
        ("validate.py", "{data} --model test_deen_resnet --device cpu -b 4 -j 0 "
         "--num-classes 64 --pretrained"),
        ("inference.py", "{data} --model test_deen_resnet --device cpu -b 4 -j 0 --pretrained "
         "--num-classes 64 --results-dir {out}"),
        ("train.py", "{data} --model test_deen_resnet --device cpu -b 4 -j 0 --epochs 1 "
         "--num-classes 2 --output {out} --input-size 3 128 64"),
    ],
)  # fmt: skip
def test_timm_scripts(script, arguments, tmp_path) -> None:
    """C1, C5: timm's own scripts, unedited, from its checkout (the wheel has none of them)."""
    for part in ("train", "validation", "val"):
        for kind in range(2):
            folder = tmp_path / "data" / part / str(kind)
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (64, 128), (99 * kind, 60 * i, 9)).save(folder / f"{i}.png")
    data = tmp_path / "data" / ("" if script in ("train.py",) else "val")
    words = arguments.format(out=tmp_path, data=data).split()
    code = (
        "import sys, runpy, deen_zoo\n"
        f"sys.argv = {[script, *words]!r}; sys.path.insert(0, {TIMM!r})\n"
        f"runpy.run_path({TIMM + '/' + script!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=1000, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def example_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_of_the_table() -> None:
    """docs/clients.md names a test of this file, or of another, in each row."""
    text = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) > 4
    for row in rows:
        file, _, test = row.rsplit("`", 2)[1].partition("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), row
