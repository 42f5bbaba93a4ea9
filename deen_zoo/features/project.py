"""Short descriptors: PCA, whitened in part, fitted on features and kept with the model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError, check_least, plural
from ..io import check_target, sha256, write_atomically
from .files import FeatureTable

__all__ = ["Head", "fit_head", "read_head", "size_table", "write_head"]

ROWS = 8192  # most rows that are fitted on: the matrix to decompose has that size at most
# What a head and the rows that it is applied to must share.
_MUST_AGREE = ("descriptor_sha256", "descriptor", "flip", "normalize")


class Head:
    """``(rows - mean) @ components``, L2-normalised: (N, D) to (N, dim).

    Attributes:
        mean: (D,) float32.
        components: (D, dim) float32, each direction divided by a power of its standard deviation.
        provenance: What made the features that it was fitted on.
    """

    def __init__(self, mean: Tensor, components: Tensor, provenance: dict[str, str]) -> None:
        self.mean, self.components, self.provenance = mean, components, provenance
        self.dim = components.shape[1]

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows of the kind that it was fitted on, as float32, of length 1."""
        return F.normalize((rows.float() - self.mean) @ self.components)

    def check(self, provenance: dict[str, str], width: int, name: str) -> None:
        """Raise UserError unless it was fitted on features made like these, of as many numbers."""
        for key in _MUST_AGREE:
            ours, theirs = self.provenance.get(key, ""), provenance.get(key, "")
            if ours != theirs:
                what = "weights" if key == "descriptor_sha256" else key
                raise UserError(
                    f"{name} was fitted on features of {what} {ours[:20]!r}, not {theirs[:20]!r}: "
                    "fit it on features extracted with this model and these options"
                )
        if len(self.mean) != width:
            raise UserError(
                f"{name} takes rows of {len(self.mean)} numbers, and these have {width}: fit it on "
                "features of this model"
            )


def fit_head(table: FeatureTable, dim: int = 256, whiten: float = 0.5) -> Head:
    """Fit PCA on the rows of a table, whitened in part; labels are not used.

    Give images like those to be searched, and at least ten times as many as ``dim`` for a good
    estimate.

    Args:
        table: More than ``dim`` rows; of more than 8,192, evenly spread ones are used.
        dim: Numbers in a descriptor.
        whiten: The power of its standard deviation that each direction is divided by: 0 leaves
            distances as they are, 1 makes all directions count the same, also those of noise.

    Raises:
        UserError: Too few rows, or rows of fewer numbers, NaN or infinity.
    """
    check_least("dim", dim, 1)
    if not 0 <= whiten <= 1:
        raise UserError(f"whiten {whiten}: give a power from 0 to 1")
    count, width = table.features.shape
    if dim >= count or dim > width:
        raise UserError(
            f"{table.source}: {plural(count, 'row')} of {width} numbers give at most "
            f"{plural(min(count - 1, width), 'direction')}, not {dim}: give more images or a "
            "smaller --dim"
        )
    if count < 10 * dim:
        warnings.warn(
            f"{table.source}: {plural(count, 'row')} for {plural(dim, 'direction')}; give "
            f"{10 * dim:,} or more for a good estimate",
            stacklevel=2,
        )
    mean, directions, deviation = _principal(table)
    if len(deviation) < dim:
        found = plural(len(deviation), "direction")
        raise UserError(f"{table.source}: the rows vary in {found} only, not {dim}")
    return Head(mean, directions[:, :dim] / deviation[:dim] ** whiten, table.provenance)


def _principal(table: FeatureTable) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), the directions (D, K) in which the rows vary, and their deviation (K,) in them."""
    table.check_finite()
    step = -(-len(table) // ROWS)
    rows = table.features[::step].float()
    mean, least = rows.mean(0), 1e-6 * float(rows.abs().max())
    rows = rows - mean
    if len(rows) < rows.shape[1]:  # the smaller of the two matrices with the same eigenvalues
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        directions = rows.T @ vectors / values.clamp(min=1e-12).sqrt()
    else:
        values, directions = torch.linalg.eigh(rows.T @ rows)
    deviation = (values.clamp(min=0) / (len(rows) - 1)).sqrt()
    kept = (deviation > least).nonzero()[:, 0].flip(0)[: len(rows) - 1]  # more would be rounding
    directions = directions[:, kept]
    # A direction may point either way: its largest number is made positive.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return mean, directions * largest.sign(), deviation[kept]


def write_head(head: Head, file: str | os.PathLike[str]) -> None:
    """Write a head as safetensors."""
    file = check_head_name(file)
    tensors = {"mean": head.mean.contiguous(), "components": head.components.contiguous()}
    write_atomically(file, save(tensors, head.provenance))


def check_head_name(file: str | os.PathLike[str]) -> Path:
    """Raise UserError unless a head can be written there."""
    file = Path(file)
    if file.suffix != ".safetensors" or file.name == "model.safetensors" or file.is_dir():
        raise UserError(f"{file}: name the head NAME.safetensors, such as project-256.safetensors")
    return check_target(file)


def read_head(file: str | os.PathLike[str]) -> Head:
    """Read what :func:`write_head` wrote.

    Raises:
        UserError: There is no such file, or it is no head.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; 'deen-zoo project' writes one")
    try:
        with safe_open(file, "pt") as stored:
            mean, components = stored.get_tensor("mean"), stored.get_tensor("components")
            provenance = dict(stored.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{file}: not a head of 'deen-zoo project' ({error})") from error
    fits = mean.ndim == 1 and components.ndim == 2 and len(mean) == len(components)
    if not fits or mean.dtype != torch.float32 or components.dtype != torch.float32:
        raise UserError(f"{file}: not a head of 'deen-zoo project'")
    return Head(mean, components, {**provenance, "project": sha256(file)})


def size_table(
    fitted: FeatureTable,
    held_out: FeatureTable,
    dims: Sequence[int] = (128, 256, 512, 2048),
    whiten: float = 0.5,
) -> list[dict[str, Any]]:
    """mAP and rank-1 of infrared queries against visible images, by the size of the descriptor.

    Args:
        fitted: Rows to fit the heads on.
        held_out: Rows with identities and modalities, of other people.
        dims: Sizes; those that ``fitted`` is too small for, or varies in too few directions for,
            are left out. All numbers come last.
        whiten: As of :func:`fit_head`.

    Returns:
        Rows of ``dim``, ``mAP`` and ``r1``, fractions.
    """
    from ..evaluation.metrics import evaluate_ranking

    mean, directions, deviation = _principal(fitted)
    components, most = directions / deviation**whiten, len(deviation)
    infrared, ids = held_out.label("infrared"), held_out.label("identity")
    whole = held_out.features.float()
    sizes = [(dim, (whole - mean) @ components[:, :dim]) for dim in dims if dim <= most]
    out = []
    for dim, rows in (*sizes, (whole.shape[1], whole)):
        rows = F.normalize(rows)
        similarity = (rows[infrared] @ rows[~infrared].T).numpy()
        found = evaluate_ranking(similarity, ids[infrared], ids[~infrared], rule="regdb")
        out.append({"dim": dim, "mAP": float(found.mAP), "r1": float(found.cmc[0])})
    return out
