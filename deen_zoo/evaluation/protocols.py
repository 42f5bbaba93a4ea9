"""The named protocols of SYSU-MM01, RegDB and LLCM over the features of any model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.protocols import (
    RULES,
    UNKNOWN,
    Permutations,
    Sample,
    as_label,
    get_protocol,
    label_order,
    trial_numbers,
    trial_sides,
)
from ..errors import UserError, plural
from .metrics import as_codes, evaluate_ranking, label_array
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
            (training images, other cameras) is left alone. Paths order the seeded draw. Identities
            and cameras are whole numbers or words.
        protocol: One of ``deen_zoo.data.PROTOCOLS``.
        trials: How many (the first ones) or which ones; None for all ten. RegDB takes the features
            of one split, the one that the model was trained for: ``[3]`` says that it is split 3;
            join the ten by :func:`~deen_zoo.evaluation.merge_trials`.
        draw: ``"seeded"``, the reference's draw, or ``"official"``, the SYSU authors'.
        shots: Gallery images of each identity and camera: 1, or 10 for SYSU's multi-shot setting.
        permutations: ``deen_zoo.data.read_permutations(root)``, for the official draw.
        rerank: Re-rank each trial; the result then carries its own name.
        camera_pairs: Also score each pair of a query camera and a gallery camera.

    Raises:
        UserError: Unknown protocol or draw, features and samples that do not fit, a side without
            images, an identity or a camera that is not known, or features that are not finite.
    """
    row = get_protocol(protocol)
    numbers = trial_numbers(protocol, trials)
    rows = _as_tensor(features, samples)
    sides = trial_sides(samples, protocol, numbers, draw, shots, permutations)
    # Once for all trials, which compare the same queries again and again.
    used = sorted({i for pair in sides for side in pair for i in side})
    _check_known([samples[i] for i in used], row.rule)
    done, pairs = [], []
    similarities = _similarities(rows, sides, rerank)
    for number, (queries, gallery), similarity in zip(numbers, sides, similarities, strict=True):
        sampled = [samples[i] for i in queries], [samples[i] for i in gallery]
        labels = _labels(*sampled)
        done.append(Trial(number, *sampled, evaluate_ranking(similarity, *labels, row.rule)))
        if camera_pairs:
            pairs.append(_score_pairs(similarity, labels, row.rule))
    return ProtocolResult(
        protocol,
        done,
        draw=draw if row.sampled else None,
        shots=shots if row.sampled else None,
        rerank=rerank,
        camera_pairs=_mean_pairs(pairs),
    )


def images_of(
    samples: Sequence[Sample], protocol: str, trials: int | Sequence[int] | None = None
) -> list[int]:
    """Which samples :func:`evaluate` compares in its seeded, single-shot trials, ascending.

    The features of the others need not be computed; their rows may hold anything finite.
    """
    sides = trial_sides(samples, protocol, trial_numbers(protocol, trials))
    return sorted({i for trial in sides for side in trial for i in side})


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
            f"features of {plural(int((~finite).sum()), 'image')} are NaN or infinite, first of "
            f"{samples[first].path}"
        )
    return rows


def _check_known(samples: Sequence[Sample], rule: str) -> None:
    """Refuse unknown identities, and cameras that the rule needs: all of them would be one."""
    for sample in samples:
        for name in ("identity", "camera") if RULES[rule].needs_cameras else ("identity",):
            if as_label(getattr(sample, name), name) == UNKNOWN:
                raise UserError(f"{sample.path}: its {name} is not known: label it or leave it out")


def _labels(queries: Sequence[Sample], gallery: Sequence[Sample]) -> Labels:
    """Identities of both sides, then cameras of both."""
    q_ids, g_ids = (label_array([s.identity for s in side]) for side in (queries, gallery))
    q_cameras, g_cameras = (label_array([s.camera for s in side]) for side in (queries, gallery))
    return q_ids, g_ids, q_cameras, g_cameras


def _similarities(
    rows: Tensor, sides: Sequence[tuple[Indices, Indices]], rerank: KReciprocal | None
) -> Iterator[Any]:
    """(queries, gallery) of each trial, from one product of all the images that any trial draws."""
    queries, gallery = (sorted({i for trial in sides for i in trial[side]}) for side in (0, 1))
    if rerank:  # needs all pairs
        queries = gallery = queries + gallery
    at = [{image: n for n, image in enumerate(side)} for side in (queries, gallery)]
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    product = wide[queries] @ wide[gallery].T
    for left, right in sides:
        if not rerank:
            yield product[[at[0][i] for i in left]][:, [at[1][i] for i in right]]
            continue
        images = [at[0][i] for i in left + right]
        part = product[images][:, images]
        norms = part.diagonal()
        distance = (norms[:, None] + norms[None] - 2 * part).clamp(min=0)
        yield -k_reciprocal_distance(distance.cpu().numpy(), len(left), rerank)


def _score_pairs(similarity: Any, labels: Labels, rule: str) -> list[CameraPair]:
    q_ids, g_ids, q_cams, g_cams = labels
    q_codes, g_codes = as_codes(q_cams, g_cams)  # one camera may be a number, the other a word
    pairs = []
    for a in sorted(set(q_cams.tolist()), key=label_order):
        for b in sorted(set(g_cams.tolist()), key=label_order):
            q, g = np.flatnonzero(q_cams == a), np.flatnonzero(g_cams == b)
            part = similarity[q][:, g]
            try:
                scores = evaluate_ranking(part, q_ids[q], g_ids[g], q_codes[q], g_codes[g], rule)
            except UserError:  # no match between the two
                pairs.append(CameraPair(a, b, 0, None, None))
                continue
            pairs.append(CameraPair(a, b, scores.num_valid, float(scores.cmc[0]), scores.mAP))
    return pairs


def _mean_pairs(trials: Sequence[Sequence[CameraPair]]) -> list[CameraPair]:
    means = []
    for same in zip(*trials, strict=True):
        scored = np.array([pair[3:] for pair in same if pair.r1 is not None])
        r1, precision = scored.mean(0).tolist() if len(scored) else (None, None)
        queries = float(np.mean([pair.queries for pair in same]))
        means.append(same[0]._replace(queries=queries, r1=r1, mAP=precision))
    return means
