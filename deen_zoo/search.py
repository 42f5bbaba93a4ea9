"""Descriptors to ranked galleries, and the score from which on it is the same person."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UserError, require
from .features.files import FeatureTable, check_comparable, read_feature_table

__all__ = ["INDEXES", "Calibration", "SearchResult", "calibrate", "search"]

INDEXES = ("exact", "flat", "ivfpq")
FLOATS = 2**24  # of a block of rows in memory, 64 MB
QUERIES = 1024  # compared with a block at a time
PQ_ROWS = 10_000  # a product quantiser's 256 centres want 39 rows each
Table = FeatureTable | str | os.PathLike[str]


@dataclass(frozen=True)
class SearchResult:
    """For each query the most similar rows of the gallery, the best first.

    Attributes:
        query: The queries' table, of Q rows.
        gallery: The gallery's.
        scores: (Q, k) float32; cosine similarities, where the rows are normalised.
        indices: (Q, k) int64, rows of the gallery; -1 where an approximate index found fewer.
    """

    query: FeatureTable
    gallery: FeatureTable
    scores: Tensor
    indices: Tensor

    @property
    def correct(self) -> Tensor | None:
        """(Q, k) whether the identity is the query's; None where identities are not known."""
        tables = self.query, self.gallery
        if any("identity" not in t.labels or (t.labels["identity"] < 0).any() for t in tables):
            return None
        ids = self.gallery.labels["identity"][self.indices.clamp(min=0)]
        return (ids == self.query.labels["identity"][:, None]) & (self.indices >= 0)

    def to_dict(self, threshold: float = -math.inf) -> list[dict[str, Any]]:
        """For each query its path, labels and ``hits`` of at least that score, ready for JSON."""
        correct = self.correct
        out = []
        for q in range(len(self.query)):
            hits = []
            for rank, (score, i) in enumerate(
                zip(self.scores[q].tolist(), self.indices[q].tolist(), strict=True)
            ):
                if i >= 0 and score >= threshold:
                    hit = {"rank": rank + 1, "score": score, **_described(self.gallery, i)}
                    extra = {} if correct is None else {"correct": bool(correct[q, rank])}
                    hits.append({**hit, **extra})
            out.append({**_described(self.query, q), "hits": hits})
        return out

    def __str__(self) -> str:
        return self.table()

    def table(self, threshold: float = -math.inf) -> str:
        """Lines of rank, score and path under each query; ``+`` marks the same identity."""
        lines = []
        for query in self.to_dict(threshold):
            lines.append(f"{query['path']}")
            for hit in query["hits"]:
                mark = {True: "+", False: "-"}.get(hit.get("correct"), " ")
                lines.append(f"{hit['rank']:>5} {hit['score']:8.4f} {mark} {hit['path']}")
            if not query["hits"]:
                lines.append(f"      none of a score of {threshold:.4f} or more")
        return "\n".join(lines).encode(errors="backslashreplace").decode()  # names may be odd


def _described(table: FeatureTable, row: int) -> dict[str, Any]:
    out: dict[str, Any] = {"path": table.paths[row]}
    for name, values in table.labels.items():
        value = values[row].item()
        if name == "infrared":
            out["modality"] = "infrared" if value else "visible"
        elif value >= 0:
            out[name] = value
    return out


def search(
    query: Table, gallery: Table, k: int = 8, index: str = "exact", device: str = "cpu"
) -> SearchResult:
    """The k rows of the gallery that are most similar to each query, by dot product.

    Args:
        query: A table, as ``FeatureExtractor.table`` gives it, or a feature file.
        gallery: The like. A file is read block by block, so it may exceed the memory.
        k: How many; fewer when the gallery has fewer.
        index: ``"exact"``; by FAISS ``"flat"``, the same ranking from rows in memory, or
            ``"ivfpq"``, approximate, for a million rows and more: it sees an eighth of the gallery
            in codes of about 100 bytes and scores the 10*k best of that exactly.
        device: Where the exact search computes.

    Raises:
        UserError: Tables of different models, settings or sizes; an unknown or unfit index.
    """
    query, gallery = _open(query), _open(gallery)
    check_comparable(query, gallery)
    if index not in INDEXES:
        raise UserError(f"index {index!r}: choose from {', '.join(INDEXES)}")
    if k < 1 or not len(query) or not len(gallery):
        raise UserError(
            f"k is {k}, with {len(query)} queries and a gallery of {len(gallery)}: each must be "
            "at least 1"
        )
    k = min(k, len(gallery))
    if index == "exact":
        scores, indices = _exact(query.features, gallery.features, k, device)
    else:
        scores, indices = _faiss(query.features, gallery.features, k, index)
    if scores.isnan().any():
        row = int(scores.isnan().any(1).nonzero()[0])
        raise UserError(
            f"the scores of {query.paths[row]} are not all numbers: {query.source} or "
            f"{gallery.source} holds NaN or infinity; extract again"
        )
    # Equal scores in the gallery's order, whatever the index made of them.
    order = indices.argsort(dim=1)
    scores, indices = scores.gather(1, order), indices.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return SearchResult(query, gallery, scores.gather(1, order), indices.gather(1, order))


def _open(table: Table) -> FeatureTable:
    return table if isinstance(table, FeatureTable) else read_feature_table(table)


def _blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 rows), of at most ``FLOATS`` numbers."""
    size = max(1, FLOATS // rows.shape[1])
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size].float()


def _exact(query: Tensor, gallery: Tensor, k: int, device: str) -> tuple[Tensor, Tensor]:
    queries = query.float().to(device)
    scores = torch.full((len(query), k), -math.inf, device=device)
    indices = torch.full((len(query), k), -1, device=device)
    for start, block in _blocks(gallery):
        columns = block.to(device).T
        for q in range(0, len(query), QUERIES):
            part = slice(q, q + QUERIES)
            found, places = (queries[part] @ columns).topk(min(k, len(block)))
            best = torch.cat([scores[part], found], dim=1)
            both = torch.cat([indices[part], places + start], dim=1)
            scores[part], chosen = best.topk(k)
            indices[part] = both.gather(1, chosen)
    return scores.cpu(), indices.cpu()


def _faiss(query: Tensor, gallery: Tensor, k: int, kind: str) -> tuple[Tensor, Tensor]:
    faiss = require("faiss", extra="search")
    count, width = gallery.shape
    index = faiss.IndexFlatIP(width) if kind == "flat" else _ivfpq(faiss, gallery)
    for _, block in _blocks(gallery):
        index.add(block.numpy())
    queries = query.float()
    found, places = index.search(queries.numpy(), k if kind == "flat" else min(10 * k, count))
    scores, indices = torch.from_numpy(found), torch.from_numpy(places)
    if kind == "flat":
        return scores, indices
    for q, rows in enumerate(indices):  # exact scores of the candidates
        scores[q] = gallery[rows.clamp(min=0)].float() @ queries[q]
    scores[indices < 0] = -math.inf
    scores, chosen = scores.topk(k)
    return scores, indices.gather(1, chosen)


def _ivfpq(faiss: Any, gallery: Tensor) -> Any:
    count, width = gallery.shape
    if count < PQ_ROWS:
        raise UserError(
            f"index 'ivfpq' needs a gallery of {PQ_ROWS} rows to learn from, this has {count}: use "
            "'exact' or 'flat'"
        )
    codes = next(m for m in range(min(96, width), 0, -1) if width % m == 0)
    cells = math.isqrt(count)
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(width), width, cells, codes, 8, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.spherical = True  # centres of one length, or the longest would win all products
    sample = torch.linspace(0, count - 1, min(count, max(PQ_ROWS, 40 * cells))).long()
    index.train(gallery[sample].float().numpy())
    index.nprobe = max(8, cells // 8)
    return index


@dataclass(frozen=True)
class Calibration:
    """A score from which on a pair counts as one person, and what that costs.

    Attributes:
        threshold: Take pairs of this score or more.
        false_match_rate: Share of the pairs of two persons that it takes, at most what was asked.
        true_match_rate: Share of the pairs of one person that it takes.
        different_pairs: Pairs of two persons that it rests on.
        same_pairs: Pairs of one person.
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
    """The lowest score at which at most that share of the pairs of two persons is taken.

    Args:
        query: Rows with identities, of other people than the model was trained on, and of the
            cameras that it is to be used with.
        gallery: The like, to compare with; None compares the infrared rows of the first table with
            its visible ones.
        false_match_rate: In (0, 1).

    Raises:
        UserError: Identities or modalities are not known, tables do not fit, or there are too few
            pairs for that rate.
    """
    query = _open(query)
    if gallery is None:
        infrared = query.label("infrared")
        query, gallery = query.select(infrared), query.select(~infrared)
    gallery = _open(gallery)
    check_comparable(query, gallery)
    ids, gallery_ids = query.label("identity"), gallery.label("identity")
    images = Counter(gallery_ids.tolist())
    same = sum(images[identity] for identity in ids.tolist())
    different = len(ids) * len(gallery_ids) - same
    allowed = math.floor(false_match_rate * different)
    if not 0 < false_match_rate < 1 or not allowed or not same:
        raise UserError(
            f"a false-match rate of {false_match_rate:g} from {different} pairs of two persons and "
            f"{same} of one: it must be between 0 and 1, and at least one pair of two; give more "
            "images, or another rate"
        )
    highest, genuine = torch.empty(0), []
    for start, block in _blocks(gallery.features):
        block_ids = gallery_ids[start : start + len(block)]
        for q in range(0, len(ids), QUERIES):
            part = slice(q, q + QUERIES)
            scores = query.features[part].float() @ block.T
            match = ids[part, None] == block_ids
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
