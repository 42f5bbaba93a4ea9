"""k-reciprocal re-ranking against a slow transcription of the paper's definitions."""

from __future__ import annotations

import numpy as np
import pytest

from deen_zoo.errors import UserError
from deen_zoo.evaluation import (
    KReciprocal,
    evaluate,
    evaluate_ranking,
    k_reciprocal_distance,
)

from .test_protocols import features_of, world


def squared_distances(features: np.ndarray) -> np.ndarray:
    return ((features[:, None] - features[None]) ** 2).sum(-1)


def oracle(distance: np.ndarray, num_queries: int, k1: int, k2: int, weight: float) -> np.ndarray:
    """Sets and loops, after equations 3 to 12 of the paper."""
    total = len(distance)
    d = [[distance[p][g] / max(distance[p]) for g in range(total)] for p in range(total)]

    def nearest(p: int, k: int) -> list[int]:
        return sorted(range(total), key=lambda g: (g != p, d[p][g]))[:k]

    def reciprocal(p: int, k: int) -> set[int]:
        return {g for g in nearest(p, k + 1) if p in nearest(g, k + 1)}

    encodings = []
    for p in range(total):
        members = reciprocal(p, k1)
        expanded = set(members)
        for q in members:
            theirs = reciprocal(q, round(k1 / 2))
            if len(theirs & members) > 2 / 3 * len(theirs):
                expanded |= theirs
        values = [np.exp(-d[p][g]) if g in expanded else 0.0 for g in range(total)]
        encodings.append(np.array(values) / sum(values))
    encodings = [np.mean([encodings[g] for g in nearest(p, k2)], axis=0) for p in range(total)]
    result = np.empty((num_queries, total - num_queries))
    for p in range(num_queries):
        for g in range(num_queries, total):
            both = np.minimum(encodings[p], encodings[g]).sum()
            either = np.maximum(encodings[p], encodings[g]).sum()
            result[p, g - num_queries] = (1 - weight) * (1 - both / either) + weight * d[p][g]
    return result


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("parameters", [(20, 6, 0.3), (7, 1, 0.0), (5, 3, 0.5), (50, 60, 0.3)])
def test_equal_to_the_oracle(seed, parameters):
    rng = np.random.default_rng(seed)
    features = np.repeat(rng.standard_normal((8, 4)), 5, axis=0) + 0.4 * rng.standard_normal(
        (40, 4)
    )
    distance = squared_distances(features[rng.permutation(40)])
    ours = k_reciprocal_distance(distance, 15, KReciprocal(*parameters))
    np.testing.assert_allclose(ours, oracle(distance, 15, *parameters), atol=1e-12)


def test_weight_one_is_the_original_order():
    distance = squared_distances(np.random.default_rng(2).standard_normal((30, 4)))
    ours = k_reciprocal_distance(distance, 10, KReciprocal(5, 2, 1.0))
    np.testing.assert_array_equal(np.argsort(ours, 1), np.argsort(distance[:10, 10:], 1))


def test_identical_images_and_float32():
    distance = np.zeros((6, 6), dtype=np.float32)
    ours = k_reciprocal_distance(distance, 2)
    assert ours.dtype == np.float32 and ours.shape == (2, 4)
    np.testing.assert_allclose(ours, 0, atol=1e-6)


def test_the_protocol_re_ranks_each_trial_under_its_own_name():
    parameters = KReciprocal(8, 3, 0.3)
    samples = world(identities=8, cameras=(1, 2, 3))
    result = evaluate(features_of(samples), samples, "llcm-ir2vis", trials=2, rerank=parameters)
    plain = evaluate(features_of(samples), samples, "llcm-ir2vis", trials=2)
    assert result.name == "llcm-ir2vis + k-reciprocal re-ranking"
    assert result.to_dict()["rerank"] == {"k1": 8, "k2": 3, "weight": 0.3}
    assert result.to_dict()["published"] == [] and plain.to_dict()["published"]
    assert result.mean != plain.mean
    trial = result.trials[1]
    features = features_of([*trial.queries, *trial.gallery])
    expected = oracle(squared_distances(features), len(trial.queries), *parameters)
    sides = [[s[column] for s in side] for column in (1, 2)  # identities, cameras
             for side in (trial.queries, trial.gallery)]  # fmt: skip
    wanted = evaluate_ranking(-expected, *sides, rule="llcm")
    assert trial.ranking.cmc == pytest.approx(wanted.cmc)
    assert trial.ranking.mAP == pytest.approx(wanted.mAP)


@pytest.mark.parametrize(
    ("shape", "queries", "parameters"),
    [
        ((4, 5), 2, KReciprocal()),
        ((4, 4), 0, KReciprocal()),
        ((4, 4), 4, KReciprocal()),
        ((4, 4), 2, KReciprocal(k1=0)),
        ((4, 4), 2, KReciprocal(k2=0)),
        ((4, 4), 2, KReciprocal(weight=1.5)),
    ],
)
def test_mistakes(shape, queries, parameters):
    with pytest.raises(UserError, match=r"re-ranking"):
        k_reciprocal_distance(np.zeros(shape), queries, parameters)
