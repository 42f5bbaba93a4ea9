"""Ranking metrics against an obvious oracle, the reference itself, and its recorded numbers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deen_zoo.data import protocols
from deen_zoo.data.protocols import Rule
from deen_zoo.errors import UserError
from deen_zoo.evaluation import Ranking, evaluate_ranking
from deen_zoo.evaluation import metrics as metrics_module

from .reference import needs_official, official

RULES = ["sysu", "llcm", "regdb"]
GOLDEN = Path(__file__).parent / "golden" / "ranking.npz"


class Case(NamedTuple):
    similarity: np.ndarray
    query_ids: np.ndarray
    gallery_ids: np.ndarray
    query_cameras: np.ndarray
    gallery_cameras: np.ndarray


def random_case(seed: int, queries=40, gallery=60, identities=25, cameras=6, dtype=float) -> Case:
    """Tie-free; with more query identities than gallery ones, so that some have no match."""
    rng = np.random.default_rng(seed)
    scores = rng.permutation(queries * gallery).reshape(queries, gallery)
    q, g = rng.integers(0, identities + 3, queries), rng.integers(0, identities, gallery)
    scores = scores + (q[:, None] == g) * (scores.size // 6 + 0.5)
    return Case(
        (scores / scores.size).astype(dtype) * 2 - 1,
        q,
        g,
        rng.integers(1, cameras + 1, queries),
        rng.integers(1, cameras + 1, gallery),
    )


ADVERSARIAL = {
    "some_without_a_match": random_case(1)._replace(query_ids=np.arange(40) % 50),
    "one_identity": random_case(2, identities=1)._replace(query_ids=np.zeros(40, dtype=int)),
    "one_query": random_case(3, queries=1)._replace(query_ids=np.array([7])),
    "one_gallery_image": Case(np.ones((2, 1)), *map(np.array, ([1, 2], [1], [3, 6], [1]))),
    "small_gallery": random_case(4, gallery=7, identities=4),
    "few_identities": random_case(5, identities=6),
    "one_camera": random_case(6, cameras=1),
    "all_of_camera_3_and_2": random_case(7)._replace(
        query_cameras=np.full(40, 3), gallery_cameras=np.where(np.arange(60) % 3, 2, 1)
    ),
    "only_match_excluded": Case(  # the first query's under both rules, the second's under neither
        np.array([[0.9, 0.5, 0.1], [0.3, 0.2, 0.8]]),
        *map(np.array, ([1, 2], [1, 2, 3], [2, 3], [2, 5, 1])),
    ),
    "sysu_match_excluded": Case(
        np.array([[0.9, 0.5, 0.1], [0.3, 0.2, 0.8]]),
        *map(np.array, ([1, 2], [1, 2, 3], [3, 6], [2, 2, 1])),
    ),
    "negative_and_huge": random_case(8)._replace(
        similarity=-np.exp(random_case(8).similarity * 300)
    ),
    "unsorted_sparse_identities": random_case(9)._replace(
        query_ids=random_case(9).query_ids * -1000003,
        gallery_ids=random_case(9).gallery_ids * -1000003,
    ),
}

LIVE = {
    **ADVERSARIAL,
    "random": random_case(20),
    "float32": random_case(21, dtype=np.float32),
    "large": random_case(22, queries=300, gallery=400, identities=90, cameras=9),
}


def oracle(case: Case, rule: str, max_rank: int = 20) -> tuple[np.ndarray, float, float]:
    """The definition, one query and one image at a time."""
    curves, precisions, penalties = [], [], []
    for scores, identity, camera in zip(*case[:2], case.query_cameras, strict=True):
        ranked = []
        for column in sorted(range(len(scores)), key=lambda c: (-scores[c], c)):
            other, seen_by = case.gallery_ids[column], case.gallery_cameras[column]
            if rule == "sysu" and camera == 3 and seen_by == 2:
                continue
            if rule == "llcm" and other == identity and seen_by == camera:
                continue
            ranked.append(other)
        if identity not in ranked:
            continue
        ranks = [rank for rank, other in enumerate(ranked, 1) if other == identity]
        precisions.append(sum(n / rank for n, rank in enumerate(ranks, 1)) / len(ranks))
        penalties.append(len(ranks) / ranks[-1])
        if rule != "regdb":
            ranked = list(dict.fromkeys(ranked))  # each identity once, where it comes first
        first = ranked.index(identity)
        curves.append([float(first <= k) for k in range(max_rank)])
    if not curves:
        raise UserError("no valid query")
    return np.mean(curves, axis=0), float(np.mean(precisions)), float(np.mean(penalties))


def assert_same(result: Ranking, expected: tuple[Any, float, float]) -> None:
    curve, precision, penalty = expected
    assert result.cmc == pytest.approx(np.asarray(curve), abs=1e-12)
    assert result.mAP == pytest.approx(precision, abs=1e-12)
    assert result.mINP == pytest.approx(penalty, abs=1e-12)


def reference(case: Case, rule: str) -> tuple[np.ndarray, float, float]:
    """The reference's numbers, its curve (which stops at the last identity) continued to 20."""
    evaluator = getattr(official("eval_metrics"), f"eval_{rule}")
    curve, *means = evaluator(-case.similarity, *(case[1:3] if rule == "regdb" else case[1:]))
    return np.append(curve, np.full(20 - len(curve), curve[-1], np.float32)), *means


def reference_by_query(case: Case, rule: str) -> tuple[np.ndarray, float, float]:
    """The same for a case whose curves differ in length, which the reference cannot stack."""
    results = []
    for i in range(len(case.query_ids)):
        one = slice(i, i + 1)
        alone = Case(case[0][one], case[1][one], case[2], case[3][one], case[4])
        with contextlib.suppress(AssertionError):  # no match
            results.append(reference(alone, rule))
    curves, *means = zip(*results, strict=True)
    return np.mean(curves, axis=0).astype(np.float32), *(float(np.mean(m)) for m in means)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_cases_equal_the_oracle(rule, seed, dtype):
    case = random_case(seed, dtype=dtype)
    assert_same(evaluate_ranking(*case, rule=rule), oracle(case, rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_cases_equal_the_oracle(rule, name):
    case = ADVERSARIAL[name]
    try:
        expected = oracle(case, rule)
    except UserError:
        with pytest.raises(UserError, match="has a match"):
            evaluate_ranking(*case, rule=rule)
        return
    assert_same(evaluate_ranking(*case, rule=rule), expected)


@needs_official
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LIVE)
def test_equal_to_the_reference_live(rule, name):
    """The CMC bit for bit when rounded to the reference's float32; mAP and mINP to 1e-12."""
    case = LIVE[name]
    try:
        curve, precision, penalty = reference(case, rule)
    except AssertionError:
        with pytest.raises(UserError, match="has a match"):
            evaluate_ranking(*case, rule=rule)
        return
    except ValueError as error:
        assert "inhomogeneous" in str(error)
        curve, precision, penalty = reference_by_query(case, rule)
    result = evaluate_ranking(*case, rule=rule)
    np.testing.assert_array_equal(result.cmc.astype(np.float32), curve)
    assert result.mAP == pytest.approx(precision, abs=1e-12)
    assert result.mINP == pytest.approx(penalty, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_equal_to_the_references_recorded_numbers(rule):
    with np.load(GOLDEN) as golden:
        case = Case(*(golden[name] for name in Case._fields))
        result = evaluate_ranking(*case, rule=rule)
        np.testing.assert_array_equal(result.cmc.astype(np.float32), golden[f"{rule}_cmc"])
        assert result.mAP == pytest.approx(golden[f"{rule}_mAP"], abs=1e-12)
        assert result.mINP == pytest.approx(golden[f"{rule}_mINP"], abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("levels", [1, 2, 7])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_ties_rank_in_gallery_order(rule, levels, dtype):
    rng = np.random.default_rng(levels)
    case = random_case(10)
    values = rng.integers(-levels // 2, levels // 2 + 1, case.similarity.shape).astype(dtype)
    if dtype != np.int64:
        values[values == 0] = rng.choice([0.0, -0.0], (values == 0).sum())  # they are equal
    case = case._replace(similarity=values)
    assert_same(evaluate_ranking(*case, rule=rule), oracle(case, rule))


def test_blocks_do_not_change_the_result(monkeypatch):
    case = random_case(11)
    whole = evaluate_ranking(*case, rule="llcm")
    monkeypatch.setattr(metrics_module, "_BLOCK", 1)
    rows = evaluate_ranking(*case, rule="llcm")
    np.testing.assert_array_equal(whole.first_rank, rows.first_rank)
    np.testing.assert_array_equal(whole.average_precision, rows.average_precision)
    assert (whole.mAP, whole.mINP) == (rows.mAP, rows.mINP)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_tensors(dtype):
    case = random_case(12)
    similarity = torch.from_numpy(case.similarity).to(dtype).requires_grad_()
    result = evaluate_ranking(similarity, *map(torch.from_numpy, case[1:]), rule="sysu")
    case = case._replace(similarity=similarity.detach().double().numpy())
    assert_same(result, oracle(case, "sysu"))
    untouched = case.similarity.copy()
    evaluate_ranking(*case, rule="sysu")
    np.testing.assert_array_equal(case.similarity, untouched)


def test_per_query_values_average_to_the_means():
    case = random_case(13)
    result = evaluate_ranking(*case, rule="llcm")
    valid = result.first_rank >= 0
    assert 0 < result.num_valid == valid.sum() < len(valid)
    assert np.nanmean(result.average_precision) == pytest.approx(result.mAP)
    assert np.nanmean(result.inverse_penalty) == pytest.approx(result.mINP)
    assert np.isnan(result.average_precision[~valid]).all()
    assert (result.first_rank[valid] == 0).mean() == pytest.approx(result.cmc[0])


cases = st.builds(
    random_case,
    st.integers(0, 10**6),
    queries=st.integers(1, 12),
    gallery=st.integers(1, 30),
    identities=st.integers(1, 8),
    cameras=st.integers(1, 6),
)


def evaluate_or_skip(case: Case, rule: str) -> Ranking | None:
    try:
        return evaluate_ranking(*case, rule=rule)
    except UserError as error:
        assert "has a match" in str(error)
        return None


@given(cases, st.sampled_from(RULES), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_gallery_order_and_monotone_maps_change_nothing(case, rule, random):
    before = evaluate_or_skip(case, rule)
    order = np.array(random.sample(range(len(case.gallery_ids)), len(case.gallery_ids)))
    after = evaluate_or_skip(
        case._replace(
            similarity=np.exp(case.similarity[:, order]),
            gallery_ids=case.gallery_ids[order],
            gallery_cameras=case.gallery_cameras[order],
        ),
        rule,
    )
    assert (before is None) == (after is None)
    if before and after:
        np.testing.assert_array_equal(before.cmc, after.cmc)
        np.testing.assert_array_equal(before.average_precision, after.average_precision)
        np.testing.assert_array_equal(before.inverse_penalty, after.inverse_penalty)


@given(cases, st.sampled_from(RULES))
@settings(max_examples=100, deadline=None)
def test_bounds_and_a_perfect_similarity(case, rule):
    result = evaluate_or_skip(case, rule)
    if result is None:
        return
    assert ((result.cmc >= 0) & (result.cmc <= 1)).all() and (np.diff(result.cmc) >= 0).all()
    assert 0 < result.mAP <= 1 + 1e-12 and 0 < result.mINP <= 1
    perfect = (case.query_ids[:, None] == case.gallery_ids).astype(float)
    result = evaluate_ranking(perfect, *case[1:], rule=rule)
    assert result.cmc.tolist() == [1.0] * 20
    assert (result.mAP, result.mINP) == (1.0, 1.0)


GOOD = random_case(15)
BAD = {
    "nan": (dict(similarity=np.full((40, 60), np.nan)), "NaN or infinite"),
    "inf": (dict(similarity=np.where(np.eye(40, 60) > 0, np.inf, 0)), "NaN or infinite"),
    "vector": (dict(similarity=np.zeros(40)), r"shape \(40,\)"),
    "no_gallery": (dict(similarity=np.zeros((40, 0))), r"shape \(40, 0\)"),
    "complex": (dict(similarity=np.zeros((40, 60), complex)), "real numbers"),
    "query_ids": (dict(query_ids=np.arange(39)), r"query_ids has shape \(39,\)"),
    "gallery_ids": (dict(gallery_ids=np.arange(61)), r"gallery_ids has shape \(61,\)"),
    "float_ids": (dict(query_ids=np.arange(40.0)), "query_ids has type float64"),
    "mixed_ids": (dict(query_ids=np.array(["a"] * 40)), "both be"),
    "mixed_cameras": (dict(query_cameras=np.array(["a"] * 40)), "cameras must both be"),  # B2
    "no_cameras": (dict(query_cameras=None), "query_cameras is missing"),
    "cameras": (dict(gallery_cameras=np.arange(3)), "gallery_cameras has shape"),
    "rule": (dict(rule="market"), "'market': choose from sysu, llcm, regdb"),
    "max_rank": (dict(max_rank=0), "max_rank is 0"),
    "no_match": (dict(query_ids=np.arange(40) + 1000), "none of the 40 queries has a match"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_clear_line(name):
    change, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        evaluate_ranking(**{**GOOD._asdict(), "rule": "llcm", **change})
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors():
    case = random_case(16)
    similarity = torch.from_numpy(case.similarity)
    here, there = (
        evaluate_ranking(s, *case[1:], rule="sysu") for s in (similarity, similarity.cuda())
    )
    np.testing.assert_array_equal(here.average_precision, there.average_precision)


@pytest.mark.parametrize("rule", RULES)
def test_labels_of_any_type_give_the_same_numbers(rule):
    """B2: string cameras switched the camera rules off (0.385 for 0.411), unsigned ones raised."""
    rng = np.random.default_rng(3)
    similarity = rng.standard_normal((60, 90))
    ids, cameras = rng.integers(1, 9, (2, 90)), rng.integers(1, 7, (2, 90))
    plain = [ids[0, :60], ids[1], cameras[0, :60], cameras[1]]
    expected = evaluate_ranking(similarity, *plain, rule)
    forms = [
        lambda x: x.astype(np.uint8),
        lambda x: x.astype(np.uint64),
        lambda x: torch.tensor(x, dtype=torch.int16),
        lambda x: [str(i) for i in x],
        lambda x: np.array([f"{i:04d}" for i in x]),
        lambda x: [(i, str(i), f"0{i}", np.uint8(i))[n % 4] for n, i in enumerate(x.tolist())],
    ]
    for form in forms:
        found = evaluate_ranking(similarity, *map(form, plain), rule)
        assert (found.mAP, found.mINP) == (expected.mAP, expected.mINP)
        assert np.array_equal(found.cmc, expected.cmc)
    words = [[f"person_{i}" for i in x] for x in plain[:2]]
    assert evaluate_ranking(similarity, *words, *plain[2:], rule).mAP == expected.mAP
    cams = [[f"cam{i}" for i in x] for x in plain[2:]]
    if rule == "sysu":
        with pytest.raises(UserError, match="cameras 2 and 3"):
            evaluate_ranking(similarity, *plain[:2], *cams, rule)
    else:
        assert evaluate_ranking(similarity, *plain[:2], *cams, rule).mAP == expected.mAP


@pytest.mark.parametrize("label", [1.5, True, None, "", b"1", 2**63, "9" * 19])
def test_labels_that_are_none_are_refused(label):
    """B2"""
    with pytest.raises(UserError, match="query_ids"):
        evaluate_ranking(np.ones((1, 1)), [label], [1], rule="regdb")


@pytest.mark.parametrize(("rule", "rank"), [
    (Rule(same_camera=True, by_identity=False), 2),  # the hit is the last image, after two others
    (Rule(same_camera=True), 1),  # which show one person
    (Rule(unseen=(1, 2)), 0),
    (Rule(unseen=(2, 1), by_identity=False), 0),  # for queries of camera 2 only
])  # fmt: skip
def test_a_rule_of_ones_own(rule, rank, monkeypatch):
    monkeypatch.setitem(protocols.RULES, "mine", rule)
    scores = np.array([[0.9, 0.8, 0.7, 0.6]])
    found = evaluate_ranking(scores, [1], [1, 2, 2, 1], [1], [1, 1, 2, 2], rule="mine")
    assert found.first_rank.tolist() == [rank]
