"""The P x K sampler against a slow oracle, and what resuming and several processes rely on."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deen_zoo.data.sampler import IdentitySampler, generator
from deen_zoo.errors import UserError

from .reference import needs_official, official


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[int], list[int], int, int, int]:
    """Identities of visible and infrared images in any order, P, K and the world size."""
    names = draw(st.lists(st.integers(0, 999), min_size=1, max_size=12, unique=True))
    sides = []
    for _ in range(2):
        extra = draw(st.lists(st.sampled_from(names), max_size=30))
        sides.append(draw(st.permutations(names + extra)))
    world = draw(st.integers(1, min(3, len(names))))
    return *sides, draw(st.integers(1, len(names) // world)), draw(st.integers(1, 5)), world


@settings(max_examples=60, deadline=None)
@given(worlds(), st.integers(0, 2**31), st.integers(0, 5))
def test_every_batch_is_p_identities_with_k_images_of_each_modality(world, seed, epoch):
    visible, infrared, p, k, _ = world
    ids = visible + infrared
    sampler = IdentitySampler(visible, infrared, p, k, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == max(len(visible), len(infrared)) // (p * k) + 1
    for batch in batches:
        assert len(batch) == 2 * p * k
        images = [draw.image for draw in batch]
        assert all(i < len(visible) for i in images[: p * k])
        assert all(len(visible) <= i < len(ids) for i in images[p * k :])
        rows = [[ids[i] for i in images[at : at + k]] for at in range(0, 2 * p * k, k)]
        assert all(len(set(row)) == 1 for row in rows), "K images in a row are of one identity"
        assert rows[:p] == rows[p:], "both modalities hold the same identities in the same order"
        assert len({row[0] for row in rows[:p]}) == p, "identities of a batch are distinct"
    positions = [draw.position for batch in batches for draw in batch]
    assert positions == list(range(len(positions)))
    assert {draw.epoch for batch in batches for draw in batch} == {epoch}


def slow_batches(visible, infrared, p, k, seed, epoch):
    """The sampling rule written out, one scan of all images for every identity."""
    identities = sorted(set(visible))
    for step in range(max(len(visible), len(infrared)) // (p * k) + 1):
        rng = generator(seed, 0, epoch, step)
        chosen = [identities[i] for i in rng.choice(len(identities), size=p, replace=False)]
        batch = []
        for first, side in ((0, visible), (len(visible), infrared)):
            for identity in chosen:
                mine = [first + i for i, other in enumerate(side) if other == identity]
                batch += rng.choice(mine, size=k, replace=True).tolist()
        yield batch


@settings(max_examples=30, deadline=None)
@given(worlds(), st.integers(0, 99))
def test_batches_equal_the_slow_oracle(world, seed):
    visible, infrared, p, k, _ = world
    batches = [[draw.image for draw in batch] for batch in IdentitySampler(*world[:4], seed=seed)]
    assert batches == list(slow_batches(visible, infrared, p, k, seed, 0))


@settings(max_examples=30, deadline=None)
@given(worlds(), st.data())
def test_resuming_within_an_epoch_continues_the_uninterrupted_one(world, data):
    sampler = IdentitySampler(*world[:4], seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    step = data.draw(st.integers(0, len(sampler)))
    resumed = IdentitySampler(*world[:4], seed=3)
    resumed.set_epoch(2, start_step=step)
    assert list(resumed) == whole[step:] and len(resumed) == len(whole)
    sampler.set_epoch(3)
    assert list(sampler)[:1] != whole[:1] or len(set(world[0] + world[1])) < 3


@settings(max_examples=30, deadline=None)
@given(worlds())
def test_ranks_are_disjoint_and_together_one_process_with_a_larger_batch(world):
    visible, infrared, p, k, size = world
    ids = visible + infrared
    ranks = [list(IdentitySampler(visible, infrared, p, k, 5, r, size)) for r in range(size)]
    whole = list(IdentitySampler(visible, infrared, p * size, k, 5))
    assert all(len(rank) == len(whole) for rank in ranks)
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        identities = [{ids[draw.image] for draw in part} for part in parts]
        assert sum(map(len, identities)) == len(set().union(*identities)) == p * size
        assert sorted(sum(parts, []), key=lambda draw: draw.position) == batch


def chi_square(counts: list[int]) -> float:
    """How far counts lie from equal shares, in standard deviations of the chi-square law."""
    expected, freedom = sum(counts) / len(counts), len(counts) - 1
    return (sum((c - expected) ** 2 for c in counts) / expected - freedom) / math.sqrt(2 * freedom)


def test_identities_and_their_images_are_drawn_evenly():
    visible = [i for i in range(10) for _ in range(3 + i)]  # identity i has 3 + i images
    infrared = [i for i in range(10) for _ in range(5)]
    sampler = IdentitySampler(visible, infrared, 3, 4, seed=0)
    draws: Counter[int] = Counter()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        draws.update(draw.image for batch in sampler for draw in batch)
    counts = [[draws[i] for i, other in enumerate(visible) if other == j] for j in range(10)]
    # Identities come K at a time, and less unevenly than independent draws would.
    assert chi_square([sum(images) // 4 for images in counts]) < 4
    for images in counts:
        assert min(images) > 0 and chi_square(images) < 4
    assert chi_square([draws[len(visible) + i] for i in range(50)]) < 4


@needs_official
def test_epoch_length_and_layout_are_the_references():
    utils = official("utils")
    visible, infrared = [i % 9 for i in range(90)], [i % 9 for i in range(61)]
    positions = utils.GenIdx(visible, infrared)
    theirs = utils.IdentitySampler(visible, infrared, *positions, 4, 3, 0)
    ours = [[draw.image for draw in batch] for batch in IdentitySampler(visible, infrared, 3, 4)]
    assert len(ours) * 3 * 4 == len(theirs.index1) == len(theirs.index2)
    for step, batch in enumerate(ours):
        rows = slice(12 * step, 12 * step + 12)
        layout = [
            np.array([visible[i] for i in theirs.index1[rows]]),
            np.array([infrared[i] for i in theirs.index2[rows]]),
            np.array([visible[i] for i in batch[:12]]),
            np.array([infrared[i - len(visible)] for i in batch[12:]]),
        ]
        for one, two in (layout[:2], layout[2:]):
            assert (one == two).all() and (one.reshape(3, 4) == one.reshape(3, 4)[:, :1]).all()
            assert len(set(one)) == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (([1, 2, 3], [1, 2, 3], 6, 4), ["3 identities", "6 distinct", "identities_per_batch=3"]),
        (([1, 2, 3], [1, 2, 3], 2, 4, 0, 0, 2), ["3 identities", "4 distinct", "2 processes"]),
        (([1, 2, 3], [2, 3, 4, 5], 1, 1), ["3 identities", "1, 4, 5"]),
        ((list(range(50)), [0], 1, 1), ["49 identities", "1, 2, 3"]),
        (([], [], 1, 1), ["0 identities"]),
        (([1], [1], 0, 1), ["identities_per_batch 0"]),
        (([1], [1], 1, 1, -1), ["seed -1"]),
    ],
)
def test_mistakes_are_one_clear_line(arguments, parts):
    with pytest.raises(UserError) as error:
        IdentitySampler(*arguments)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_step_beyond_the_epoch_is_refused():
    sampler = IdentitySampler([1, 2], [1, 2], 1, 1)
    sampler.set_epoch(0, 3)
    assert list(sampler) == []
    with pytest.raises(UserError, match="has 3 steps"):
        sampler.set_epoch(0, 4)
