"""Rank a gallery by similarity, and calibrate a match threshold."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.protocols import as_label
from .errors import UserError, plural
from .features.files import (
    FeatureTable,
    blocks,
    check_comparable,
    label_column,
    read_feature_table,
    unknown,
)
from .terminal import one_line

__all__ = ["Calibration", "SearchResult", "calibrate", "search"]

FLOATS = 2**24  # numbers in a block of the gallery in memory: 64 MB
QUERIES = 1024  # compared with a block at a time
Table = FeatureTable | str | os.PathLike[str]


@dataclass(frozen=True)
class SearchResult:
    """For each query the most similar rows of the gallery, the best first.

    Attributes:
        query: The queries' table, of Q rows.
        gallery: The gallery's table.
        scores: (Q, k) float32; cosine similarities, where the rows are normalised.
        indices: (Q, k) int64, rows of the gallery.
    """

    query: FeatureTable
    gallery: FeatureTable
    scores: Tensor
    indices: Tensor

    @property
    def correct(self) -> Tensor | None:
        """(Q, k) whether the identity is the query's; None where identities are not known, or are
        numbers on one side and words on the other."""
        if not _labelled(self.query, self.gallery) or _of_two_kinds(self.query, self.gallery):
            return None
        ids, gallery_ids = map(_as_text, (self.query, self.gallery))
        return torch.from_numpy(gallery_ids[self.indices.numpy()] == ids[:, None])

    def to_dict(self, threshold: float = -math.inf) -> list[dict[str, Any]]:
        """For each query its path, labels and ``hits`` of at least that score, ready for JSON."""
        correct, out = self.correct, []
        for q, found in enumerate(zip(self.scores.tolist(), self.indices.tolist(), strict=True)):
            hits = []
            for rank, (score, i) in enumerate(zip(*found, strict=True)):
                if score >= threshold:
                    hit = {"rank": rank + 1, "score": score, **self.gallery.describe(i)}
                    hit |= {} if correct is None else {"correct": bool(correct[q, rank])}
                    hits.append(hit)
            out.append({**self.query.describe(q), "hits": hits})
        return out

    def __str__(self) -> str:
        """The table of the first ten queries."""
        more = len(self.query) - 10
        rest = f"\n... {plural(more, 'more query')}, see .table()" if more > 0 else ""
        return self.table(queries=10) + rest

    def table(self, threshold: float = -math.inf, queries: int | None = None) -> str:
        """Lines of rank, score and path under each of the first ``queries`` (None: all); ``+``
        marks the same identity."""
        lines = []
        for query in self.to_dict(threshold)[:queries]:
            lines.append(query["path"])
            for hit in query["hits"]:
                mark = {True: "+", False: "-"}.get(hit.get("correct"), " ")
                lines.append(f"{hit['rank']:>5} {hit['score']:8.4f} {mark} {hit['path']}")
            if not query["hits"]:
                lines.append(f"      none of a score of {threshold:.4f} or more")
        return "\n".join(map(one_line, lines))


def _as_text(table: FeatureTable) -> Any:
    """Identities as text, numbers and words alike."""
    ids = table.label("identity")
    return (label_column(ids.tolist()) if ids.dtype.kind == "U" else ids).astype(str)


def _labelled(*tables: FeatureTable) -> bool:
    columns = [table.labels.get("identity") for table in tables]
    return all(ids is not None and not unknown(ids).any() for ids in columns)


def _of_two_kinds(query: FeatureTable, gallery: FeatureTable) -> bool:
    """Whether all identities are numbers on one side and words on the other, such as 1 and "1.0"
    of two programs: none would be found equal."""
    texts = [set(_as_text(table).tolist()) for table in (query, gallery)]
    kinds = [{type(as_label(text)) for text in side} for side in texts]
    return all(kinds) and kinds[0].isdisjoint(kinds[1])


def _products(
    query: FeatureTable, gallery: FeatureTable, device: str = "cpu"
) -> Iterator[tuple[slice, slice, Tensor]]:
    """All dot products, block by block: rows of the queries, rows of the gallery, scores."""
    query.check_finite()
    gallery.check_finite()
    queries = query.features.float().to(device)
    for start, block in blocks(gallery.features, FLOATS):
        # Matrix products round a last, incomplete group of columns differently: equal rows would
        # get different scores.
        columns = F.pad(block.to(device), (0, 0, 0, -len(block) % 64)).T
        for q in range(0, len(query), QUERIES):
            rows = slice(q, q + QUERIES)
            scores = (queries[rows] @ columns)[:, : len(block)]
            yield rows, slice(start, start + len(block)), scores


def search(query: Table, gallery: Table, k: int = 8, device: str = "cpu") -> SearchResult:
    """The k rows of the gallery that are most similar to each query, by dot product.

    All pairs are compared. Equal scores come in the gallery's order. From some 100,000 rows on
    a vector database is faster; it reads the Parquet files that ``deen-zoo extract`` writes.

    Args:
        query: A table, as ``FeatureExtractor.table`` gives it, or a feature file.
        gallery: The same. A file is read block by block, so it may exceed the memory.
        k: Number of hits; fewer when the gallery has fewer rows.
        device: Where the products are computed.

    Raises:
        UserError: Tables of different models, settings or sizes, or with NaN or infinity in a row,
            by name.
    """
    query, gallery = _open(query), _open(gallery)
    check_comparable(query, gallery)
    if k < 1 or not len(query) or not len(gallery):
        raise UserError(
            f"k is {k}, with {len(query)} queries and a gallery of {len(gallery)}: each must be "
            "at least 1"
        )
    if _labelled(query, gallery) and _of_two_kinds(query, gallery):
        warnings.warn(
            "identities are numbers on one side and words on the other, so hits are not marked as "
            f"right or wrong: write them alike in {query.source} and {gallery.source}",
            stacklevel=2,
        )
    k = min(k, len(gallery))
    scores = torch.full((len(query), k), -math.inf, device=device)
    indices = torch.full((len(query), k), -1, device=device)
    for part, block, products in _products(query, gallery, device):
        found, places = _best(products, min(k, products.shape[1]))
        both = torch.cat([indices[part], places + block.start], dim=1)
        scores[part], chosen = _best(torch.cat([scores[part], found], dim=1), k)
        indices[part] = both.gather(1, chosen)
    return SearchResult(query, gallery, scores.cpu(), indices.cpu())


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, equal ones from left to right.

    ``topk`` is fast and takes any of the scores that tie at the k-th place; rows where that matters
    are sorted.
    """
    found, columns = scores.topk(k)
    tied = (scores >= found[:, -1:]).sum(1) > k
    if tied.any():
        ranked, order = scores[tied].sort(dim=1, descending=True, stable=True)
        found[tied], columns[tied] = ranked[:, :k], order[:, :k]
    columns, order = columns.sort(dim=1)
    found, order = found.gather(1, order).sort(dim=1, descending=True, stable=True)
    return found, columns.gather(1, order)


def _open(table: Table) -> FeatureTable:
    return table if isinstance(table, FeatureTable) else read_feature_table(table)


@dataclass(frozen=True)
class Calibration:
    """A score at and above which a pair counts as one person, and what that costs.

    Attributes:
        threshold: Take pairs of this score or more.
        false_match_rate: Share of the pairs of two people that it takes, at most what was asked.
        true_match_rate: Share of the pairs of one person that it takes.
        different_pairs: Number of pairs of two people that it rests on.
        same_pairs: Number of pairs of one person.
    """

    threshold: float
    false_match_rate: float
    true_match_rate: float
    different_pairs: int
    same_pairs: int

    @property
    def false_matches(self) -> int:
        """Pairs behind the rate; with fewer than 30, expect another rate on other images."""
        return round(self.false_match_rate * self.different_pairs)


def calibrate(
    query: Table, gallery: Table | None = None, false_match_rate: float = 1e-3
) -> Calibration:
    """The lowest score at which at most that share of the pairs of two people is taken.

    Args:
        query: Rows with identities (numbers or words) of other people than the model was trained
            on, from the cameras that it is to be used with.
        gallery: The same, to compare with; None compares the infrared rows of the first table with
            its visible ones.
        false_match_rate: In (0, 1).

    Raises:
        UserError: Identities or modalities are not known, tables do not fit, a row holds NaN or
            infinity, or there are too few pairs for that rate.
    """
    query = _open(query)
    if gallery is None:
        infrared = query.label("infrared")
        query, gallery = query.select(infrared), query.select(~infrared)
    gallery = _open(gallery)
    check_comparable(query, gallery)
    if _of_two_kinds(query, gallery):
        raise UserError(
            f"identities are numbers on one side and words on the other: write them alike in "
            f"{query.source} and {gallery.source}"
        )
    ids, gallery_ids = (_as_text(table).tolist() for table in (query, gallery))
    number = {identity: i for i, identity in enumerate(dict.fromkeys([*ids, *gallery_ids]))}
    images = Counter(gallery_ids)
    same = sum(images[identity] for identity in ids)
    different = len(ids) * len(gallery_ids) - same
    allowed = math.floor(false_match_rate * different)
    if not 0 < false_match_rate < 1 or not allowed or not same:
        raise UserError(
            f"a false-match rate of {false_match_rate:g} from {different} pairs of two people and "
            f"{same} of one: it must be between 0 and 1, and at least one pair of two; give more "
            "images, or another rate"
        )
    rows, columns = (torch.tensor([number[x] for x in names]) for names in (ids, gallery_ids))
    highest, genuine = torch.empty(0), []
    for part, block, scores in _products(query, gallery):
        match = rows[part, None] == columns[block]
        genuine.append(scores[match])
        highest = torch.cat([highest, scores[~match]])
        highest = highest.topk(min(allowed + 1, len(highest))).values
    threshold = highest[-1].nextafter(torch.tensor(math.inf))  # above the first one too many
    return Calibration(
        float(threshold),
        int((highest >= threshold).sum()) / different,
        float((torch.cat(genuine) >= threshold).float().mean()),
        different,
        same,
    )
