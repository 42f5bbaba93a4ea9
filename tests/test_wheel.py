"""The built package: what the wheel holds, and that it works alone, without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from deen_zoo.cli import VERBS

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])('dist'))"
DATA = [
    "card.md",
    "evaluation/published.json",
    "models/catalog.json",
    "models/test_deen_resnet.json",
    "models/test_deen_resnet.safetensors",
    "py.typed",
]
# Runs with -S -E -s, so that neither the checkout nor an editable install of it is found: the
# wheel's folder, then the folder that has torch, and nothing else.
ALONE = """
import gc, sys
gc.disable()  # which halves the time of the imports
sys.path += sys.argv[1:3]
import deen_zoo
gc.freeze()
gc.enable()
assert deen_zoo.__file__.startswith(sys.argv[1]), deen_zoo.__file__
from deen_zoo.cli import VERBS, main
"""
HELP = """
for verb in VERBS:
    try:
        main([verb, "--help"])
    except SystemExit as done:
        assert done.code == 0, verb
"""
MODELS = """
import torch
assert {"deen_resnet50_sysu", "agw_resnet50_sysu"} < set(deen_zoo.list_models())
model = deen_zoo.create_model("test_deen_resnet", pretrained=True).eval()
assert model.forward_embedding(torch.zeros(1, 3, 128, 64), "infrared").shape == (1, 768)
"""
REPRODUCE = """
from deen_zoo.training import report
report._draw = lambda *_: None  # no pictures
code = main(["reproduce", "synthetic", "--output", sys.argv[3], "--epochs", "1",
             "--people", "12", "--threads", "1", "--set", "data.image_size=[64, 32]"])
gc.freeze()
sys.exit(code)
"""


def sources() -> set[str]:
    """What git tracks; in an unpacked source distribution, all there is."""
    command = ["git", "ls-files", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}
    except (OSError, subprocess.CalledProcessError):
        return {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()}


def run(code: str, *arguments: str | Path, cwd: Path, flags: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *flags, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


def build(folder: Path, what: str) -> Path:
    """Build in a folder, which is written to; no network, as the backend is installed already."""
    return folder / "dist" / run(BUILD, what, cwd=folder).split()[-1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel of the checkout, and that of its source distribution."""
    checkout, unpacked = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in sources():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    with tarfile.open(build(checkout, "sdist")) as archive:
        archive.extractall(unpacked, filter="data")
    (inside,) = unpacked.iterdir()
    return build(checkout, "wheel"), build(inside, "wheel")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(wheels: tuple[Path, Path]) -> None:
    from_checkout, from_sdist = map(contents, wheels)
    assert from_checkout == from_sdist
    package = {f"deen_zoo/{name}" for name in DATA}
    package |= {name for name in sources() if name.startswith("deen_zoo/") and name.endswith(".py")}
    assert {name for name in from_checkout if ".dist-info/" not in name} == package
    for name in package:
        assert from_checkout[name] == (ROOT / name).read_bytes()


@pytest.mark.slow
def test_the_wheel_alone(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(tmp_path / "site")
    import torch

    torch_home = Path(torch.__file__).parents[1]
    where = (tmp_path / "site", torch_home, tmp_path / "run")
    code = ALONE + HELP + MODELS + REPRODUCE
    said = run(code, *where, cwd=tmp_path, flags=("-S", "-E", "-s"))
    for verb in VERBS:
        assert f"usage: deen-zoo {verb}" in said
    assert "llcm-ir2vis" in said and (tmp_path / "run/results.json").is_file()
    assert (tmp_path / "run/checkpoint/model.safetensors").is_file()
