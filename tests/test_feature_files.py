"""Feature files as this package writes them; those of other programs: test_cli_evaluate.py."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import hypothesis.extra.numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from deen_zoo.cli import main
from deen_zoo.data import Sample
from deen_zoo.errors import UserError
from deen_zoo.features.files import (
    FeatureTable,
    check_comparable,
    label_column,
    read_feature_table,
    write_feature_table,
)

from . import trees

LABELS = ("identity", "camera", "infrared")
PROVENANCE = {"model": "m", "weights_sha256": "ab", "descriptor": "bn", "flip": "true"}
SAMPLES = [
    Sample("/a/1.jpg", 7, 1, "visible"),
    Sample("/a/é\udcff.jpg", 8, 2, "infrared"),  # a name that is not UTF-8 on disk
    Sample("/a/3.jpg", 7, 3, "infrared"),
]


def table(samples=SAMPLES, dtype=torch.float32, **changes) -> FeatureTable:
    rows = torch.arange(len(samples) * 4, dtype=dtype).view(-1, 4)
    labels = {
        "identity": label_column([s.identity for s in samples]),
        "camera": label_column([s.camera for s in samples]),
        "infrared": np.array([s.modality == "infrared" for s in samples], bool),
    }
    made = FeatureTable("made", rows, [s.path for s in samples], labels, PROVENANCE, {"x": "gone"})
    return replace(made, **changes)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_file_may_be_read_by_whom_the_system_lets(suffix, tmp_path):
    """Those of safetensors were the writer's alone, whatever the umask."""
    (tmp_path / "plain").touch()
    file = tmp_path / f"f.{suffix}"
    write_feature_table(file, [table()])
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "parquet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("words", [False, True])
def test_what_is_written_is_read(suffix, dtype, words, tmp_path):
    """C9: identities and cameras may be words."""
    samples = [s._replace(identity=f"p{s.identity}", camera="é") if words else s for s in SAMPLES]
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
        samples[1] = samples[1]._replace(path="/a/é.jpg")  # Arrow's strings are UTF-8
    file = tmp_path / f"f.{suffix}"
    write_feature_table(file, [table(samples, dtype=dtype)])
    found = read_feature_table(file)
    assert found.samples() == samples and len(found) == 3
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


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "parquet"])
def test_tables_are_joined_row_after_row(suffix, tmp_path):
    samples = [SAMPLES[0], SAMPLES[1]._replace(path="/a/2.jpg"), SAMPLES[2]]
    first = table(samples)
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    unlabelled = table([Sample("/b/1.jpg", -1, -1, "visible")], unreadable={"y": "gone too"})
    write_feature_table(tmp_path / f"f.{suffix}", [first, unlabelled])
    found = read_feature_table(tmp_path / f"f.{suffix}")
    assert found.paths == [*first.paths, "/b/1.jpg"]
    assert found.labels["identity"].tolist() == [7, 8, 7, -1]
    assert found.unreadable == {"x": "gone", "y": "gone too"}
    with pytest.raises(UserError, match="identity .*1 of 4"):
        found.samples()
    write_feature_table(tmp_path / f"g.{suffix}", [unlabelled])
    assert set(read_feature_table(tmp_path / f"g.{suffix}").labels) == {"infrared"}
    both = read_feature_table(tmp_path / f"g.{suffix}", write(tmp_path / "h.npz"))
    assert both.labels["identity"].tolist() == [-1, 7, 8, 7]
    assert both.labels["infrared"].tolist() == [False, False, True, True]


def write(file):
    write_feature_table(file, [table()])
    return file


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "parquet"])
def test_a_full_disk_is_an_os_error(suffix, tmp_path):
    """A limit on the size of files stands for a disk without room; nothing half written stays."""
    resource = pytest.importorskip("resource")
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    made = [table(SAMPLES[:1], features=torch.randn(1, 5000)) for _ in range(2)]
    made[1] = replace(made[1], paths=["/b.jpg"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for tables in (made[:1], made):
            with pytest.raises(OSError, match="File too large"):
                write_feature_table(tmp_path / f"f.{suffix}", tables)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


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
    ("tables", "message"),
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
    with pytest.raises(UserError, match="give .safetensors"):
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
        with pytest.raises(UserError, match="o does not say"):
            check_comparable(a, b)
    with pytest.raises(UserError, match="features of 2 numbers"):
        check_comparable(table(), table(features=torch.zeros(3, 2)))


def test_other_intensities_are_said_where_both_have_infrared_rows(recwarn):
    silent = table()
    minmax, full = (
        replace(silent, provenance={**silent.provenance, "intensity": rule})
        for rule in ("minmax", "full")
    )
    infrared = minmax.labels["infrared"]
    check_comparable(minmax, full.select(~infrared))
    check_comparable(minmax, silent)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="intensity minmax and full"):
        check_comparable(minmax, full)


@pytest.mark.parametrize("values", [[1.2, 1.7], [True, False], [2**63], [1, None], ["a", 1.5]])
def test_labels_are_whole_numbers_or_words(values):
    """B2: floats were cut off, and people of 1.2 and 1.7 became one."""
    with pytest.raises(UserError, match="64 bits"):
        label_column(values)


def test_an_arrow_column_of_floats_is_no_identity():
    pa = pytest.importorskip("pyarrow")
    rows = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 4), 2)
    columns = {"path": ["a", "b"], "features": rows, "identity": [1.2, 1.7]}
    with pytest.raises(UserError, match="the table: identity: .*1.2"):
        FeatureTable.from_arrow(pa.table(columns))


def test_labels_that_are_needed():
    part = table().select(np.array([False, True, True]))
    assert part.samples() == SAMPLES[1:] and part.features[0, 0] == 4
    assert table().select(torch.tensor([2, 0])).paths == ["/a/3.jpg", "/a/1.jpg"]
    with pytest.raises(UserError, match="made: no identity in it"):
        table(labels={}).label("identity")


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"paths": torch.tensor([1, 2], dtype=torch.uint8)}, {}, "its paths are not JSON"),
        ({"unreadable": torch.tensor([91, 93], dtype=torch.uint8)}, {"paths": '["a"]'}, "objects"),
    ],
)
def test_malformed_texts(tensors, metadata, message, tmp_path):
    save_file({"features": torch.zeros(1, 4), **tensors}, tmp_path / "f.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        read_feature_table(tmp_path / "f.safetensors")


def read_aligned(file) -> dict[str, int]:
    """Offset of every tensor in the file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return {k: 8 + size + v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tensors_are_aligned(count, tmp_path):
    """C7: int64 labels came after the paths' bytes, so a typed array over them failed."""
    write_feature_table(tmp_path / "f.safetensors", [table(SAMPLES[:count], torch.float16)])
    places = read_aligned(tmp_path / "f.safetensors")
    assert all(places[name] % 8 == 0 for name in ("identity", "camera", "features"))
    assert read_feature_table(tmp_path / "f.safetensors").features.data_ptr() % 8 == 0


def test_files_of_0_1_0_are_read(tmp_path):
    """Its writer put the labels after the paths, and ``branches`` next to the descriptor."""
    t = table()
    tensors = {
        "features": t.features,
        "paths": torch.tensor(list(b'["a", "b", "c"]'), dtype=torch.uint8),
    }
    tensors |= {name: torch.from_numpy(values) for name, values in t.labels.items()}
    for branches, descriptor in (("all", "bn"), ("original", "original bn")):
        save_file(tensors, tmp_path / "f.safetensors", {**PROVENANCE, "branches": branches})
        found = read_feature_table(tmp_path / "f.safetensors")
        assert found.paths == ["a", "b", "c"] and found.labels["identity"].tolist() == [7, 8, 7]
        assert found.provenance == {**PROVENANCE, "descriptor": descriptor}
    official = {**PROVENANCE, "descriptor": "official", "branches": "original"}
    save_file(tensors, tmp_path / "f.safetensors", official)
    assert read_feature_table(tmp_path / "f.safetensors").provenance["descriptor"] == "original"


def test_numbers_in_the_provenance(tmp_path):
    """C8: a NumPy integer there was a traceback."""
    made = table(provenance={"epoch": np.int64(3), 7: 1.5})
    for name in ("f.safetensors", "f.npz"):
        write_feature_table(tmp_path / name, [made])
        assert read_feature_table(tmp_path / name).provenance == {"epoch": "3", "7": "1.5"}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_labels_of_any_integer_type(dtype, suffix, tmp_path):
    """C8: unsigned labels were a traceback."""
    ids, file = np.array([3, 200 % np.iinfo(dtype).max], dtype), tmp_path / f"f.{suffix}"
    if suffix == "npz":
        np.savez(file, features=np.eye(2, dtype=np.float32), paths=["a", "b"], identity=ids)
    else:
        tensors = {"features": torch.eye(2), "identity": torch.from_numpy(ids)}
        save_file(tensors, file, {"paths": '["a", "b"]'})
    found = read_feature_table(file).labels["identity"]
    assert found.dtype == np.int64 and found.tolist() == ids.tolist()


def archive(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


GOOD = archive(features=np.eye(2, dtype=np.float32), paths=["a", "b"], identity=[1, 2])


def encrypted(data: bytes) -> bytes:
    """The archive with the flag of an encrypted member, in both headers."""
    out = bytearray(data)
    for signature, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = out.find(signature)
        while place >= 0:
            out[place + flag] |= 1
            place = out.find(signature, place + 1)
    return bytes(out)


BAD = {
    "float8": lambda: {"features": torch.eye(2).to(torch.float8_e4m3fn)},
    "too large": lambda: archive(
        features=np.eye(2), paths=["a", "b"], identity=np.uint64([1, 2**63])
    ),
    "deep": lambda: {"paths": torch.tensor(list(b"[" * 200_000), dtype=torch.uint8)},
    "deep npz": lambda: archive(features=np.eye(2), paths=["a", "b"], provenance="[" * 200_000),
    "encrypted": lambda: encrypted(GOOD),
    "lying": lambda: GOOD.replace(b"(2, 2)", b"(9, 9)"),
    "lying much": lambda: GOOD.replace(
        b"'shape': (2, 2), }          ", b"'shape': (9999999, 9999999)}"
    ),
    "cut": lambda: GOOD[:-30],
    "pickle": lambda: archive(features=np.eye(2), paths=np.array(["a", None])),
    "an array": lambda: npy(np.eye(2)),
    "bfloat16 labels": lambda: {"identity": torch.ones(2, dtype=torch.bfloat16)},
}


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize("name", BAD)
def test_hostile_files_are_one_line(name, tmp_path):
    """C8: tracebacks."""
    made = BAD[name]()
    file = tmp_path / ("f.npz" if isinstance(made, bytes) else "f.safetensors")
    if isinstance(made, bytes):
        file.write_bytes(made)
    else:
        rest = {} if "paths" in made else {"paths": '["a", "b"]'}
        save_file({"features": torch.eye(2), **made}, file, rest)
    with pytest.raises(UserError) as caught:
        read_feature_table(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


numbers = hypothesis.extra.numpy.arrays(
    st.sampled_from(
        [np.float32, np.float64, np.int64, np.uint8, np.complex64, "U2", "M8[s]", bool]
    ),
    hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*LABELS, "features", "paths", "provenance", "unreadable"]), numbers
    )
)
def test_arrays_of_any_kind_are_read_or_one_line(tmp_path_factory, arrays):
    """C8: whatever a stranger's program stored under these names."""
    file = tmp_path_factory.mktemp("npz") / "f.npz"
    np.savez(file, **arrays)
    try:
        table = read_feature_table(file)
        assert len(table) == len(table.features) == len(set(table.paths))
    except UserError as error:
        assert str(file) in str(error) and "\n" not in str(error)


@pytest.mark.slow
def test_parquet_from_images_to_every_reader(tmp_path, capsys):
    """Issue 16: what ``extract`` writes, ``search``, ``evaluate`` and ``visualize`` read."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    root, answers = trees.llcm(tmp_path / "llcm", images=1), []
    for suffix in ("safetensors", "parquet"):
        file, picture = str(tmp_path / f"f.{suffix}"), tmp_path / f"{suffix}.png"
        extract = ["extract", str(root), "--layout", "llcm", "--model", "test_deen_resnet"]
        assert main([*extract, "-o", file]) == 0
        said = []
        for words in (
            ["search", "--query", file, "--gallery", file, "-k", "3"],
            ["evaluate", file, "--protocol", "llcm-ir2vis"],
        ):
            capsys.readouterr()
            assert main([*words, "--json"]) == 0
            said.append(json.loads(capsys.readouterr().out))
        assert main(["visualize", "similarities", file, "-o", str(picture)]) == 0
        answers.append([*said, np.asarray(Image.open(picture)).tolist()])
    assert answers[0] == answers[1]
    schema = parquet.read_schema(tmp_path / "f.parquet")  # without this package
    made = read_feature_table(tmp_path / "f.safetensors")
    assert schema.field("features").type == pa.list_(pa.float32(), made.features.shape[1])
    assert json.loads(schema.metadata[b"provenance"]) == made.provenance
    assert {"weights_sha256", "preprocessing", "descriptor", "flip"} <= set(made.provenance)


def test_bytes_per_row_are_those_of_the_docs(tmp_path):
    """The table of docs/clients.md, to 3 %: paths of 29 characters, rows of length 1."""
    pytest.importorskip("pyarrow")
    page = (Path(__file__).parents[1] / "docs/clients.md").read_text(encoding="utf-8")
    claims = re.findall(
        r"^\| ([\d,]+) numbers.*?, (float\d+) \| ([\d,]+) \| ([\d,]+) \|", page, re.M
    )
    assert len(claims) == 5
    for numbers, dtype, *bytes_ in claims:
        width = int(numbers.replace(",", ""))
        count = 2**20 // width
        rows = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
        rows = torch.nn.functional.normalize(rows).to(getattr(torch, dtype))
        paths = [f"/data/gallery/cam1/{i:06}.jpg" for i in range(count)]
        for suffix, claim in zip(("safetensors", "parquet"), bytes_, strict=True):
            file = tmp_path / f"f.{suffix}"
            write_feature_table(file, [FeatureTable("x", rows, paths, {})])
            size = file.stat().st_size / count
            assert size == pytest.approx(int(claim.replace(",", "")), rel=0.03), (numbers, suffix)


def test_arrow(tmp_path):
    pa = pytest.importorskip("pyarrow")
    made = table([s._replace(path=f"/a/{i}.jpg") for i, s in enumerate(SAMPLES)])
    arrow = made.to_arrow()
    assert arrow.column_names == ["path", "identity", "camera", "modality", "features"]
    assert arrow.schema.field("features").type == pa.list_(pa.float32(), 4)
    assert json.loads(arrow.schema.metadata[b"provenance"]) == PROVENANCE
    back = FeatureTable.from_arrow(arrow)
    assert back.samples() == made.samples() and torch.equal(back.features, made.features)
    foreign = pa.table({"path": ["a", "b"], "features": [[1.0, 2.0], [3.0, 4.0]]})
    assert FeatureTable.from_arrow(foreign).features.tolist() == [[1, 2], [3, 4]]
    for wrong in (
        pa.table({"path": ["a"]}),
        pa.table({"path": ["a", "b"], "features": [[1.0], [3.0, 4.0, 5.0]]}),
        pa.table({"path": ["a"], "features": [[1.0]], "modality": ["thermal"]}),
    ):
        with pytest.raises(UserError):
            FeatureTable.from_arrow(wrong)
    with pytest.raises(UserError, match="UTF-8"):
        table().to_arrow()
    rows = FeatureTable("x", torch.randn(500, 64), [f"{i}.png" for i in range(500)], {})
    write_feature_table(tmp_path / "f.parquet", [rows])
    assert (tmp_path / "f.parquet").stat().st_size < 1.2 * 500 * 64 * 4  # no dictionary of floats
    (tmp_path / "f.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(UserError, match=r"f\.parquet"):
        read_feature_table(tmp_path / "f.parquet")
