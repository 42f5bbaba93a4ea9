"""Recipes: the learning rate of every epoch as a table, and the rows of paper and code."""

import dataclasses

import pytest

from deen_zoo.errors import UserError
from deen_zoo.training.recipes import RECIPES, get_recipe

WARMUP = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1]
TABLES = {
    # the reference's adjust_learning_rate: its branch for 120 cannot be reached
    "official": WARMUP + [0.1] * 10 + [0.01] * 60 + [0.001] * 71,
    # "0.01 to 0.1 over 10 epochs, then 0.01 at 20, 0.001 at 60, 0.0001 at 120"
    "paper": WARMUP + [0.1] * 10 + [0.01] * 40 + [0.001] * 60 + [0.0001] * 30,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_learning_rate_of_every_epoch(name):
    recipe = get_recipe(name)
    assert [recipe.lr(epoch) for epoch in range(recipe.epochs)] == pytest.approx(TABLES[name])


def reference_lr(epoch: int) -> float:
    """What the reference's function gives, written out."""
    if epoch < 10:
        return 0.1 * (epoch + 1) / 10
    return 0.1 if epoch < 20 else 0.1 * 0.1 if epoch < 80 else 0.1 * 0.01


def test_official_is_the_references_to_the_last_bit():
    recipe = get_recipe("official")
    assert all(recipe.lr(e) == pytest.approx(reference_lr(e), rel=1e-15) for e in range(151))


def test_what_paper_and_code_disagree_on():
    official, paper = (dataclasses.asdict(get_recipe(name)) for name in ("official", "paper"))
    differ = {key: (official[key], paper[key]) for key in official if official[key] != paper[key]}
    assert differ == {
        "name": ("official", "paper"),
        "epochs": (151, 150),
        "pad": (10, 0),
        "grayscale": (0.5, 0.0),
        "decay": (((20, 0.1), (80, 0.01)), ((20, 0.1), (60, 0.01), (120, 0.001))),
        "nesterov": (True, False),
        "cpm_form": ("official", "paper"),
        "model_form": ("official", "paper"),
        "ort_weight": (0.01, 0.1),
    }
    same = ("identities", "images", "erasing", "momentum", "weight_decay", "cpm_weight")
    assert [official[key] for key in same] == [6, 4, 0.5, 0.9, 5e-4, 0.8]
    assert official["clip"] is None and official["cpm_margin"] == 0.2


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["official"].epochs = 3


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UserError, match="official, paper, synthetic"):
        get_recipe("offical")
