"""Whatever is typed or lies in a file: a result, or one line that says what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import deen_zoo
from deen_zoo.cli import VERBS, load_verb, main
from deen_zoo.data import check_dataset, open_dataset, open_image, read_permutations
from deen_zoo.data.folder import read_csv
from deen_zoo.errors import UserError
from deen_zoo.evaluation.known import refuse_known_people
from deen_zoo.features.files import FeatureTable, read_feature_table, write_feature_table
from deen_zoo.features.project import Head, read_head, write_head
from deen_zoo.hub import publish
from deen_zoo.models.convert import read_checkpoint
from deen_zoo.models.pretrained import sha256
from deen_zoo.training.recipes import get_recipe
from deen_zoo.training.state import load_state, save_state

from . import forked, trees

pytestmark = pytest.mark.slow
# The folder of a test is shared by its examples: each writes the file that it reads.
TRY = settings(
    max_examples=40,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that reads a MATLAB file has SciPy already, for each of the examples."""
    run = SimpleNamespace(run=lambda command, **_: forked.run(*command[1:]))
    monkeypatch.setattr("deen_zoo.data.protocols.subprocess", run)


# The command line.

NUMBERS = ["1", "2", "0", "-1", "1.5", "nan", "1e400", "", "x", "99999999999999999999"]
NAMES = ["image.png", "people.csv", "features.npz", "garbage.npz", "garbage.safetensors", "empty"]
NAMES += ["llcm", "test_deen_resnet", "nothing/here", "out.png", "out.npz", "out.onnx", "", "a\nb"]
# What would work for minutes, reach for the network, or go on for ever, is not asked for.
BOUNDS = {
    "reproduce": ["--data-root", "empty", "--threads", "1"],
    "synthesize": ["--people", "2", "--workers", "1", "--images-per-camera", "1"],
    "benchmark": ["x"],
    "publish": ["--dry-run", "out"],
    "extract": ["--threads", "1"],
    "search": ["--threads", "1"],
    "visualize": ["--threads", "1"],
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few things to name on a command line."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "empty").mkdir()
    for name in ("garbage.npz", "garbage.safetensors"):
        (folder / name).write_bytes(b"\x00garbage")
    np.savez(
        folder / "features.npz", features=np.eye(4, 3, dtype=np.float32), paths=list("abcd"),
        identity=[0, 0, 1, 1], camera=[1, 2, 1, 2], infrared=[True, False] * 2,
    )  # fmt: skip
    (folder / "people.csv").write_text("path,modality\nimage.png,visible\n")
    Image.new("RGB", (9, 20), "red").save(folder / "image.png")
    return folder


def words(verb: str) -> st.SearchStrategy[list[str]]:
    """Arguments by the verb's own grammar, with values that are good, bad or absent."""
    parts: list[st.SearchStrategy[list[str]]] = []
    for action in load_verb(verb)[1]._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = st.sampled_from(NAMES if action.type is None else NUMBERS)
        if action.choices:
            known = [str(choice) for choice in action.choices if choice != "synthetic"]
            value = st.sampled_from([*known, *known, "x"])
        if action.dest == "model":
            value = st.sampled_from(["test_deen_resnet", "deen_resnet99", "empty", "local-dir:x"])
        count = {0: (0, 0), 2: (2, 2), "+": (1, 2), "*": (0, 2)}.get(action.nargs, (1, 1))
        values = st.lists(value, min_size=count[0], max_size=count[1])
        if not action.option_strings:
            parts.append(values)
            continue
        given = st.builds(lambda f, v: [f, *v], st.sampled_from(action.option_strings), values)
        absent = st.just(list[str]())
        parts.append(given if action.required else absent | absent | given)
    return st.tuples(*parts).map(lambda found: [word for part in found for word in part])


@pytest.mark.parametrize("verb", VERBS)
def test_any_arguments_end_in_a_result_or_one_line(
    verb: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    @TRY
    @given(words(verb))
    def ends_well(arguments: list[str]) -> None:
        line = [verb, *arguments, *BOUNDS.get(verb, [])]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(line)
            except SystemExit as done:  # argparse's own
                code = int(done.code or 0)
                assert code == 0 or "error: " in err.getvalue(), line
        assert code in (0, 1, 2), line
        last = err.getvalue().strip().splitlines()[-1:]
        assert code != 2 or last[0].startswith(f"deen-zoo {verb}: error: "), (line, last)
        assert "Traceback" not in err.getvalue()
        seen.add(code)

    monkeypatch.chdir(desk)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ends_well()
    assert 2 in seen


@TRY
@given(st.lists(st.sampled_from([*VERBS, "--version", "--help", "x", "", "-h", "--json"])))
def test_any_first_words(arguments: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main([*arguments, "--no-such-option"])  # "benchmark" alone takes half an hour
        except SystemExit as done:
            code = int(done.code or 0)
    assert code in (0, 2)


# Files.


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """Nothing like the file, or the file cut, or with some bytes replaced, or with some more."""
    how = data.draw(st.sampled_from(["other", "cut", "bytes", "more"]))
    if how == "other":
        return data.draw(st.binary(max_size=64))
    at = data.draw(st.integers(0, len(whole)))
    if how == "cut":
        return whole[:at]
    extra = data.draw(st.binary(min_size=1, max_size=16))
    return whole[:at] + extra + whole[at + (len(extra) if how == "bytes" else 0) :]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def changed(data: st.DataObject, content: Any) -> Any:
    """JSON with one value, at any depth, replaced or gone."""
    content = json.loads(json.dumps(content))
    place, steps = content, data.draw(st.integers(1, 5))
    for step in range(steps):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if step + 1 < steps and isinstance(place[key], (dict, list)) and place[key]:
            place = place[key]
            continue
        if data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(JSON)
        break
    return content


def one_line(read: Callable[[], Any]) -> bool:
    """Whether there is a result; if not, there is a one-line error for the user."""
    try:
        read()
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return False
    except OSError as error:
        assert error.filename or str(error)
        return False
    return True


@TRY
@given(st.data())
def test_any_csv(tmp_path: Path, data: st.DataObject) -> None:
    whole = b'path,identity,camera,modality\na.jpg,1,2,visible\n"b,c.jpg",2,,infrared\n'
    file = tmp_path / "images.csv"
    file.write_bytes(damaged(data, whole))
    one_line(lambda: read_csv(file))
    one_line(lambda: read_csv(file, "auto"))
    one_line(lambda: open_dataset("own", tmp_path).test())


INDEX = {
    "sysu": ("exp/train_id.txt", "exp/val_id.txt", "exp/test_id.txt"),
    "regdb": ("idx/train_visible_1.txt", "idx/test_thermal_10.txt"),
    "llcm": ("idx/train_vis.txt", "idx/train_nir.txt", "idx/test_id.txt"),
}


@pytest.mark.parametrize("name", INDEX)
def test_any_index_file(name: str, tmp_path: Path) -> None:
    """The check names the fault; the readers give a list or one line."""
    root = trees.MAKERS[name](tmp_path / name)

    @TRY
    @given(st.data())
    def survives(data: st.DataObject) -> None:
        file = root / data.draw(st.sampled_from(INDEX[name]))
        whole = file.read_bytes()
        file.write_bytes(damaged(data, whole))
        try:
            report = check_dataset(name, root, decode=False)
            dataset = deen_zoo.data.open_dataset(name, root)
            good = one_line(lambda: [dataset.train(), dataset.test("visible")])
            assert good or not report.usable, report.faults
            assert str(report) and json.dumps(report.to_dict())
        finally:
            file.write_bytes(whole)

    survives()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("state.safetensors", load_state),
        ("rows.safetensors", read_feature_table),
        ("rows.parquet", read_feature_table),
        ("rows.npz", read_feature_table),
        ("head.safetensors", read_head),
        ("mine.toml", get_recipe),
        ("best.t", read_checkpoint),
        ("exp/rand_perm_cam.mat", lambda path: read_permutations(path.parents[1])),
        ("image.png", open_image),
        ("image.jpg", open_image),
    ],
)
def test_any_bytes(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if name == "state.safetensors":
        save_state(file, {"a": torch.ones(3), "b": [1, None, {"c": "d"}]})
    elif name == "best.t":
        torch.save({"net": {"base_resnet.base.layer1.0.conv1.weight": torch.ones(2)}}, file)
    elif name.startswith("image"):
        Image.effect_noise((9, 20), 50).convert("RGB").save(file)
    elif name.startswith("rows"):
        if file.suffix == ".parquet":
            pytest.importorskip("pyarrow")
        labels = {"identity": np.arange(3), "infrared": np.arange(3) > 0}
        table = FeatureTable("made", torch.eye(3), ["a", "b", "c"], labels, {"model": "m"})
        write_feature_table(file, [table])
    elif name == "head.safetensors":
        write_head(Head(torch.ones(3), torch.ones(3, 2), {"flip": "true"}), file)
    elif name == "mine.toml":
        task = 'task = "deen_zoo.training.tasks:AGWTask"'
        file.write_text(f'base = "agw"\n{task}\n[optimizer]\nlr = 0.1\n[model.args]\nx = 1\n')
    else:
        scipy_io = pytest.importorskip("scipy.io")
        cameras, identities = np.empty((6, 1), object), np.empty((1, 1), object)
        identities[0, 0] = np.array([[1, 2, 3]] * 10)
        for camera in range(6):
            cameras[camera, 0] = identities
        scipy_io.savemat(file, {"rand_perm_cam": cameras})
    whole = file.read_bytes()
    read(file)  # it is a whole one

    @TRY
    @given(st.data())
    def survives(data: st.DataObject) -> None:
        file.write_bytes(damaged(data, whole))
        one_line(lambda: read(file))

    survives()


def test_any_words_about_the_training_set(llcm_tree: Path, tmp_path: Path) -> None:
    """Whatever a ``config.json`` says that its weights were trained on: rows, or one line."""
    model = deen_zoo.create_model("test_deen_resnet", num_classes=3)
    folder = deen_zoo.save_pretrained(model, tmp_path / "model")
    whole = json.loads((folder / "config.json").read_text())
    dataset = deen_zoo.data.open_dataset("llcm", llcm_tree)
    tested = {sample.identity for sample in dataset.test("visible")}
    said = {"dataset": "llcm", "split": 1, "drawn": True, "world": 0, "people": [1, 2]}
    said |= {"identities_sha256": "x", "intensity": "minmax", "source": "yyds"}
    blank = np.zeros((64, 32, 3), np.uint8)

    @TRY
    @given(st.dictionaries(st.sampled_from([*said]), JSON))
    def survives(changes: dict[str, Any]) -> None:
        whole["deen_zoo"]["trained_on"] = {**said, **changes}
        (folder / "config.json").write_text(json.dumps(whole))

        def judge() -> None:
            make = deen_zoo.FeatureExtractor(folder, "cpu", threads=1)
            assert make([blank], "visible").isfinite().all()

        one_line(judge)
        check = ["the weights", type(dataset), 1, tested, dataset]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one_line(lambda: refuse_known_people({**said, **changes}, *check))

    survives()


def test_any_results(tmp_path: Path) -> None:
    """Changed results are published as a card, or refused."""
    from .test_hub import results

    model = deen_zoo.create_model("test_deen_resnet", num_classes=3)
    folder = deen_zoo.save_pretrained(model, tmp_path / "model")
    whole = results(sha256(folder / "model.safetensors"))
    file = tmp_path / "results.json"

    @TRY
    @given(st.data())
    def survives(data: st.DataObject) -> None:
        file.write_text(json.dumps(changed(data, whole)))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        one_line(lambda: publish(folder, "lab/a", results=file, dry_run=tmp_path / "out"))

    survives()
