"""Feature files of this package's models or of any other: safetensors, Parquet or npz.

==========  ====================================  ==============================================
name        type and shape                        in a ``.safetensors`` file
==========  ====================================  ==============================================
features    (N, D) floats                         tensor
paths       N strings, each image once            uint8 tensor, or a metadata entry: a JSON list
identity    (N,) integers or words, -1 or ""      tensor; words are the uint8 tensor
            where unknown                         ``identity_words``: a JSON list
camera      as identity                           as identity
infrared    (N,) bool                             tensor; False is visible
unreadable  {path: reason} of other images        uint8 tensor: a JSON object
provenance  what made the features                the other metadata entries
==========  ====================================  ==============================================

All but the first two may be missing. Any program writes such a file in one line::

    np.savez("features.npz", features=features, paths=paths,
             identity=identity, camera=camera, infrared=infrared)

or ``safetensors.torch.save_file({"features": ..., "identity": ...}, "features.safetensors",
metadata={"paths": json.dumps(paths)})``. A Parquet file has the columns ``path``, ``features`` (a
list of D floats), ``identity``, ``camera`` and ``modality``, null where unknown. When the dataset
itself is at hand, the labels can be read from there: :meth:`FeatureTable.of_dataset`.

A safetensors file is mapped, not read: rows take memory when they are used, so files larger than
the memory can be searched.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.images import Intensity, check_intensity
from ..data.protocols import Sample, as_label
from ..data.reader import ReidDataset
from ..errors import UserError, brief, plural, require
from ..io import check_target, whole_file

__all__ = ["FeatureTable", "check_comparable", "check_output", "label_column"]
__all__ += ["read_feature_table", "write_feature_table"]

Column = npt.NDArray[Any]
SUFFIXES = (".safetensors", ".parquet", ".npz")
_LABELS = ("identity", "camera", "infrared")
# What two files must share for their rows to be comparable.
_COMPARED = ("weights_sha256", "preprocessing", "descriptor", "flip", "normalize", "project")
_NONE = np.zeros(0, bool)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def label_column(values: Sequence[Any]) -> Column:
    """Identities or cameras as int64, or as words if any of them is one (-1 becomes "").

    Digits in a string are that number, as :func:`~deen_zoo.data.protocols.as_label` has it.

    Raises:
        UserError: A value is neither a whole number of 64 bits nor a word.

    >>> label_column([7, -1]), label_column(["0007", -1, "ann"])
    (array([ 7, -1]), array(['7', '', 'ann'], dtype='<U3'))
    """
    labels = [as_label(x) if not isinstance(x, str) or x.strip() else -1 for x in values]
    if any(isinstance(label, str) for label in labels):
        return np.array(["" if label == -1 else str(label) for label in labels])
    return np.array(labels, np.int64)


def unknown(values: Column) -> npt.NDArray[np.bool_]:
    """Which labels are not known: negative numbers and empty words."""
    if values.dtype == bool:
        return np.zeros(len(values), bool)
    return np.asarray(values == "" if values.dtype.kind == "U" else values < 0)


@dataclass(frozen=True)
class FeatureTable:
    """Rows of features and the images they belong to.

    Attributes:
        source: The file, for messages.
        features: (N, D) floats.
        paths: N names.
        labels: The known ones of ``identity``, ``camera`` (int64 or words) and ``infrared`` (bool),
            each a NumPy array (N,).
        provenance: What made the features: ``model``, ``weights_sha256``, ``preprocessing``, ...;
            empty in files of other programs.
        unreadable: Images that were asked for and have no row, with the reason.
    """

    source: str
    features: Tensor
    paths: Sequence[str]
    labels: dict[str, Column]
    provenance: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Any) -> FeatureTable:
        """The rows of an index or bool array."""
        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = rows.nonzero()[0]
        labels = {name: values[rows] for name, values in self.labels.items()}
        paths = [self.paths[i] for i in rows.tolist()]
        return replace(
            self, features=self.features[torch.from_numpy(rows)], paths=paths, labels=labels
        )

    def describe(self, row: int) -> dict[str, Any]:
        """Path, ``modality``, ``identity`` and ``camera`` of a row, as far as they are known."""
        out: dict[str, Any] = {"path": self.paths[row]}
        for name, values in self.labels.items():
            if name == "infrared":
                out["modality"] = "infrared" if values[row] else "visible"
            elif not unknown(values[row : row + 1]).any():
                out[name] = values[row].item()
        return out

    def label(self, name: str) -> Column:
        """(N,) identities, cameras or whether infrared.

        Raises:
            UserError: It is not in the file, or not known for every row.
        """
        if name not in self.labels:
            raise UserError(
                f"{self.source}: no {name} in it: list the images in a CSV file with the header "
                "path,identity,camera,modality, and give that file to 'deen-zoo extract'"
            )
        missing = int(unknown(self.labels[name]).sum())
        if missing:
            raise UserError(f"{self.source}: {name} is unknown for {missing} of {len(self)} rows")
        return self.labels[name]

    def samples(self) -> list[Sample]:
        """The rows as samples.

        Raises:
            UserError: The file has not all three labels of every row.
        """
        if absent := [name for name in _LABELS if name not in self.labels]:
            raise UserError(
                f"{self.source}: no {', '.join(absent)} in it; store them, or give the dataset's "
                "root (--data-root), which has them"
            )
        columns = (self.label(name).tolist() for name in _LABELS)
        return [
            Sample(path, identity, camera, "infrared" if infrared else "visible")
            for path, identity, camera, infrared in zip(self.paths, *columns, strict=True)
        ]

    def of_dataset(self, dataset: ReidDataset, split: int = 1) -> tuple[Tensor, list[Sample]]:
        """Features and samples of the dataset's test images, labelled by the dataset. Rows are
        found by path, absolute or below the root; other rows are left out.

        Raises:
            UserError: A test image has no row.
        """
        samples = dataset.test(split=split)
        root = Path(dataset.root).resolve()
        rows: dict[str, int] = {}
        for i, path in enumerate(self.paths):
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # no name of a file
                rows[str((root / path).resolve())] = i
        found = [rows.get(str(Path(sample.path).resolve()), -1) for sample in samples]
        if -1 in found:
            first = samples[found.index(-1)].path
            raise UserError(
                f"{self.source}: {found.count(-1)} of {len(samples)} test images have no row, such "
                f"as {first}; the paths in the file must be absolute or relative to {dataset.root}"
            )
        return self.features[torch.tensor(found)], samples

    @property
    def trained_on(self) -> dict[str, Any]:
        """What the model's weights were trained on, as far as the provenance says."""
        try:
            found = json.loads(self.provenance.get("trained_on", "{}"))
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    @property
    def intensity(self) -> Intensity:
        """How 16-bit images were scaled, as far as the provenance says."""
        try:
            return check_intensity(self.provenance.get("intensity", "full"))
        except UserError:  # of another program
            return "full"

    def check_finite(self) -> None:
        """Raise UserError if a row holds NaN or infinity; the message names its image."""
        for start, block in blocks(self.features):
            bad = (~block.isfinite().all(1)).nonzero()
            if len(bad):
                raise UserError(
                    f"{self.source}: the features of {self.paths[start + int(bad[0])]} are NaN or "
                    "infinite; extract again, with whole weights"
                )

    def to_arrow(self) -> Any:
        """A ``pyarrow.Table``: path, identity, camera, modality, features (lists of D numbers).

        Provenance and unreadable images are JSON in the schema's metadata. Needs the extra
        ``[parquet]``. bfloat16 becomes float32, which Arrow has.

        Raises:
            UserError: A path is not valid text, which Arrow requires.
        """
        pa = require("pyarrow", extra="parquet")
        features = self.features.float() if self.features.dtype == torch.bfloat16 else self.features
        columns: dict[str, Any] = {"path": self.paths}
        for name, values in self.labels.items():
            if name == "infrared":
                columns["modality"] = np.where(values, "infrared", "visible").tolist()
            else:
                kind = pa.string() if values.dtype.kind == "U" else pa.int64()
                columns[name] = pa.array(values.tolist(), kind, mask=unknown(values))
        columns["features"] = pa.FixedSizeListArray.from_arrays(
            features.contiguous().numpy().reshape(-1), features.shape[1]
        )
        texts = {"provenance": _texts(self.provenance), "unreadable": self.unreadable}
        metadata = {key: json.dumps(text) for key, text in texts.items()}
        try:
            return pa.table(columns, metadata=metadata)
        except UnicodeEncodeError as error:
            raise UserError(
                f"a path is not valid UTF-8, which Parquet requires ({error}): write a "
                ".safetensors file"
            ) from None

    @classmethod
    def from_arrow(cls, table: Any, source: str = "the table") -> FeatureTable:
        """The table of :meth:`to_arrow`, or of any program with the same columns.

        Raises:
            UserError: Columns are missing or of another type.
        """
        arrays: dict[str, Any] = {}
        with _readable(source, "an Arrow table of features"):
            for name in {"path", "paths"} & set(table.column_names):
                arrays["paths"] = table[name].to_pylist()
            if "features" in table.column_names:
                lists = table["features"].combine_chunks()
                width = len(lists.flatten()) // max(1, len(lists)) or 1
                numbers = lists.flatten().to_numpy(zero_copy_only=False)
                pa = require("pyarrow", extra="parquet")
                lists.cast(pa.list_(lists.type.value_type, width))  # or they differ in length
                arrays["features"] = torch.from_numpy(numbers.copy()).view(-1, width)
            for name in {"identity", "camera"} & set(table.column_names):
                values = table[name].to_pylist()
                arrays[name] = _named_column(
                    source, name, [-1 if value is None else value for value in values]
                )
            if "modality" in table.column_names:
                kinds = table["modality"].to_pylist()
                if not set(kinds) <= {"visible", "infrared"}:
                    raise UserError(f"{source}: modality must be visible or infrared in every row")
                arrays["infrared"] = np.array([kind == "infrared" for kind in kinds], bool)
            metadata = table.schema.metadata or {}
            for name in ("provenance", "unreadable"):
                if name.encode() in metadata:
                    arrays[name] = _decode(source, name, metadata[name.encode()])
        return _checked(source, arrays)


def blocks(rows: Tensor, floats: int = 2**24) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 rows) in blocks of at most ``floats`` numbers: 64 MB."""
    size = max(1, floats // rows.shape[1])
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size].float()


def check_comparable(a: FeatureTable, b: FeatureTable) -> None:
    """Raise UserError unless dot products of rows of ``a`` with rows of ``b`` mean anything: they
    must be made by the same weights in the same way, and both or neither must say so.

    A warning says when infrared rows of both were scaled by different rules, which matters for
    16-bit images alone.
    """
    if a.features.shape[1] != b.features.shape[1]:
        raise UserError(
            f"{b.source} has features of {b.features.shape[1]} numbers, {a.source} of "
            f"{a.features.shape[1]}; they must be of one model, and of one head of 'deen-zoo "
            "project' or of none"
        )
    for silent, other in ((a, b), (b, a)):
        if "weights_sha256" in other.provenance and "weights_sha256" not in silent.provenance:
            raise UserError(
                f"{silent.source} does not say what made its features, {other.source} is of "
                f"{other.provenance.get('model')}; extract both with one model"
            )
    # The same weights with another classifier, or none, make the same rows.
    parts = {t.provenance.get("descriptor_sha256") for t in (a, b)}
    same_weights = len(parts) == 1 and None not in parts
    for key in _COMPARED:
        ours, theirs = a.provenance.get(key, ""), b.provenance.get(key, "")
        if ours != theirs and not (key == "weights_sha256" and same_weights):
            what = "weights" if key == "weights_sha256" else key
            raise UserError(
                f"{a.source} and {b.source} are not comparable: {what} {ours[:60]!r} and "
                f"{theirs[:60]!r}; extract both in one way, with one model"
            )
    rules = [t.provenance.get("intensity") for t in (a, b) if t.labels.get("infrared", _NONE).any()]
    if len(rules) == 2 and None not in rules and rules[0] != rules[1]:
        warnings.warn(
            f"{a.source} and {b.source} were extracted with intensity {rules[0]} and {rules[1]}: "
            "infrared images of 16 bits are not comparable; extract both with one --intensity",
            stacklevel=2,
        )


def read_feature_table(*files: str | os.PathLike[str]) -> FeatureTable:
    """Read feature files; several, such as one of each modality, are joined row by row.

    One safetensors file is mapped, several are copied into memory.

    Raises:
        UserError: A file is missing, broken or not of the schema above, or two do not fit.
    """
    if not files:
        raise UserError(f"no feature file; give at least one {', '.join(SUFFIXES)}")
    tables = [_read(Path(file)) for file in files]
    for table in tables[1:]:
        check_comparable(tables[0], table)
    if len(tables) > 1:
        return _join(tables, ", ".join(table.source for table in tables))
    check_paths(tables[0].paths, tables[0].source)
    return tables[0]


def check_paths(paths: Sequence[str], source: str) -> None:
    """Raise UserError if an image comes twice."""
    if len(set(paths)) < len(paths):
        twice = min(path for path, n in Counter(paths).items() if n > 1)
        raise UserError(f"{source}: {twice} comes twice; give each image once")


def check_output(file: str | os.PathLike[str]) -> Path:
    """Raise UserError unless a feature file can be written there; done before any work."""
    return check_target(_of_a_kind(Path(file)))


def _of_a_kind(file: Path) -> Path:
    """Raise UserError unless it is named like a feature file, of a kind that can be had here."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: unknown kind of feature file; give {', '.join(SUFFIXES)}")
    if file.suffix == ".parquet":
        require("pyarrow.parquet", extra="parquet")
    return file


def _join(tables: Sequence[FeatureTable], source: str, scratch: Path | None = None) -> FeatureTable:
    """All rows as one table, in memory or in a mapped scratch file.

    Identities and cameras are unknown where a table has none.
    """
    paths: list[str] = []
    unreadable: dict[str, str] = {}
    labels: list[tuple[dict[str, Column], int]] = []
    for table in tables:
        paths += table.paths
        unreadable |= table.unreadable
        labels.append((table.labels, len(table)))
    check_paths(paths, source)
    first, out = tables[0], {}
    for name in _LABELS:
        known = [name in own for own, _ in labels]
        if all(known) or (any(known) and name != "infrared"):
            columns = [own[name] if name in own else np.full(n, -1) for own, n in labels]
            if any(column.dtype.kind == "U" for column in columns):
                columns = [label_column([*column.tolist(), ""])[:-1] for column in columns]
            out[name] = np.concatenate(columns)
    if scratch and paths:
        dtype, width = first.features.dtype, first.features.shape[1]
        with open(scratch, "wb") as file:  # written and then mapped: a full disk is an OSError
            for table in tables:
                if len(table):
                    part = table.features.to(dtype).contiguous().view(torch.uint8)
                    file.write(part.numpy().data)
        rows = torch.from_file(str(scratch), size=len(paths) * width, dtype=dtype).view(-1, width)
    else:
        rows = torch.cat([table.features for table in tables])
    return FeatureTable(source, rows, paths, out, first.provenance, unreadable)


def write_feature_table(
    file: str | os.PathLike[str], tables: Sequence[FeatureTable], allow_empty: bool = False
) -> None:
    """Write tables, which share their provenance, as one feature file, row after row.

    The file appears whole or not at all. Several tables are joined in a scratch file near it: a
    sequence that reads them one at a time (it is iterated three times) takes the memory of one.

    Raises:
        UserError: The file cannot be written there, an image comes twice, or there is no row,
            unless that is allowed.
        OSError: The disk is full.
    """
    file = check_output(file)
    if not (allow_empty or any(len(table) for table in tables)):
        reasons = [reason for table in tables for reason in table.unreadable.values()]
        reason = reasons[0] if reasons else "there is none"
        raise UserError(f"{file}: none of the images can be read: {reason}")
    try:
        with whole_file(file) as partial:
            scratch = partial.with_name("rows")
            table = _join(tables, str(file), scratch if len(tables) > 1 else None)
            labels = {
                name: values
                for name, values in table.labels.items()
                if name == "infrared" or not unknown(values).all()
            }
            WRITERS[file.suffix](partial, replace(table, labels=labels))
            scratch.unlink(missing_ok=True)
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"cannot write {file}: {error}") from error


def _write_safetensors(file: Path, table: FeatureTable) -> None:
    tensors = {"features": table.features.contiguous(), "paths": _encode(table.paths)}
    for name, values in table.labels.items():
        if values.dtype.kind == "U":
            tensors[f"{name}_words"] = _encode(values.tolist())
        else:
            tensors[name] = torch.from_numpy(values)
    if table.unreadable:
        tensors["unreadable"] = _encode(table.unreadable)
    save_file(tensors, file, _texts(table.provenance) or None)


def _write_parquet(file: Path, table: FeatureTable) -> None:
    arrow = table.to_arrow()
    texts = [name for name in arrow.column_names if name != "features"]  # numbers do not repeat
    require("pyarrow.parquet", extra="parquet").write_table(
        arrow, file, row_group_size=1024, use_dictionary=texts
    )


def _write_npz(file: Path, table: FeatureTable) -> None:
    texts = {"unreadable": table.unreadable, "provenance": _texts(table.provenance)}
    arrays: dict[str, Any] = {k: np.array(json.dumps(text)) for k, text in texts.items() if text}
    arrays |= {"features": table.features.numpy(), "paths": np.array(table.paths), **table.labels}
    with open(file, "wb") as out:
        np.savez(out, **arrays)


WRITERS = {
    ".safetensors": _write_safetensors,
    ".parquet": _write_parquet,
    ".npz": _write_npz,
}


def _texts(provenance: dict[str, Any]) -> dict[str, str]:
    return dict(sorted((str(key), str(value)) for key, value in provenance.items()))


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


@contextlib.contextmanager
def _readable(source: Any, what: str) -> Iterator[None]:
    """Whatever a damaged or hostile file makes a library raise is one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source}: not {what} ({brief(error)}); write it again") from error


def _read(path: Path) -> FeatureTable:
    if not _of_a_kind(path).is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == ".parquet":
        parquet = require("pyarrow.parquet", extra="parquet")
        with _readable(path, "a readable Parquet file"):
            table = parquet.read_table(path)
        return FeatureTable.from_arrow(table, str(path))
    with _readable(path, f"a readable {path.suffix[1:]} file"):
        return _checked(str(path), (_read_npz if path.suffix == ".npz" else _read_tensors)(path))


def _read_tensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
        metadata = dict(file.metadata() or {})
    arrays |= {"paths": metadata.pop("paths")} if "paths" in metadata else {}
    for name in ("identity", "camera"):
        if f"{name}_words" in arrays:
            words = _decode(str(path), name, arrays.pop(f"{name}_words"))
            arrays[name] = np.array([str(word) for word in words], str)
    for name in {"paths", "unreadable"} & set(arrays):
        arrays[name] = _decode(str(path), name, arrays[name])
    return {**arrays, "provenance": {k: v for k, v in metadata.items() if k != "format"}}


def _read_npz(path: Path) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as file:
        for name in {"features", "paths", *_LABELS} & set(file.files):
            values = file[name]
            arrays[name] = values.tolist() if name == "paths" else values
        for name in {"provenance", "unreadable"} & set(file.files):
            arrays[name] = _decode(str(path), name, str(file[name]))
    arrays |= {"features": torch.from_numpy(arrays["features"])} if "features" in arrays else {}
    return arrays


def _decode(source: str, name: str, value: Any) -> Any:
    try:
        return json.loads(value.numpy().tobytes() if isinstance(value, Tensor) else value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: its {name} are not JSON ({error})") from error


def _checked(source: str, arrays: dict[str, Any]) -> FeatureTable:
    """The table of what a file holds, or one line that says what is wrong with it."""
    for name in ("features", "paths"):
        if name not in arrays:
            raise UserError(
                f"{source}: no {name!r} in it, only {', '.join(sorted(arrays)) or 'nothing'}"
            )
    features, paths = arrays["features"], arrays["paths"]
    if features.ndim != 2 or features.dtype not in _FLOATS or not features.shape[1]:
        raise UserError(
            f"{source}: features have shape {tuple(features.shape)} and type {features.dtype}; "
            "store (images, D) floats of 16, 32 or 64 bits"
        )
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise UserError(f"{source}: paths is not a list of strings")
    if len(paths) != len(features):
        raise UserError(
            f"{source}: {plural(len(paths), 'path')} for {plural(len(features), 'row')} of features"
        )
    labels = {
        name: _label(source, name, arrays[name], len(paths)) for name in _LABELS if name in arrays
    }
    provenance, unreadable = (arrays.get(name, {}) for name in ("provenance", "unreadable"))
    if not isinstance(provenance, dict) or not isinstance(unreadable, dict):
        raise UserError(f"{source}: provenance and unreadable are JSON objects; leave others out")
    provenance = _texts(provenance)
    if provenance.get("branches") == "all":  # 0.1.0 had this next to the descriptor
        del provenance["branches"]
    elif provenance.get("branches") == "original":
        chosen = provenance.get("descriptor", "official")
        provenance["descriptor"] = "original" if chosen == "official" else f"original {chosen}"
        del provenance["branches"]
    return FeatureTable(source, features, paths, labels, provenance, unreadable)


def _named_column(source: str, name: str, values: Sequence[Any]) -> Column:
    try:
        return label_column(values)
    except UserError as error:
        raise UserError(f"{source}: {name}: {error}") from None


def _label(source: str, name: str, values: Any, count: int) -> Column:
    """One of the label columns as int64, words or bool."""
    kind = str(values.dtype)
    if isinstance(values, Tensor):
        whole = not (values.is_floating_point() or values.is_complex())
        values = values.numpy() if whole else np.zeros(values.shape)
    valid = "b" if name == "infrared" else "iuU"
    if values.ndim != 1 or values.dtype.kind not in valid:
        wanted = "(N,) bool" if name == "infrared" else "(N,) integers or words"
        raise UserError(f"{source}: {name} is {values.shape} {kind}; store {wanted}")
    if len(values) != count:
        raise UserError(f"{source}: {len(values)} {name} for {count} rows of features")
    if values.dtype.kind == "u" and count and int(values.max()) > np.iinfo(np.int64).max:
        raise UserError(f"{source}: {name} {values.max()} is too large; store int64 or words")
    if values.dtype.kind == "U":
        return _named_column(source, name, values.tolist())
    return np.asarray(values if values.dtype.kind == "b" else values.astype(np.int64))
