"""Recipes: the learning rate of every epoch as a table, and the rows of paper and code."""

import dataclasses

import pytest

from deen_zoo.data.transforms import TrainTransform
from deen_zoo.errors import UserError
from deen_zoo.training.recipes import RECIPES, AGWLoss, flat, get_recipe, override
from deen_zoo.training.settings import Settings

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
    assert [recipe.lr(epoch) for epoch in range(recipe.schedule.epochs)] == pytest.approx(
        TABLES[name]
    )


def reference_lr(epoch: int) -> float:
    """What the reference's function gives, written out."""
    if epoch < 10:
        return 0.1 * (epoch + 1) / 10
    return 0.1 if epoch < 20 else 0.1 * 0.1 if epoch < 80 else 0.1 * 0.01


def test_official_is_the_references_to_the_last_bit():
    recipe = get_recipe("official")
    assert all(recipe.lr(e) == pytest.approx(reference_lr(e), rel=1e-15) for e in range(151))


def test_what_paper_and_code_disagree_on():
    official, paper = (flat(get_recipe(name)) for name in ("official", "paper"))
    differ = {key: (official[key], paper[key]) for key in official if official[key] != paper[key]}
    assert differ == {
        "data.pad": (10, 0),
        "data.grayscale": (0.5, 0.0),
        "optimizer.nesterov": (True, False),
        "schedule.epochs": (151, 150),
        "schedule.decay": (((20, 0.1), (80, 0.01)), ((20, 0.1), (60, 0.01), (120, 0.001))),
        "loss.cpm_variant": ("official", "paper"),
        "loss.orthogonality": (0.01, 0.1),
        "model.dee_mean": (None, False),
        "model.mfa_softmax": (None, True),
    }
    same = ("data.identities_per_batch", "data.images_per_modality", "data.erasing")
    assert [official[key] for key in same] == [6, 4, 0.5]
    same = ("optimizer.momentum", "optimizer.weight_decay", "loss.cpm")
    assert [official[key] for key in same] == [0.9, 5e-4, 0.8]
    assert official["optimizer.clip"] is None and official["loss.cpm_margin"] == 0.2


def test_the_augmentation_of_python_is_the_official_recipes():
    transform, data = TrainTransform(), get_recipe("official").data
    for name in ("pad", "grayscale", "flip", "erasing"):
        assert getattr(transform, name) == getattr(data, name), name


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["official"].schedule.epochs = 3


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UserError, match="official, paper, synthetic"):
        get_recipe("offical")


TOML = """
base = "paper"
[optimizer]
lr = 0.05
[schedule]
decay = [[3, 0.5]]
[model]
backbone = "resnet18"
args = {drop_rate = 0.2}
"""


def test_settings_are_changed_by_options_and_files(tmp_path):
    """C14: learning rate, loss weights, image size, augmentation and backbone are settings."""
    file = tmp_path / "mine.toml"
    file.write_text(TOML)
    recipe = get_recipe(file, ["loss.orthogonality=0.3", "data.image_size=[64, 32]",
                               "optimizer.nesterov=True", "optimizer.clip=none"])  # fmt: skip
    changed = {
        "optimizer.lr": 0.05, "schedule.decay": ((3, 0.5),), "model.backbone": "resnet18",
        "model.args": {"drop_rate": 0.2}, "loss.orthogonality": 0.3, "data.image_size": (64, 32),
        "optimizer.nesterov": True,
    }  # fmt: skip
    assert flat(recipe) == flat(get_recipe("paper")) | changed
    assert recipe.name == "mine" and recipe.lr(3) == 0.05 * 4 / 10


@pytest.mark.parametrize(("change", "says"), [
    ("optimizer.learning_rate=1", "optimizer.lr"),
    ("loss.orthogonalty=1", "loss.orthogonality"),
    ("cpm=1", "loss.cpm"),
    ("optimizer.lr=fast", "optimizer.lr.*a number"),
    ("optimizer.lr=-1", "lr -1.0.*0 or more"),
    ("optimizer.nesterov=1", "true or false"),
    ("data.flip=1.5", "flip 1.5.*0 to 1"),
    ("data.identities_per_batch=1", "identities_per_batch 1.*2 or more"),
    ("data.image_size=[1,2,3]", "image_size"),
    ("loss.cpm_variant=mine", "official or paper"),
    ("schedule.decay=3", "a list"),
    ("optimizer.lr", "SECTION.NAME=VALUE"),
])  # fmt: skip
def test_a_wrong_setting_is_named_with_the_nearest_right_one(change, says):
    with pytest.raises(UserError, match=says) as error:
        get_recipe("official", [change])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["a =", "epochs = 3", "[optimizer]\nname = 1", "[loss]\ncpm = true"]
)
def test_a_wrong_file_is_one_line(tmp_path, text):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    for path in (file, tmp_path / "none.toml"):
        with pytest.raises(UserError) as error:
            get_recipe(path)
        assert "\n" not in str(error.value)


def test_python_is_held_to_the_same_types():
    with pytest.raises(UserError, match="weight_decay is 'small'"):
        dataclasses.replace(RECIPES["official"].optimizer, weight_decay="small")
    assert override(RECIPES["paper"], {"optimizer.lr": 1}).optimizer.lr == 1.0


def test_a_file_that_names_a_task_has_that_tasks_loss(tmp_path):
    """Its own settings were unknown, and without them the task refused the recipe."""
    file = tmp_path / "mine.toml"
    file.write_text(
        'task = "deen_zoo.training.tasks:AGWTask"\nloss = {triplet_variant = "squared"}'
    )
    assert get_recipe(file).loss == AGWLoss(triplet_variant="squared")


def test_changes_apply_to_a_recipe_of_python_as_well(tmp_path):
    """They were ignored."""
    settings = Settings.create(
        "synthetic", tmp_path, recipe=RECIPES["synthetic"], changes=["optimizer.lr=0.5"]
    )
    assert settings.recipe.optimizer.lr == 0.5


@pytest.mark.parametrize("task", [":Loss", ".mine:Loss", "a b:Loss", "mine", "nowhere:Loss"])
def test_a_task_that_cannot_be_imported_is_one_line(task, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'task = "{task}"')
    with pytest.raises(UserError, match="task"):
        get_recipe(file)
