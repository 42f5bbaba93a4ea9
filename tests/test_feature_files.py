"""Feature files as this package writes them; those of other programs: test_cli_evaluate.py."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deen_zoo.data import Sample
from deen_zoo.errors import UserError
from deen_zoo.features.files import (
    FeatureTable,
    check_comparable,
    read_feature_table,
    write_feature_table,
)

PROVENANCE = {"model": "m", "weights_sha256": "ab", "descriptor": "bn", "flip": "true"}
SAMPLES = [
    Sample("/a/1.jpg", 7, 1, "visible"),
    Sample("/a/é\udcff.jpg", 8, 2, "infrared"),  # a name that is not UTF-8 on disk
    Sample("/a/3.jpg", 7, 3, "infrared"),
]


def table(samples=SAMPLES, dtype=torch.float32, **changes) -> FeatureTable:
    rows = torch.arange(len(samples) * 4, dtype=dtype).view(-1, 4)
    labels = {
        "identity": torch.tensor([s.identity for s in samples]),
        "camera": torch.tensor([s.camera for s in samples]),
        "infrared": torch.tensor([s.modality == "infrared" for s in samples], dtype=torch.bool),
    }
    made = FeatureTable("made", rows, [s.path for s in samples], labels, PROVENANCE, {"x": "gone"})
    return replace(made, **changes)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_written_is_read(suffix, dtype, tmp_path):
    file = tmp_path / f"f.{suffix}"
    write_feature_table(file, [table(dtype=dtype)])
    found = read_feature_table(file)
    assert found.samples() == SAMPLES and len(found) == 3
    assert found.features.dtype == dtype and torch.equal(
        found.features, table(dtype=dtype).features
    )
    assert found.provenance == PROVENANCE and found.unreadable == {"x": "gone"}
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_the_safetensors_file_is_one_for_others(tmp_path):
    write_feature_table(tmp_path / "f.safetensors", [table()])
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        assert file.metadata() == PROVENANCE
        paths = json.loads(file.get_tensor("paths").tobytes())
        np.testing.assert_array_equal(file.get_tensor("features"), table().features.numpy())
    assert paths == [s.path for s in SAMPLES]


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_tables_are_joined_row_after_row(suffix, tmp_path):
    unlabelled = table([Sample("/b/1.jpg", -1, -1, "visible")], unreadable={"y": "gone too"})
    write_feature_table(tmp_path / f"f.{suffix}", [table(), unlabelled])
    found = read_feature_table(tmp_path / f"f.{suffix}")
    assert found.paths == [*table().paths, "/b/1.jpg"]
    assert found.labels["identity"].tolist() == [7, 8, 7, -1]
    assert found.unreadable == {"x": "gone", "y": "gone too"}
    with pytest.raises(UserError, match=r"identity is unknown \(-1\) for 1 of 4"):
        found.samples()
    write_feature_table(tmp_path / f"g.{suffix}", [unlabelled])
    assert set(read_feature_table(tmp_path / f"g.{suffix}").labels) == {"infrared"}
    both = read_feature_table(tmp_path / f"g.{suffix}", write(tmp_path / f"h.{suffix}"))
    assert both.labels["identity"].tolist() == [-1, 7, 8, 7]
    assert both.labels["infrared"].tolist() == [False, False, True, True]


def write(file):
    write_feature_table(file, [table()])
    return file


def test_tables_may_be_read_one_at_a_time(tmp_path):
    class Lazy:
        """Two tables of which one is alive at a time."""

        def __len__(self):
            return 2

        def __getitem__(self, k):
            if k >= 2:
                raise IndexError
            return table([SAMPLES[k]])

    write_feature_table(tmp_path / "f.safetensors", Lazy())
    assert read_feature_table(tmp_path / "f.safetensors").samples() == SAMPLES[:2]


def test_mapped_not_read(tmp_path):
    file = write(tmp_path / "f.safetensors")
    rows = read_feature_table(file).features
    data = bytearray(file.read_bytes())
    place = data.index(table().features.numpy().tobytes())
    with open(file, "r+b") as out:  # behind its back
        out.seek(place)
        out.write(np.float32(99).tobytes())
    assert rows[0, 0] == 99


@pytest.mark.parametrize(
    "tables, message",
    [
        ([], "none of the images can be read: there is none"),
        ([table([])], "none of the images can be read: gone"),
        ([table(), table()], "/a/1.jpg comes twice"),
    ],
)
def test_what_is_not_written(tables, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_feature_table(tmp_path / "f.safetensors", tables)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="give .safetensors or .npz"):
        write_feature_table(tmp_path / "f.pt", [table()])


@pytest.mark.parametrize("key", ["weights_sha256", "descriptor", "flip"])
def test_other_weights_or_settings_are_not_comparable(key, tmp_path):
    other = table(
        [Sample("/c.jpg", 1, 1, "visible")],
        source="other",
        provenance={**PROVENANCE, key: "something else"},
    )
    what = "weights" if key == "weights_sha256" else key
    message = f"made and other are not comparable: {what} '{PROVENANCE[key]}' and 'something else'"
    with pytest.raises(UserError, match=message):
        check_comparable(table(), other)
    write_feature_table(tmp_path / "f.safetensors", [other])
    with pytest.raises(UserError, match=f"not comparable: {what}"):
        read_feature_table(write(tmp_path / "g.safetensors"), tmp_path / "f.safetensors")


def test_what_may_differ_and_what_does_not_say():
    check_comparable(table(), table(provenance={**PROVENANCE, "deen_zoo": "9", "dtype": "float16"}))
    check_comparable(table(provenance={}), table(provenance={"author": "somebody"}))
    for a, b in (
        (table(), table(provenance={}, source="o")),
        (table(provenance={}, source="o"), table()),
    ):
        with pytest.raises(UserError, match="o does not say what made its features"):
            check_comparable(a, b)
    with pytest.raises(UserError, match="features of 2 numbers"):
        check_comparable(table(), table(features=torch.zeros(3, 2)))


def test_labels_that_are_needed():
    part = table().select(torch.tensor([False, True, True]))
    assert part.samples() == SAMPLES[1:] and part.features[0, 0] == 4
    assert table().select(torch.tensor([2, 0])).paths == ["/a/3.jpg", "/a/1.jpg"]
    with pytest.raises(UserError, match="made: no identity in it"):
        table(labels={}).label("identity")


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"paths": torch.tensor([1, 2], dtype=torch.uint8)}, {}, "its paths are not JSON"),
        ({"unreadable": torch.tensor([91, 93], dtype=torch.uint8)}, {"paths": '["a"]'}, "objects"),
    ],
)
def test_malformed_texts(tensors, metadata, message, tmp_path):
    save_file({"features": torch.zeros(1, 4), **tensors}, tmp_path / "f.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        read_feature_table(tmp_path / "f.safetensors")
