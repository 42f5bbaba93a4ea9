"""Results of a protocol: its trials, their means, counts, and the published numbers."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..data.datasets import get_dataset
from ..data.protocols import Label, Sample, get_protocol
from ..errors import UserError
from ..io import write_atomically
from .metrics import Ranking
from .published import published
from .rerank import KReciprocal

METRICS = ("r1", "r5", "r10", "r20", "mAP", "mINP")
QUERY_COLUMNS = ("trial", "path", "identity", "camera", "first_rank", "average_precision",
                 "inverse_penalty")  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One gallery draw (numbers 0..9) or, for RegDB, one split (1..10).

    ``queries`` and ``gallery`` are the samples it compared.
    """

    number: int
    queries: Sequence[Sample]
    gallery: Sequence[Sample]
    ranking: Ranking

    @property
    def metrics(self) -> dict[str, float]:
        """r1, r5, r10, r20, mAP and mINP as fractions."""
        cmc = self.ranking.cmc
        ranks = {f"r{k}": float(cmc[k - 1]) for k in (1, 5, 10, 20)}
        return ranks | {"mAP": self.ranking.mAP, "mINP": self.ranking.mINP}


class CameraPair(NamedTuple):
    """Scores of the queries of one camera against the gallery images of another, over all trials.

    ``r1`` and ``mAP`` are None where the protocol leaves no match between the two.
    """

    query_camera: Label
    gallery_camera: Label
    queries: float  # valid ones, mean over trials
    r1: float | None
    mAP: float | None


@dataclass(frozen=True)
class ProtocolResult:
    """What :func:`~deen_zoo.evaluation.evaluate` returns.

    Attributes:
        protocol: Its name, such as ``"llcm-ir2vis"``.
        trials: One for each draw or split.
        draw: ``"seeded"`` or ``"official"``; None where nothing is drawn (RegDB).
        shots: Images of each identity and camera in the gallery; None where nothing is drawn.
        rerank: Parameters of the k-reciprocal re-ranking, None without.
        camera_pairs: Empty unless asked for.
    """

    protocol: str
    trials: Sequence[Trial]
    draw: str | None
    shots: int | None
    rerank: KReciprocal | None = None
    camera_pairs: Sequence[CameraPair] = ()

    @property
    def name(self) -> str:
        """The protocol and whatever makes its numbers another measurement than the published."""
        shots = f", {self.shots}-shot" if self.shots not in (None, 1) else ""
        return self.protocol + shots + (" + k-reciprocal re-ranking" if self.rerank else "")

    @property
    def mean(self) -> dict[str, float]:
        """Mean over the trials of each metric, fractions."""
        return {key: float(np.mean([t.metrics[key] for t in self.trials])) for key in METRICS}

    @property
    def std(self) -> dict[str, float]:
        """Standard deviation over the trials (of the population: 0 for one trial)."""
        return {key: float(np.std([t.metrics[key] for t in self.trials])) for key in METRICS}

    @property
    def counts(self) -> dict[str, int]:
        """Images and identities found, in the first trial."""
        first = self.trials[0]
        return {
            "queries": len(first.queries),
            "valid_queries": first.ranking.num_valid,
            "gallery": len(first.gallery),
            "identities": len({sample.identity for sample in first.queries}),
        }

    @property
    def expected_counts(self) -> dict[str, int]:
        """Images that a complete dataset has in a single-shot trial, as far as published."""
        dataset = get_dataset(get_protocol(self.protocol).dataset)
        split = f" {dataset.splits[0]}" if len(dataset.splits) > 1 else ""
        test = dataset.expected.get(f"test{split}", {})
        counts = {"identities": test["identities"]} if "identities" in test else {}
        for side, count in dataset.expected.get(self.protocol, {}).items():
            if side == "query":
                counts["queries"] = count
            elif self.shots in (None, 1):
                counts["gallery"] = count
        return counts

    def to_dict(
        self, drawn: bool = False, method: str | None = None, weights: str | None = None
    ) -> dict[str, Any]:
        """For ``results.json``: plain numbers, fractions; next to counts and published numbers,
        unless the people are drawn.

        Those are of the method (DEEN, to compare with, where it is not known), or, where the
        weights are converted, what their source reports (:func:`~deen_zoo.evaluation.published`);
        another measurement than the published has none.
        """
        other = drawn or self.name != self.protocol
        method = "DEEN" if method is None else method
        result = {
            "protocol": self.protocol,
            "name": self.name,
            "draw": self.draw,
            "shots": self.shots,
            "rerank": self.rerank._asdict() if self.rerank else None,
            "counts": self.counts,
            "expected_counts": {} if drawn else self.expected_counts,
            "mean": self.mean,
            "std": self.std,
            "trials": [{"trial": t.number, **t.metrics} for t in self.trials],
            "published": [] if other else published(self.protocol, method, weights),
        }
        if self.camera_pairs:
            result["camera_pairs"] = [pair._asdict() for pair in self.camera_pairs]
        return result

    def write_queries(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file with one row per query and trial.

        Its columns are :data:`QUERY_COLUMNS`. ``first_rank`` counts from 1, as the CMC does; it and
        the last two are empty without a match.
        """
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(QUERY_COLUMNS)
        for trial in self.trials:
            scores = trial.ranking
            columns = scores.first_rank + 1, scores.average_precision, scores.inverse_penalty
            for i, sample in enumerate(trial.queries):
                valid = scores.first_rank[i] >= 0
                row = [column[i] if valid else "" for column in columns]
                writer.writerow((trial.number, *sample[:3], *row))
        write_atomically(path, table.getvalue().encode(errors="surrogateescape"))


def merge_trials(results: Sequence[ProtocolResult]) -> ProtocolResult:
    """Join results of the same measurement, such as RegDB's ten splits, each of its own model.

    Raises:
        UserError: Nothing to join, different measurements, or a trial that comes twice.
    """
    if not results:
        raise UserError("no results to join; give at least one")
    trials = sorted((t for r in results for t in r.trials), key=lambda t: t.number)
    settings = {(r.protocol, r.draw, r.shots, r.rerank) for r in results}
    if len(settings) > 1:
        raise UserError(f"cannot join results of {', '.join(sorted(r.name for r in results))}")
    numbers = [t.number for t in trials]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"a trial comes twice among {numbers}; give each trial once")
    if len(results) > 1 and any(r.camera_pairs for r in results):
        raise UserError("camera pairs of several results cannot be joined; evaluate without them")
    return replace(results[0], trials=trials)
