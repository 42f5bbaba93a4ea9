"""Feature files, of this package's models or of any other: ``.safetensors`` or ``.npz``.

==========  ================================  ==================================================
name        type and shape                    in a ``.safetensors`` file
==========  ================================  ==================================================
features    (N, D) floats                     tensor
paths       N strings, each image once        uint8 tensor, or a metadata entry: a JSON list
identity    (N,) integers, -1 unknown         tensor
camera      (N,) integers, -1 unknown         tensor
infrared    (N,) bool                         tensor; False is visible
unreadable  {path: reason} of other images    uint8 tensor: a JSON object
provenance  what made the features            the other metadata entries (npz: a JSON object)
==========  ================================  ==================================================

All but the first two may be missing. Written by any program in one line::

    np.savez("features.npz", features=features, paths=paths,
             identity=identity, camera=camera, infrared=infrared)

or ``safetensors.torch.save_file({"features": ..., "identity": ...}, "features.safetensors",
metadata={"paths": json.dumps(paths)})``. When the dataset itself is at hand, the labels can be read
from there: :meth:`FeatureTable.of_dataset`. A safetensors file is mapped, not read: rows take
memory when they are used, so files larger than the memory can be searched. Its metadata holds at
most 100 MB, which a million paths exceed; so this package writes them as a tensor.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.protocols import Sample
from ..data.reader import ReidDataset
from ..errors import UserError

__all__ = ["FeatureTable", "check_comparable", "read_feature_table", "write_feature_table"]

_LABELS = ("identity", "camera", "infrared")
# What two files must share for their rows to be comparable.
_COMPARED = ("weights_sha256", "preprocessing", "descriptor", "branches", "flip", "normalize")
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
_DTYPES |= {torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8"}


@dataclass(frozen=True)
class FeatureTable:
    """Rows of features and the images they are of.

    Attributes:
        source: The file, for messages.
        features: (N, D) floats.
        paths: N names.
        labels: Those of ``identity``, ``camera`` (int64) and ``infrared`` (bool) that are known,
            each (N,).
        provenance: What made the features: ``model``, ``weights_sha256``, ``preprocessing``, ...;
            empty in files of other programs.
        unreadable: Images that were asked for and have no row, with the reason.
    """

    source: str
    features: Tensor
    paths: Sequence[str]
    labels: dict[str, Tensor]
    provenance: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Tensor) -> FeatureTable:
        """The rows of an index or bool tensor."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        labels = {name: values[rows] for name, values in self.labels.items()}
        paths = [self.paths[i] for i in rows.tolist()]
        return replace(self, features=self.features[rows], paths=paths, labels=labels)

    def label(self, name: str) -> Tensor:
        """(N,) identities, cameras or whether infrared.

        Raises:
            UserError: It is not in the file, or not of every row.
        """
        if name not in self.labels:
            raise UserError(
                f"{self.source}: no {name} in it; store it (a CSV file of path,identity,camera,"
                "modality labels the images that 'deen-zoo extract' reads)"
            )
        values = self.labels[name]
        unknown = int((values < 0).sum()) if values.dtype != torch.bool else 0
        if unknown:
            raise UserError(f"{self.source}: {name} is unknown (-1) for {unknown} of {len(self)}")
        return values

    def samples(self) -> list[Sample]:
        """The rows as samples.

        Raises:
            UserError: The file has not all three labels of every row.
        """
        absent = [name for name in _LABELS if name not in self.labels]
        if absent:
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
        found by path: absolute, or below the root. Other rows are left out.

        Raises:
            UserError: A test image has no row.
        """
        samples = dataset.test("visible", split) + dataset.test("infrared", split)
        root = Path(dataset.root).resolve()
        rows = {str((root / path).resolve()): i for i, path in enumerate(self.paths)}
        found = [rows.get(str(Path(sample.path).resolve()), -1) for sample in samples]
        if -1 in found:
            first = samples[found.index(-1)].path
            raise UserError(
                f"{self.source}: {found.count(-1)} of {len(samples)} test images have no row, as "
                f"{first}; the paths in the file must be absolute or relative to {dataset.root}"
            )
        return self.features[torch.tensor(found)], samples


def check_comparable(a: FeatureTable, b: FeatureTable) -> None:
    """Whether dot products of rows of one table with rows of the other mean anything.

    Raises:
        UserError: They were made by other weights or in another way, or one does not say.
    """
    if a.features.shape[1] != b.features.shape[1]:
        raise UserError(
            f"{b.source} has features of {b.features.shape[1]} numbers, {a.source} of "
            f"{a.features.shape[1]}; they must be of one model"
        )
    for silent, other in ((a, b), (b, a)):
        if other.provenance.keys() & set(_COMPARED) > silent.provenance.keys() & set(_COMPARED):
            raise UserError(
                f"{silent.source} does not say what made its features, {other.source} is of "
                f"{other.provenance.get('model')}; extract both with one model"
            )
    for key in _COMPARED:
        ours, theirs = a.provenance.get(key, ""), b.provenance.get(key, "")
        if ours != theirs:
            what = "weights" if key == "weights_sha256" else key
            raise UserError(
                f"{a.source} and {b.source} are not comparable: {what} {ours[:60]!r} and "
                f"{theirs[:60]!r}; extract both in one way, with one model"
            )


def read_feature_table(*files: str | os.PathLike[str]) -> FeatureTable:
    """Read feature files; several, such as one of each modality, are joined row by row.

    One safetensors file is mapped, several are copied into memory.

    Raises:
        UserError: A file is missing, broken or not of the schema above, or two do not fit.
    """
    if not files:
        raise UserError("no feature file; give at least one .safetensors or .npz")
    tables = [_read(Path(file)) for file in files]
    for table in tables[1:]:
        check_comparable(tables[0], table)
    paths = [path for table in tables for path in table.paths]
    check_paths(paths, tables[0].source)
    if len(tables) == 1:
        return tables[0]
    return FeatureTable(
        ", ".join(table.source for table in tables),
        torch.cat([table.features for table in tables]),
        paths,
        _join_labels([(table.labels, len(table)) for table in tables]),
        tables[0].provenance,
        {path: reason for table in tables for path, reason in table.unreadable.items()},
    )


def check_paths(paths: Sequence[str], source: str) -> None:
    """Whether each image comes once."""
    if len(set(paths)) < len(paths):
        twice = min(path for path, n in Counter(paths).items() if n > 1)
        raise UserError(f"{source}: {twice} comes twice; give each image once")


def _join_labels(parts: Sequence[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    """Labels of all parts, (labels, rows); identities and cameras are -1 where a part has none."""
    out = {}
    for name in _LABELS:
        known = [name in labels for labels, _ in parts]
        if all(known) or (any(known) and name != "infrared"):
            out[name] = torch.cat(
                [labels[name] if name in labels else torch.full((n,), -1) for labels, n in parts]
            )
    return out


def write_feature_table(
    file: str | os.PathLike[str], tables: Sequence[FeatureTable], allow_empty: bool = False
) -> None:
    """Write tables as one feature file, row after row. They are of one provenance.

    The file appears whole or not at all. A safetensors file is written table by table: a sequence
    that reads them one at a time (it is gone through twice) is joined in the memory of one.

    Raises:
        UserError: The name ends neither in ``.safetensors`` nor in ``.npz``, an image comes twice,
            or there is no row, unless that is allowed.
    """
    file = Path(file)
    check_name(file)
    paths: list[str] = []
    unreadable: dict[str, str] = {}
    labels: list[tuple[dict[str, Tensor], int]] = []
    for table in tables:
        paths += table.paths
        unreadable |= table.unreadable
        labels.append((table.labels, len(table)))
        width, dtype, provenance = table.features.shape[1], table.features.dtype, table.provenance
    check_paths(paths, str(file))
    if not (paths or allow_empty):
        reason = next(iter(unreadable.values()), "there is none")
        raise UserError(f"{file}: none of the images can be read: {reason}")
    columns = {
        name: values
        for name, values in _join_labels(labels).items()
        if name == "infrared" or not bool((values == -1).all())
    }
    partial = file.with_name(f"{file.name}.partial")
    with open(partial, "wb") as out:
        if file.suffix == ".npz":
            import numpy as np

            features = torch.cat([table.features for table in tables])
            texts = {"unreadable": unreadable, "provenance": provenance}
            arrays: dict[str, Any] = {name: values.numpy() for name, values in columns.items()}
            arrays |= {name: np.array(json.dumps(text)) for name, text in texts.items() if text}
            np.savez(out, features=features.numpy(), paths=np.array(paths), **arrays)
        else:
            tensors = {"paths": _encode(paths), **columns}
            tensors |= {"unreadable": _encode(unreadable)} if unreadable else {}
            size = len(paths) * width * dtype.itemsize
            header = _header({"features": (dtype, [len(paths), width], size)}, tensors, provenance)
            out.write(header)
            for table in tables:
                out.write(_bytes(table.features))
            for tensor in tensors.values():
                out.write(_bytes(tensor))
    os.replace(partial, file)


def check_name(file: Path) -> None:
    """Whether a feature file may be called so."""
    if file.suffix not in (".safetensors", ".npz"):
        raise UserError(f"{file}: unknown kind of feature file; give .safetensors or .npz")


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b""


def _header(
    first: dict[str, tuple[torch.dtype, list[int], int]],
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
) -> bytes:
    """The head of a safetensors file whose ``first`` tensor is still to come in pieces."""
    layout = {**first, **{k: (t.dtype, list(t.shape), t.nbytes) for k, t in tensors.items()}}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name, (dtype, shape, size) in layout.items():
        offsets = [place, place + size]
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": offsets}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read(path: Path) -> FeatureTable:
    check_name(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    arrays = (_read_npz if path.suffix == ".npz" else _read_safetensors)(path)
    for name in ("features", "paths"):
        if name not in arrays:
            raise UserError(
                f"{path}: no {name!r} in it, only {', '.join(sorted(arrays)) or 'nothing'}"
            )
    features, paths = arrays["features"], arrays["paths"]
    if features.ndim != 2 or not features.is_floating_point() or not features.shape[1]:
        raise UserError(
            f"{path}: features have shape {tuple(features.shape)} and type {features.dtype}; "
            "store (images, D) floats"
        )
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise UserError(f"{path}: paths is not a list of strings")
    labels = {name: arrays[name] for name in _LABELS if name in arrays}
    if len(paths) != len(features):
        raise UserError(f"{path}: {len(paths)} paths for {len(features)} rows of features")
    for name, values in labels.items():
        wanted = "(N,) bool" if name == "infrared" else "(N,) integers"
        whole = not (values.is_floating_point() or values.is_complex())
        if values.ndim != 1 or not whole or (values.dtype == torch.bool) != (name == "infrared"):
            raise UserError(
                f"{path}: {name} is {tuple(values.shape)} {values.dtype}; store {wanted}"
            )
        if len(values) != len(features):
            raise UserError(f"{path}: {len(values)} {name} for {len(features)} rows of features")
    provenance, unreadable = (arrays.get(name, {}) for name in ("provenance", "unreadable"))
    if not isinstance(provenance, dict) or not isinstance(unreadable, dict):
        raise UserError(f"{path}: provenance and unreadable are JSON objects; leave others out")
    return FeatureTable(str(path), features, paths, labels, provenance, unreadable)


def _decode(path: Path, name: str, value: Any) -> Any:
    try:
        return json.loads(value.numpy().tobytes() if isinstance(value, Tensor) else value)
    except ValueError as error:
        raise UserError(f"{path}: its {name} are not JSON ({error})") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); write it again"
        ) from error
    arrays |= {"paths": metadata.pop("paths")} if "paths" in metadata else {}
    for name in {"paths", "unreadable"} & set(arrays):
        arrays[name] = _decode(path, name, arrays[name])
    return {**arrays, "provenance": {k: v for k, v in metadata.items() if k != "format"}}


def _read_npz(path: Path) -> dict[str, Any]:
    import numpy as np

    arrays: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in {"features", "paths", *_LABELS} & set(file.files):
                values = file[name]
                arrays[name] = values.tolist() if name == "paths" else torch.from_numpy(values)
            for name in {"provenance", "unreadable"} & set(file.files):
                arrays[name] = _decode(path, name, str(file[name]))
    except UserError:
        raise
    except (zipfile.BadZipFile, ValueError, TypeError, EOFError) as error:
        raise UserError(f"{path}: not a readable npz file ({error}); write it again") from error
    return arrays
