"""The named protocols of SYSU-MM01, RegDB and LLCM over the features of any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.protocols import PROTOCOLS, Permutations, Protocol, Sample, draw_gallery
from ..errors import UserError
from .metrics import evaluate_ranking
from .rerank import KReciprocal, k_reciprocal_distance
from .results import CameraPair, ProtocolResult, Trial

Indices = list[int]
Labels = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


def evaluate(
    features: Any,
    samples: Sequence[Sample],
    protocol: str,
    *,
    trials: int | Sequence[int] | None = None,
    draw: str = "seeded",
    shots: int = 1,
    permutations: Permutations | None = None,
    rerank: KReciprocal | None = None,
    camera_pairs: bool = False,
) -> ProtocolResult:
    """Run a named protocol over features of any model.

    Similarity is the features' dot product: normalise rows for cosine similarity. It is computed
    once, for all the images that any trial draws.

    Args:
        features: (N, D) floats, numpy array or torch tensor on any device.
        samples: N samples, row for row: at least both sides of the protocol; what it does not use
            (training images, other cameras) is left alone. Paths order the seeded draw.
        protocol: One of ``deen_zoo.data.PROTOCOLS``.
        trials: How many (the first ones) or which ones; None for all ten. RegDB takes the features
            of one split, the one that the model was trained for: ``[3]`` says that it is split 3;
            join the ten by :func:`~deen_zoo.evaluation.merge_trials`.
        draw: ``"seeded"``, the reference's draw, or ``"official"``, the SYSU authors'.
        shots: Gallery images of each identity and camera: 1, or 10 for SYSU's multi-shot setting.
        permutations: ``deen_zoo.data.datasets.read_permutations(root)``, for the official draw.
        rerank: Re-rank each trial; the result then carries its own name.
        camera_pairs: Also score each pair of a query camera and a gallery camera.

    Raises:
        UserError: Unknown protocol or draw, features and samples that do not fit, a side without
            images, or features that are not finite.
    """
    terms = _terms(protocol)
    _check_draw(protocol, terms, draw, shots, permutations)
    numbers = _trial_numbers(protocol, terms, trials)
    rows = _as_tensor(features, samples)
    sides = _trial_sides(samples, protocol, numbers, shots, permutations)
    compare = _Comparison(rows, sides, rerank)
    done, pairs = [], []
    for number, (queries, gallery) in zip(numbers, sides, strict=True):
        similarity = compare(queries, gallery)
        sampled = [samples[i] for i in queries], [samples[i] for i in gallery]
        labels = _labels(*sampled)
        done.append(Trial(number, *sampled, evaluate_ranking(similarity, *labels, terms.rule)))
        if camera_pairs:
            pairs.append(_score_pairs(similarity, labels, terms.rule))
    return ProtocolResult(
        protocol,
        done,
        draw=draw if terms.sampled else None,
        shots=shots if terms.sampled else None,
        rerank=rerank,
        camera_pairs=_mean_pairs(pairs),
    )


def images_of(
    samples: Sequence[Sample], protocol: str, trials: int | Sequence[int] | None = None
) -> list[int]:
    """Which samples :func:`evaluate` compares in its seeded, single-shot trials, ascending.

    The features of the others need not be computed; their rows may hold anything finite.
    """
    numbers = _trial_numbers(protocol, _terms(protocol), trials)
    sides = _trial_sides(samples, protocol, numbers, 1, None)
    return sorted({i for trial in sides for side in trial for i in side})


def _terms(protocol: str) -> Protocol:
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def _trial_sides(
    samples: Sequence[Sample],
    protocol: str,
    numbers: Sequence[int],
    shots: int,
    permutations: Permutations | None,
) -> list[tuple[Indices, Indices]]:
    """Queries and gallery of each trial."""
    terms, sides = PROTOCOLS[protocol], []
    query_side, gallery_side = _sides(samples, protocol, terms)
    for number in numbers:
        queries, gallery = query_side, gallery_side
        if terms.sampled == "query":
            queries = _draw(samples, query_side, number, shots, None)
        elif terms.sampled:
            gallery = _draw(samples, gallery_side, number, shots, permutations)
        sides.append((queries, gallery))
    return sides


def _check_draw(
    protocol: str, terms: Protocol, draw: str, shots: int, permutations: Permutations | None
) -> None:
    if draw not in ("seeded", "official"):
        raise UserError(f"unknown draw {draw!r}; choose 'seeded' or 'official'")
    if draw == "official" and terms.dataset != "sysu":
        raise UserError(f"{protocol} has no official draw; sysu-all and sysu-indoor have one")
    if (draw == "official") != (permutations is not None):
        raise UserError(
            "the official draw needs permutations=read_permutations(root), the seeded takes none"
        )
    if not terms.sampled and shots != 1:
        raise UserError(f"{protocol} takes the whole gallery: leave shots at 1, not {shots}")


def _trial_numbers(protocol: str, terms: Protocol, trials: int | Sequence[int] | None) -> list[int]:
    known = terms.trials
    if trials is None:
        return list(known) if terms.sampled else [known[0]]
    numbers = list(known[: max(trials, 0)]) if isinstance(trials, int) else list(trials)
    if isinstance(trials, int) and len(numbers) != trials:
        raise UserError(f"trials is {trials}; {protocol} has 1 to {len(known)}")
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(known):
        raise UserError(
            f"trials are {numbers}; {protocol} has {known[0]} to {known[-1]}, each once"
        )
    if not terms.sampled and len(numbers) > 1:
        raise UserError(
            f"{protocol} was asked for {len(numbers)} trials; each is another split with its own "
            "model: evaluate one at a time, then merge_trials"
        )
    return numbers


def _as_tensor(features: Any, samples: Sequence[Sample]) -> Tensor:
    rows = features if isinstance(features, Tensor) else torch.as_tensor(np.asarray(features))
    rows = rows.detach()
    if rows.ndim != 2 or not rows.is_floating_point() or 0 in rows.shape:
        raise UserError(
            f"features are {tuple(rows.shape)} of type {rows.dtype}; give (images, D) floats"
        )
    if len(rows) != len(samples):
        raise UserError(
            f"{len(rows)} rows of features for {len(samples)} samples; give one for each"
        )
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise UserError(
            f"features of {int((~finite).sum())} images have NaN or infinite entries, first of "
            f"{samples[first].path}"
        )
    return rows


def _sides(samples: Sequence[Sample], protocol: str, terms: Protocol) -> tuple[Indices, Indices]:
    seen: set[str] = set()
    sides: dict[str, Indices] = {"visible": [], "infrared": []}
    for i, sample in enumerate(samples):
        if sample.modality not in sides:
            raise UserError(
                f"{sample.path}: modality {sample.modality!r}; it is 'visible' or 'infrared'"
            )
        if sample.path in seen:
            raise UserError(f"{sample.path} comes twice among the samples; give each image once")
        seen.add(sample.path)
        sides[sample.modality].append(i)
    cameras = terms.gallery_cameras
    gallery = [i for i in sides[terms.gallery] if not cameras or samples[i].camera in cameras]
    for side, kind, found in (("query", terms.query, sides[terms.query]),
                              ("gallery", terms.gallery, gallery)):  # fmt: skip
        if not found:
            where = (
                f" of cameras {', '.join(map(str, cameras))}"
                if side == "gallery" and cameras
                else ""
            )
            raise UserError(f"{protocol} has no {side}: no {kind} image{where} among the samples")
    return sides[terms.query], gallery


def _labels(queries: Sequence[Sample], gallery: Sequence[Sample]) -> Labels:
    """Identities of both sides, then cameras of both."""
    (q_ids, q_cameras), (g_ids, g_cameras) = (
        np.array([(s.identity, s.camera) for s in side]).T for side in (queries, gallery)
    )
    return q_ids, g_ids, q_cameras, g_cameras


def _draw(
    samples: Sequence[Sample],
    side: Indices,
    trial: int,
    shots: int,
    permutations: Permutations | None,
) -> Indices:
    return [side[i] for i in draw_gallery([samples[i] for i in side], trial, shots, permutations)]


class _Comparison:
    """Similarities of any trial's images, from one product of all the images that any draws."""

    def __init__(
        self, rows: Tensor, sides: Sequence[tuple[Indices, Indices]], rerank: KReciprocal | None
    ) -> None:
        self.rerank = rerank
        queries = sorted({i for trial in sides for i in trial[0]})
        gallery = sorted({i for trial in sides for i in trial[1]})
        if rerank:  # needs all pairs
            queries = gallery = queries + gallery
        self.place = [{image: n for n, image in enumerate(side)} for side in (queries, gallery)]
        left, right = _pick(rows, queries), _pick(rows, gallery)
        self.product = left @ right.T

    def __call__(self, queries: Indices, gallery: Indices) -> Any:
        if not self.rerank:
            part = _take(self.product, 1, [self.place[1][i] for i in gallery])
            return _take(part, 0, [self.place[0][i] for i in queries])
        images = [self.place[0][i] for i in queries + gallery]
        product = _take(_take(self.product, 1, images), 0, images)
        norms = product.diagonal()
        distance = (norms[:, None] + norms[None] - 2 * product).clamp(min=0)
        return -k_reciprocal_distance(distance.cpu().numpy(), len(queries), self.rerank)


def _take(matrix: Tensor, dim: int, indices: Indices) -> Tensor:
    if indices == list(range(matrix.shape[dim])):
        return matrix
    return matrix.index_select(dim, torch.tensor(indices, device=matrix.device))


def _pick(rows: Tensor, indices: Indices) -> Tensor:
    picked = _take(rows, 0, indices)
    return picked if picked.dtype in (torch.float32, torch.float64) else picked.float()


def _score_pairs(similarity: Any, labels: Labels, rule: str) -> list[CameraPair]:
    q_ids, g_ids, q_cams, g_cams = labels
    pairs = []
    for a in np.unique(q_cams).tolist():
        for b in np.unique(g_cams).tolist():
            q, g = np.flatnonzero(q_cams == a), np.flatnonzero(g_cams == b)
            part = similarity[q][:, g]
            try:
                scores = evaluate_ranking(part, q_ids[q], g_ids[g], q_cams[q], g_cams[g], rule)
            except UserError:  # no match between the two
                pairs.append(CameraPair(a, b, 0, None, None))
                continue
            pairs.append(CameraPair(a, b, scores.num_valid, float(scores.cmc[0]), scores.mAP))
    return pairs


def _mean_pairs(trials: Sequence[Sequence[CameraPair]]) -> list[CameraPair]:
    means = []
    for same in zip(*trials, strict=True):
        scored = [pair for pair in same if pair.r1 is not None]
        r1 = float(np.mean([pair.r1 for pair in scored])) if scored else None
        precision = float(np.mean([pair.mAP for pair in scored])) if scored else None
        queries = float(np.mean([pair.queries for pair in same]))
        means.append(
            CameraPair(same[0].query_camera, same[0].gallery_camera, queries, r1, precision)
        )
    return means
