"""Feature files of any model: ``.safetensors`` or ``.npz``.

========  ================================  ====================================================
name      type and shape                    in a ``.safetensors`` file
========  ================================  ====================================================
features  (N, D) floats                     tensor
paths     N strings, each image once        JSON list in the metadata, key ``paths``
identity  (N,) integers                     tensor
camera    (N,) integers                     tensor
infrared  (N,) bool                         tensor; False is visible
========  ================================  ====================================================

Written by any program in one line::

    np.savez("features.npz", features=features, paths=paths,
             identity=identity, camera=camera, infrared=infrared)

or ``safetensors.torch.save_file({"features": ..., "identity": ...}, "features.safetensors",
metadata={"paths": json.dumps(paths)})``. The labels may be missing when the dataset itself is at
hand: :meth:`FeatureTable.of_dataset` reads them from there.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.draws import Sample
from ..data.reader import ReidDataset
from ..errors import UserError

_LABELS = ("identity", "camera", "infrared")


@dataclass(frozen=True)
class FeatureTable:
    """Rows of features and the images they are of.

    Attributes:
        source: The file, for messages.
        features: (N, D) floats.
        paths: N names.
        labels: Those of ``identity``, ``camera`` (int64) and ``infrared`` (bool) that the file has,
            each (N,).
    """

    source: str
    features: Tensor
    paths: Sequence[str]
    labels: dict[str, Tensor]

    def samples(self) -> list[Sample]:
        """The rows as samples.

        Raises:
            UserError: The file has not all three labels.
        """
        absent = [name for name in _LABELS if name not in self.labels]
        if absent:
            raise UserError(
                f"{self.source}: no {', '.join(absent)} in it; store them, or give the dataset's "
                "root (--data-root), which has them"
            )
        columns = (self.labels[name].tolist() for name in _LABELS)
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


def read_feature_table(*files: str | os.PathLike[str]) -> FeatureTable:
    """Read feature files; several, such as one of each modality, are joined row by row.

    Raises:
        UserError: A file is missing, broken or not of the schema above, or two do not fit.
    """
    if not files:
        raise UserError("no feature file; give at least one .safetensors or .npz")
    tables = [_read(Path(file)) for file in files]
    first = tables[0]
    for table in tables[1:]:
        if table.features.shape[1] != first.features.shape[1]:
            raise UserError(
                f"{table.source} has features of {table.features.shape[1]} numbers, "
                f"{first.source} of {first.features.shape[1]}; they must be of one model"
            )
    paths = [path for table in tables for path in table.paths]
    twice = (
        {path for path in paths if paths.count(path) > 1} if len(set(paths)) < len(paths) else ()
    )
    if twice:
        raise UserError(f"{first.source}: {min(twice)} comes twice in paths; give each image once")
    return FeatureTable(
        ", ".join(table.source for table in tables),
        torch.cat([table.features for table in tables]),
        paths,
        {
            name: torch.cat([table.labels[name] for table in tables])
            for name in _LABELS
            if all(name in table.labels for table in tables)
        },
    )


def _read(path: Path) -> FeatureTable:
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown kind of feature file; give .safetensors or .npz")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    arrays = readers[path.suffix](path)
    for name in ("features", "paths"):
        if name not in arrays:
            raise UserError(
                f"{path}: no {name!r} in it, only {', '.join(sorted(arrays)) or 'nothing'}"
            )
    features, paths = arrays["features"], arrays["paths"]
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        raise UserError(
            f"{path}: features have shape {tuple(features.shape)} and type {features.dtype}; "
            "store (images, D) floats"
        )
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise UserError(f"{path}: paths is not a list of strings")
    labels = {name: arrays[name] for name in _LABELS if name in arrays}
    for name, values in labels.items():
        wanted = "(N,) bool" if name == "infrared" else "(N,) integers"
        whole = not (values.is_floating_point() or values.is_complex())
        if values.ndim != 1 or not whole or (values.dtype == torch.bool) != (name == "infrared"):
            raise UserError(
                f"{path}: {name} is {tuple(values.shape)} {values.dtype}; store {wanted}"
            )
    for name, values in {"paths": paths, **labels}.items():
        if len(values) != len(features):
            raise UserError(f"{path}: {len(values)} {name} for {len(features)} rows of features")
    return FeatureTable(str(path), features, paths, labels)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); write it again"
        ) from error
    if "paths" in metadata:
        try:
            arrays["paths"] = json.loads(metadata["paths"])
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: its metadata's paths are not JSON ({error})") from error
    return arrays


def _read_npz(path: Path) -> dict[str, Any]:
    import numpy as np

    arrays: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in {"features", "paths", *_LABELS} & set(file.files):
                values = file[name]
                arrays[name] = values.tolist() if name == "paths" else torch.from_numpy(values)
    except (zipfile.BadZipFile, ValueError, TypeError, EOFError) as error:
        raise UserError(f"{path}: not a readable npz file ({error}); write it again") from error
    return arrays
