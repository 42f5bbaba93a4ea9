"""CMC, mAP and mINP of a similarity matrix, as the reference's evaluators define them.

One sort of each row's scores answers everything: a match's rank is the number of greater scores,
and an identity's rank is the number of identities whose best score is greater than its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.protocols import RULES, Rule, as_label
from ..errors import UserError, check_choice

_BLOCK = 1 << 18  # scores handled at once: bounds the memory, and a block stays in the cache


@dataclass(frozen=True)
class Ranking:
    """What :func:`evaluate_ranking` returns. Fractions, not per cent.

    Attributes:
        cmc: (max_rank,) float64; ``cmc[k - 1]`` is rank-k.
        mAP: Mean over valid queries of the average precision.
        mINP: Mean over valid queries of (matches) / (rank of the last match).
        first_rank: (Q,) int64, the 0-based CMC rank of each query's first match; -1 for a query
            that has no match in its gallery. Such a query is not *valid* and counts nowhere.
        average_precision: (Q,) float64, NaN where not valid.
        inverse_penalty: (Q,) float64, NaN where not valid.
    """

    cmc: NDArray[np.float64]
    mAP: float
    mINP: float
    first_rank: NDArray[np.int64]
    average_precision: NDArray[np.float64]
    inverse_penalty: NDArray[np.float64]

    @property
    def num_valid(self) -> int:
        """Queries that have at least one match in their gallery."""
        return int((self.first_rank >= 0).sum())


@dataclass(frozen=True)
class _Gallery:
    """Identities and cameras of the gallery columns; columns of one identity are a segment of
    ``order``, from ``start[i]``, ``count[i]`` long."""

    order: NDArray[np.int64]
    start: NDArray[np.int64]
    count: NDArray[np.int64]
    cameras: NDArray[Any]


def evaluate_ranking(
    similarity: Any,
    query_ids: Any,
    gallery_ids: Any,
    query_cameras: Any = None,
    gallery_cameras: Any = None,
    rule: str = "sysu",
    max_rank: int = 20,
) -> Ranking:
    """Score a similarity matrix, equal to the reference's ``eval_sysu``, ``eval_llcm`` and
    ``eval_regdb`` (which take the negated matrix).

    | rule | gallery images a query ignores | the CMC counts |
    |---|---|---|
    | ``"sysu"`` | camera 2, for a query of camera 3 | each wrong identity once |
    | ``"llcm"`` | same identity *and* same camera | each wrong identity once |
    | ``"regdb"`` | none | each wrong image |

    mAP and mINP always count images. A query without a match is left out of every mean. Equal
    scores rank in gallery order, the earlier column first (the reference leaves it to an unstable
    sort). Past the last identity (or image) the CMC keeps its final value, where the reference
    returns a shorter curve.

    Args:
        similarity: (Q, G) numpy array or torch tensor on any device; greater is more alike. It is
            compared as it is: float16 and bfloat16 exactly in float32, integers in float64.
        query_ids: (Q,) integers of any type or strings; digits in a string are that number, so
            ``"0007"``, ``"7"`` and ``7`` are one identity.
        gallery_ids: (G,) the same.
        query_cameras: (Q,) the same, numbers for ``"sysu"``; not needed by ``"regdb"``.
        gallery_cameras: (G,) the same.
        rule: ``"sysu"``, ``"llcm"``, ``"regdb"``, or another key of
            :data:`deen_zoo.data.protocols.RULES`.
        max_rank: Length of the CMC.

    Raises:
        UserError: Shapes that do not fit, a score that is not finite, an unknown rule, or no query
            that has a match in the gallery.

    >>> result = evaluate_ranking(np.array([[0.9, 0.8, 0.1], [0.3, 0.2, 0.7]]),
    ...                           [1, 2], [1, 2, 2], rule="regdb", max_rank=3)
    >>> result.cmc.tolist(), result.mAP
    ([1.0, 1.0, 1.0], 0.9166666666666666)
    """
    check_choice("rule", rule, RULES)
    if isinstance(max_rank, bool) or not isinstance(max_rank, (int, np.integer)) or max_rank < 1:
        raise UserError(f"max_rank is {max_rank!r}; give a whole number from 1")
    if not isinstance(similarity, torch.Tensor):
        similarity = np.asarray(similarity)
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise UserError(
            f"similarity has shape {tuple(similarity.shape)}; give (queries, gallery), both from 1"
        )
    num_queries, num_gallery = similarity.shape
    q_ids = _checked(query_ids, num_queries, "query_ids")
    g_ids = _checked(gallery_ids, num_gallery, "gallery_ids")
    kind = RULES[rule]
    if kind.needs_cameras:
        q_cams = _checked(query_cameras, num_queries, "query_cameras")
        g_cams = _checked(gallery_cameras, num_gallery, "gallery_cameras")
    else:
        q_cams, g_cams = np.zeros(num_queries), np.zeros(num_gallery)
    if kind.unseen and not q_cams.dtype == g_cams.dtype == np.int64:
        about = "cameras {1} and {0}: give their numbers, not words".format(*kind.unseen)
        raise UserError(f"the {rule!r} rule is about {about}")
    for name, *sides in (("ids", q_ids, g_ids), ("cameras", q_cams, g_cams)):
        kinds = [{type(label) for label in side.tolist()} for side in sides]
        if kinds[0].isdisjoint(kinds[1]):
            both = f"query_{name} and gallery_{name}"
            raise UserError(f"{both} must both be numbers or both be words")
    q_ids, g_ids = as_codes(q_ids, g_ids)
    q_cams, g_cams = as_codes(q_cams, g_cams)

    identities, start, count = np.unique(np.sort(g_ids), return_index=True, return_counts=True)
    gallery = _Gallery(np.argsort(g_ids, kind="stable"), start, count, g_cams)
    code = np.searchsorted(identities, q_ids)
    code[code == len(identities)] = 0
    code[identities[code] != q_ids] = -1  # an identity that the gallery does not have

    first_rank = np.full(num_queries, -1)
    precision, penalty = np.full((2, num_queries), np.nan)
    step = max(1, _BLOCK // num_gallery)
    for i in range(0, num_queries, step):
        rows = slice(i, i + step)
        first_rank[rows], precision[rows], penalty[rows] = _rank_block(
            _scores(similarity[rows]), code[rows], q_cams[rows], gallery, kind
        )
    valid = first_rank >= 0
    if not valid.any():
        raise UserError(
            f"none of the {num_queries} queries has a match in the gallery by the {rule!r} rule; "
            "check the identities and cameras of both sides"
        )
    hits = np.bincount(first_rank[valid], minlength=max_rank)[:max_rank]
    return Ranking(
        cmc=np.cumsum(hits) / valid.sum(),
        mAP=float(precision[valid].mean()),
        mINP=float(penalty[valid].mean()),
        first_rank=first_rank,
        average_precision=precision,
        inverse_penalty=penalty,
    )


def label_array(values: Any, name: str = "labels") -> NDArray[Any]:
    """Identities or cameras as int64, or, where some are words, as objects (int or str).

    Integers of any type and digits in strings are the same numbers, see
    :func:`~deen_zoo.data.protocols.as_label`.

    Raises:
        UserError: Anything else, such as floats.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    labels = values if isinstance(values, np.ndarray) else np.array(values, dtype=object)
    if labels.dtype.kind == "i":
        return labels.astype(np.int64)
    if labels.dtype.kind not in "uUO":
        raise UserError(f"{name} has type {labels.dtype}; give integers or strings")
    flat = [as_label(label, name) for label in labels.ravel()]
    numbers = all(isinstance(label, int) for label in flat)
    found = np.empty(len(flat), np.int64 if numbers else object)
    found[:] = flat
    return found.reshape(labels.shape)


def _checked(values: Any, length: int, name: str) -> NDArray[Any]:
    if values is None:
        raise UserError(f"{name} is missing; this rule needs it, one label for each image")
    labels = label_array(values, name)
    if labels.shape != (length,):
        raise UserError(f"{name} has shape {labels.shape}; the similarity matrix needs ({length},)")
    return labels


def as_codes(*sides: NDArray[Any]) -> list[NDArray[Any]]:
    """The same integers for the same labels on all sides."""
    if all(side.dtype != object for side in sides):
        return list(sides)
    codes: dict[Any, int] = {}
    return [
        np.array([codes.setdefault(label, len(codes)) for label in side.tolist()]) for side in sides
    ]


def _scores(block: Any) -> NDArray[Any]:
    """A private float32 or float64 copy of some rows, checked to be finite."""
    if isinstance(block, torch.Tensor):
        block = block.detach()
        if block.dtype in (torch.float16, torch.bfloat16):
            block = block.float()
        block = block.cpu().numpy()
    if block.dtype.kind not in "iufb":
        raise UserError(f"similarity has type {block.dtype}; it must be real numbers")
    small = block.dtype in (np.float16, np.float32)
    scores: NDArray[Any] = np.array(block, dtype=np.float32 if small else np.float64, order="C")
    if not np.isfinite(scores).all():
        raise UserError("similarity has NaN or infinite entries; check the features it came from")
    return scores


def _rank_block(
    scores: NDArray[Any],
    code: NDArray[np.int64],
    cameras: NDArray[Any],
    gallery: _Gallery,
    rule: Rule,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """First rank, average precision and inverse penalty of each row; ``scores`` is overwritten."""
    num_rows, width = scores.shape
    # every match, as coordinates (row, column), row by row
    present = np.where(code >= 0, gallery.count[code], 0)
    row = np.repeat(np.arange(num_rows), present)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(present) - present, present)
    column = gallery.order[gallery.start[code[row]] + nth]

    ignored = np.zeros(len(row), dtype=bool)
    if rule.same_camera:
        ignored |= cameras[row] == gallery.cameras[column]
        scores[row[ignored], column[ignored]] = -np.inf
    if rule.unseen:
        of_query, of_gallery = cameras == rule.unseen[0], gallery.cameras == rule.unseen[1]
        ignored |= of_query[row] & of_gallery[column]
        scores[np.ix_(of_query, of_gallery)] = -np.inf
    row, column = row[~ignored], column[~ignored]

    rank, tied = _ranks(np.sort(scores, axis=1), row, scores[row, column])
    if tied.any():  # replace these rows by their ranks, counted from the bottom: no ties are left
        rows = np.unique(row[tied])
        order = _descending(scores[rows])
        height = np.empty(order.shape, dtype=scores.dtype)
        np.put_along_axis(height, order, np.arange(width, 0, -1, dtype=scores.dtype)[None], axis=1)
        scores[rows] = height
        affected = np.isin(row, rows)
        rank[affected] = (width - scores[row[affected], column[affected]]).astype(np.int64)

    best_first = np.lexsort((rank, row))
    rank, column = rank[best_first], column[best_first]
    matches = np.bincount(row, minlength=num_rows)
    end = np.cumsum(matches)
    begin = end - matches
    valid = matches > 0
    first_rank = np.full(num_rows, -1)
    precision, penalty = np.full((2, num_rows), np.nan)
    if not valid.any():
        return first_rank, precision, penalty
    nth = np.arange(len(row)) - begin[row]
    sums = np.bincount(row, weights=(nth + 1) / (rank + 1), minlength=num_rows)
    precision[valid] = sums[valid] / matches[valid]
    penalty[valid] = matches[valid] / (rank[end[valid] - 1] + 1)
    first_rank[valid] = rank[begin[valid]]
    if rule.by_identity:
        best = np.maximum.reduceat(scores[:, gallery.order], gallery.start, axis=1)
        top = scores[valid, column[begin[valid]]]
        first_rank[valid] = (best[valid] > top[:, None]).sum(1)
    return first_rank, precision, penalty


def _descending(scores: NDArray[Any]) -> NDArray[np.int64]:
    """The stable argsort of each row, greatest first."""
    if scores.dtype == np.float64:
        return np.argsort(-scores, axis=1, kind="stable")
    # a float32's bits, made monotonic, and its column in one integer: sorts twice as fast
    bits = (0.0 - scores).view(np.int32)  # not -scores: no negative zero
    key = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64) << 32 | np.arange(scores.shape[1])
    return np.sort(key, axis=1) & 0xFFFFFFFF


def _ranks(
    ascending: NDArray[Any], row: NDArray[np.int64], value: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """How many entries of ``ascending[row]`` are greater than ``value``, one of its entries, and
    whether it occurs more than once. A binary search of all pairs at the same time."""
    width = ascending.shape[1]
    low, high = np.zeros_like(row), np.full_like(row, width)
    for _ in range(width.bit_length()):
        middle = np.minimum((low + high) // 2, width - 1)
        right = ascending[row, middle] <= value
        low, high = np.where(right, middle + 1, low), np.where(right, high, middle)
    tied = (low > 1) & (ascending[row, low - 2] == value)
    return width - low, tied
