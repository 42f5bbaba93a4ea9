"""k-reciprocal re-ranking: Zhong, Zheng, Cao and Li, "Re-ranking Person Re-identification with
k-reciprocal Encoding", CVPR 2017."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError


class KReciprocal(NamedTuple):
    """Parameters of the re-ranking, by default the paper's.

    Attributes:
        k1: Neighbours that are asked whether they are mutual.
        k2: Neighbours whose encodings are averaged, the image itself included.
        weight: Weight of the original distance, 0 to 1; the rest is the Jaccard distance (lambda).
    """

    k1: int = 20
    k2: int = 6
    weight: float = 0.3


def k_reciprocal_distance(
    distance: NDArray[Any], num_queries: int, parameters: KReciprocal | None = None
) -> NDArray[Any]:
    """Re-rank a gallery by how many mutual neighbours its images share with a query.

    Every image is encoded as a vector over all images, ``exp(-d)`` on its expanded k-reciprocal
    neighbours (eq. 3 to 7, eq. 5 with factors of 2/3 and k1/2), averaged over its k2 nearest (eq.
    11); the Jaccard distance of two such vectors (eq. 10) is mixed with ``d`` (eq. 12). As in the
    authors' code, ``d`` is the squared Euclidean distance over the greatest one of its row, and the
    encodings sum to 1. Gallery images that a protocol later ignores do take part. Holds about four
    matrices of the size of ``distance``.

    Args:
        distance: (N, N) squared Euclidean distances of queries and gallery together, queries first.
        num_queries: How many of the N are queries.
        parameters: The paper's when None.

    Returns:
        (num_queries, N - num_queries); smaller is more alike.

    Raises:
        UserError: Shapes or parameters that do not fit.
    """
    k1, k2, weight = parameters or KReciprocal()
    total = len(distance)
    if distance.shape != (total, total) or not 0 < num_queries < total:
        raise UserError(
            f"distance has shape {distance.shape} with {num_queries} queries; re-ranking needs all "
            "pairs of queries and gallery together, queries first"
        )
    if min(k1, k2) < 1 or not 0 <= weight <= 1:
        raise UserError(
            f"re-ranking by k1={k1}, k2={k2}, weight={weight}; k1, k2 >= 1, weight 0..1"
        )
    greatest = distance.max(axis=1, keepdims=True)
    scaled = distance / np.where(greatest > 0, greatest, 1)
    nearest = _nearest(scaled, min(total, max(k1 + 1, k2)))
    encoding = _encode(scaled, nearest, k1)
    scaled = scaled[:num_queries, num_queries:].copy()

    # transposed: how much each image has of neighbour j, (N, N)
    parts = np.empty((total, total), dtype=scaled.dtype)
    for i in range(total):
        parts[:, i] = encoding[nearest[i, :k2]].mean(axis=0)
    del encoding
    shared = np.zeros_like(scaled)
    for part in parts:
        having = np.flatnonzero(part)
        split = np.searchsorted(having, num_queries)
        queries, gallery = having[:split], having[split:]
        shared[np.ix_(queries, gallery - num_queries)] += np.minimum.outer(
            part[queries], part[gallery]
        )
    jaccard = 1 - shared / (2 - shared)
    mixed: NDArray[Any] = jaccard * (1 - weight) + scaled * weight
    return mixed


def _nearest(distance: NDArray[Any], count: int) -> NDArray[np.int64]:
    """The nearest images of each, itself first: (N, count). Equal distances: earlier image first,
    except across the end of the list."""
    total = len(distance)
    ranked = distance.copy()
    np.fill_diagonal(ranked, -1)  # itself first, whatever rounding made of its distance
    found = np.sort(np.argpartition(ranked, min(count, total - 1), axis=1)[:, :count], axis=1)
    order = np.argsort(np.take_along_axis(ranked, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def _mutual(nearest: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of each image's neighbours have it among theirs: (N, k)."""
    mutual = np.empty(nearest.shape, dtype=bool)
    for i, mine in enumerate(nearest):
        mutual[i] = (nearest[mine] == i).any(axis=1)
    return mutual


def _encode(distance: NDArray[Any], nearest: NDArray[np.int64], k1: int) -> NDArray[Any]:
    """``exp(-distance)`` on the expanded k-reciprocal neighbours, each row summing to 1: (N, N)."""
    wide, narrow = nearest[:, : k1 + 1], nearest[:, : round(k1 / 2) + 1]
    mutual_wide, mutual_narrow = _mutual(wide), _mutual(narrow)
    encoding = np.zeros_like(distance)
    for i in range(len(distance)):
        member = np.zeros(len(distance), dtype=bool)
        first = wide[i, mutual_wide[i]]
        member[first] = True
        # take in the k1/2 mutual neighbours of a neighbour when more than 2/3 are members already
        theirs, valid = narrow[first], mutual_narrow[first]
        joins = 3 * (member[theirs] & valid).sum(1) > 2 * valid.sum(1)
        member[theirs[joins][valid[joins]]] = True
        weights = np.exp(-distance[i, member])
        encoding[i, member] = weights / weights.sum()
    return encoding
