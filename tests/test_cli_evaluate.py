"""``deen-zoo evaluate`` and the feature files it reads."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deen_zoo.cli import main
from deen_zoo.data import open_dataset
from deen_zoo.errors import UserError
from deen_zoo.evaluation import evaluate
from deen_zoo.evaluation.known import people_digest
from deen_zoo.features.files import FeatureTable, read_feature_table, write_feature_table

from .test_protocols import FEATURES, WORLD, features_of, write_names

COLUMNS = {
    "identity": np.array([s.identity for s in WORLD]),
    "camera": np.array([s.camera for s in WORLD]),
    "infrared": np.array([s.modality == "infrared" for s in WORLD]),
}
PATHS = [s.path for s in WORLD]


def write_npz(path: Path, **changes) -> Path:
    arrays = {"features": FEATURES, "paths": PATHS, **COLUMNS, **changes}
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
    return path


def write_safetensors(path: Path, paths: str | None = json.dumps(PATHS), **changes) -> Path:
    arrays = {"features": FEATURES, **COLUMNS, **changes}
    tensors = {k: torch.as_tensor(v) for k, v in arrays.items() if v is not None}
    save_file(tensors, path, metadata=None if paths is None else {"paths": paths})
    return path


@pytest.mark.parametrize("write", [write_npz, write_safetensors])
def test_json_equals_the_library(write, tmp_path, capsys):
    file = write(tmp_path / f"features.{write.__name__.removeprefix('write_')}")
    assert main(["evaluate", str(file), "--protocol", "llcm-ir2vis", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == evaluate(FEATURES, WORLD, "llcm-ir2vis").to_dict()
    assert "llcm-ir2vis" in err


def test_published_numbers_do_not_stand_next_to_those_of_drawn_people(tmp_path, capsys):
    """Those of the paper stood below 71 per cent of people who are drawn."""
    file = write_npz(tmp_path / "features.npz", paths=[str(tmp_path / path) for path in PATHS])
    command = ["evaluate", str(file), "--protocol", "llcm-ir2vis"]
    assert main(command) == 0
    assert "DEEN" in capsys.readouterr().out
    (tmp_path / "synthetic.json").write_text("{}")
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "DEEN" not in said and "drawn" in said


def test_published_numbers_are_those_of_the_model_that_made_the_rows(tmp_path, capsys):
    file = tmp_path / "features.safetensors"
    table = FeatureTable("rows", torch.tensor(FEATURES), PATHS, COLUMNS, {"method": "AGW"})
    write_feature_table(file, [table])
    assert main(["evaluate", str(file), "--protocol", "llcm-ir2vis", "--json"]) == 0
    methods = {entry["method"] for entry in json.loads(capsys.readouterr().out)["published"]}
    assert methods == {"AGW"}


def test_table_options_and_per_query(tmp_path, capsys):
    file, rows = write_npz(tmp_path / "features.npz"), tmp_path / "queries.csv"
    arguments = ["--protocol", "llcm-vis2ir", "--trials", "2", "--shots", "2", "--rerank"]
    arguments += ["--camera-pairs", "--per-query", str(rows)]
    assert main(["evaluate", str(file), *arguments]) == 0
    out = capsys.readouterr().out
    assert "llcm-vis2ir, 2-shot + k-reciprocal re-ranking" in out and "2 seeded draws" in out
    assert "no match" in out
    with open(rows, newline="") as lines:
        assert len(list(csv.reader(lines))) == 1 + 2 * sum(~COLUMNS["infrared"])


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "none" / "queries.csv"):
        arguments = ["evaluate", "absent.npz", "--protocol", "llcm-ir2vis", "--per-query"]
        assert main([*arguments, str(place)]) == 2
        assert str(place) in capsys.readouterr().err


def test_features_say_whom_their_model_was_trained_on(tmp_path, capsys):
    """Features of people that the model knows were scored."""
    table, file = read_feature_table(write_npz(tmp_path / "a.npz")), tmp_path / "f.safetensors"
    tested = people_digest(sample.identity for sample in WORLD)
    for trained_on, protocol, says in (
        ({"dataset": "regdb", "split": 1}, "regdb-ir2vis", "trained on split 1"),
        ({"dataset": "llcm", "split": 1, "identities_sha256": tested}, "llcm-ir2vis", "trained on"),
        ({"dataset": "llcm", "split": 1, "identities_sha256": "a"}, "llcm-ir2vis", ""),
        ({"dataset": "regdb", "split": 4}, "regdb-ir2vis", ""),
    ):
        table.provenance["trained_on"] = json.dumps(trained_on)
        write_feature_table(file, [table])
        arguments = ["evaluate", str(file), "--protocol", protocol]
        arguments += ["--split", "4"] if protocol.startswith("regdb") else ["--trials", "1"]
        assert main(arguments) == (2 if says else 0)
        assert says in capsys.readouterr().err


def test_files_of_both_modalities_are_joined(tmp_path, capsys):
    files = []
    for name, rows in (("ir", COLUMNS["infrared"]), ("vis", ~COLUMNS["infrared"])):
        part = {"features": FEATURES[rows], "paths": np.array(PATHS)[rows]}
        part |= {key: values[rows] for key, values in COLUMNS.items()}
        files.append(str(write_npz(tmp_path / f"{name}.npz", **part)))
    assert main(["evaluate", *files, "--protocol", "regdb-ir2vis", "--split", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == evaluate(FEATURES, WORLD, "regdb-ir2vis", trials=[4]).to_dict()
    assert result["trials"][0]["trial"] == 4


@pytest.fixture
def sysu(tmp_path):
    return open_dataset("sysu", write_names("sysu", tmp_path / "sysu"))


@pytest.mark.parametrize("absolute", [True, False])
def test_labels_of_the_dataset(absolute, sysu, tmp_path, capsys):
    samples = sysu.test("visible") + sysu.test("infrared")
    paths = [s.path if absolute else sysu.relative(s.path) for s in samples]
    features = features_of(samples)
    order = np.random.default_rng(0).permutation(len(samples))
    file = tmp_path / "features.npz"  # no labels, any order, an image more than needed
    np.savez(
        file,
        features=np.vstack([features[order], features[:1]]),
        paths=[*np.array(paths)[order], "cam1/0999/0001.jpg"],
    )
    arguments = ["evaluate", str(file), "--protocol", "sysu-all", "--json"]
    assert main([*arguments, "--data-root", sysu.root]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = evaluate(features, samples, "sysu-all")
    assert result["mean"] == pytest.approx(expected.mean)
    assert result["counts"] == expected.counts
    assert main(arguments) == 2  # without the dataset
    assert "identity, camera, infrared" in capsys.readouterr().err


def test_official_draw(sysu, tmp_path, capsys):
    scipy_io = pytest.importorskip("scipy.io")
    samples = sysu.test("visible") + sysu.test("infrared")
    identities = np.empty((26, 1), dtype=object)
    cameras = np.empty((6, 1), dtype=object)
    for camera in range(1, 7):
        for identity in range(1, 27):
            n = 1 + (identity * camera) % 3  # images, as the tree has them
            identities[identity - 1, 0] = np.array([np.roll(range(1, n + 1), t) for t in range(10)])
        cameras[camera - 1, 0] = identities.copy()
    scipy_io.savemat(Path(sysu.root, "exp", "rand_perm_cam.mat"), {"rand_perm_cam": cameras})
    file = write_npz(
        tmp_path / "features.npz", features=features_of(samples), paths=[s.path for s in samples],
        identity=None, camera=None, infrared=None,
    )  # fmt: skip
    arguments = ["evaluate", str(file), "--protocol", "sysu-all", "--json", "--draw", "official"]
    assert main([*arguments, "--data-root", sysu.root]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["draw"] == "official" and result["counts"]["gallery"] == 26 * 4
    assert main(arguments) == 2
    assert "give --data-root" in capsys.readouterr().err


def test_a_test_image_without_a_row_is_named(sysu):
    samples = sysu.test("visible") + sysu.test("infrared")
    file = Path(sysu.root).parent / "features.npz"
    np.savez(file, features=features_of(samples[1:]), paths=[s.path for s in samples[1:]])
    with pytest.raises(UserError, match=rf"1 of {len(samples)} test images.*{samples[0].path}"):
        read_feature_table(file).of_dataset(sysu)
    paths = [s.path for s in samples]
    np.savez(file, features=features_of([*samples, samples[0]]), paths=[*paths, "no\0file"])
    assert len(read_feature_table(file).of_dataset(sysu)[1]) == len(samples)


N = len(WORLD)
MALFORMED = {
    "no_file": (lambda p: p / "absent.npz", "there is no such file"),
    "kind": (lambda p: p / "features.pkl", "give .safetensors"),
    "no_features": (lambda p: write_npz(p / "f.npz", features=None), "no 'features' in it"),
    "no_paths": (lambda p: write_npz(p / "f.npz", paths=None), "no 'paths' in it"),
    "no_metadata": (lambda p: write_safetensors(p / "f.safetensors", None), "no 'paths' in it"),
    "bad_json": (lambda p: write_safetensors(p / "f.safetensors", "[1,"), "not JSON"),
    "not_a_list": (lambda p: write_safetensors(p / "f.safetensors", '{"a": 1}'), "not a list"),
    "numbers": (lambda p: write_npz(p / "f.npz", paths=np.arange(N)), "not a list of strings"),
    "one_path": (lambda p: write_npz(p / "f.npz", paths="a.jpg"), "not a list of strings"),
    "few_paths": (lambda p: write_npz(p / "f.npz", paths=PATHS[1:]), "rows of features"),
    "few_labels": (lambda p: write_npz(p / "f.npz", camera=[1]), "1 camera for"),
    "vector": (lambda p: write_npz(p / "f.npz", features=FEATURES[:, 0]), r"floats"),
    "scalar": (lambda p: write_npz(p / "f.npz", identity=1), "identity is"),
    "float_ids": (lambda p: write_npz(p / "f.npz", identity=np.ones(N)), r"store \(N,\) integers"),
    "table_ids": (lambda p: write_npz(p / "f.npz", identity=np.ones((N, 2), int)), "integers"),
    "int_infrared": (lambda p: write_npz(p / "f.npz", infrared=[1] * N), r"store \(N,\) bool"),
    "twice": (lambda p: write_npz(p / "f.npz", paths=[PATHS[0], *PATHS[:-1]]), "comes twice"),
    "object": (lambda p: write_npz(p / "f.npz", identity=np.array([{}] * N)), "readable npz"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_one_clear_line(name, tmp_path, capsys):
    make, message = MALFORMED[name]
    file = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read_feature_table(file)
    assert str(file) in str(caught.value)
    assert main(["evaluate", str(file), "--protocol", "llcm-ir2vis"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("deen-zoo evaluate: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x08" * 40, b"{}"])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_garbage_and_truncated_files(content, suffix, tmp_path):
    file = tmp_path / f"features.{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"not a readable {suffix} file"):
        read_feature_table(file)
    whole = write_npz(file) if suffix == "npz" else write_safetensors(file)
    file.write_bytes(whole.read_bytes()[:-400])
    with pytest.raises(UserError, match=f"not a readable {suffix} file"):
        read_feature_table(file)


def test_files_of_two_models_do_not_join(tmp_path):
    files = [write_npz(tmp_path / "a.npz"), write_npz(tmp_path / "b.npz", features=FEATURES[:, :8])]
    with pytest.raises(UserError, match=r"b\.npz.* 8 numbers"):
        read_feature_table(*files)
    with pytest.raises(UserError, match="no feature file"):
        read_feature_table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "llcm-ir2vis", "--split", "2"], "--split is for RegDB"),
        (["--protocol", "regdb-ir2vis", "--trials", "10"], "--trials is for drawn galleries"),
        (["--protocol", "regdb-ir2vis", "--split", "11"], "regdb-ir2vis has trials 1 to 10"),
        (["--protocol", "llcm-ir2vis", "--trials", "0"], "trials"),
        (["--protocol", "llcm-ir2vis", "--data-root", "nowhere"], "there is no such folder"),
    ],
)
def test_wrong_options(arguments, message, tmp_path, capsys):
    assert main(["evaluate", str(write_npz(tmp_path / "f.npz")), *arguments]) == 2
    assert message in capsys.readouterr().err
