"""Training recipes: every setting of a run but the data, the seed and the machine.

A recipe is nested, typed and frozen. Each setting is declared once, below, with its default and its
description; ``--set optimizer.lr=0.05``, TOML files, ``--help`` and the records of a run all follow
from that. Paper and official code disagree on several points: ``official`` is the default, since it
is what published follow-ups ran; ``paper`` takes the paper's number wherever it gives one.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..data.images import check_intensity
from ..errors import UserError, load_object
from .sections import Section, cast, flatten, parse, setting

__all__ = [
    "RECIPES",
    "AGWLoss",
    "DEENLoss",
    "DEENModel",
    "Recipe",
    "describe",
    "flat",
    "get_recipe",
]
__all__ += ["override"]


@dataclass(frozen=True)
class Data(Section):
    """Batches and augmentation."""

    identities_per_batch: int = setting(6, "P, identities in a batch", 2)
    images_per_modality: int = setting(4, "K, images of each identity in each modality", 1)
    image_size: tuple[int, int] | None = setting(
        None, "height and width of the images; none is the model's own", 16
    )
    augmentation: Literal["deen", "caj"] = setting(
        "deen", "caj: two views of each visible image, and channels copied to one another"
    )
    pad: int = setting(10, "pixels added on each side before a random crop", 0)
    grayscale: float = setting(0.5, "probability of dropping the colour, in both modalities", 0, 1)
    flip: float = setting(0.5, "probability of mirroring", 0, 1)
    erasing: float = setting(0.5, "probability of random erasing", 0, 1)
    erasing_area: tuple[float, float] | None = setting(
        None, "share of the image that is erased; none is the official code's for the dataset", 0, 1
    )
    intensity: str | None = setting(
        None,
        "how 16-bit images become 8-bit: full, minmax, percentile, or LOW,HIGH; none is full, or "
        "with --eval-only as the checkpoint was trained",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_intensity(self.intensity or "full")


@dataclass(frozen=True)
class Optimizer(Section):
    """SGD."""

    lr: float = setting(0.1, "learning rate of the head (BN neck, classifier) after warm-up", 0)
    backbone_lr: float = setting(0.1, "factor on the learning rate of everything but the head", 0)
    momentum: float = setting(0.9, "SGD momentum", 0, 1)
    nesterov: bool = setting(True, "Nesterov momentum")
    weight_decay: float = setting(5e-4, "weight decay of all parameters", 0)
    clip: float | None = setting(None, "greatest norm of the gradient; none does not clip", 0)


@dataclass(frozen=True)
class Schedule(Section):
    """Epochs, and the learning rate over them."""

    epochs: int = setting(151, "number of epochs; --epochs stops earlier on the same schedule", 1)
    warmup: int = setting(10, "epochs of linear warm-up", 0)
    decay: tuple[tuple[int, float], ...] = setting(
        ((20, 0.1), (80, 0.01)), "[finished epochs, factor] pairs, each in force until the next"
    )
    test_every: int = setting(1, "epochs between tests; the last epoch is always tested", 1)


@dataclass(frozen=True)
class DEENLoss(Section):
    """Terms of DEEN's loss; a weight of 0 leaves a term out."""

    triplet: float = setting(1.0, "weight of the batch-hard triplet loss", 0)
    triplet_margin: float = setting(0.3, "margin of the triplet loss", 0)
    cpm: float = setting(0.8, "weight of the center-guided pair mining loss", 0)
    cpm_margin: float = setting(0.2, "margin of the center-guided pair mining loss", 0)
    cpm_variant: Literal["official", "paper"] = setting(
        "official", "which variant of the center-guided pair mining loss"
    )
    orthogonality: float = setting(0.01, "weight of the orthogonality loss", 0)


@dataclass(frozen=True)
class AGWLoss(Section):
    """Terms of AGW's and CAJ's loss; a weight of 0 leaves a term out."""

    triplet: float = setting(1.0, "weight of the triplet loss", 0)
    triplet_variant: Literal["weighted", "squared", "batch-hard"] = setting(
        "weighted", "AGW's, CAJ's, or that of AGW's --method base"
    )
    triplet_margin: float = setting(0.3, "margin of the batch-hard triplet loss", 0)


@dataclass(frozen=True)
class Model(Section):
    """Arguments of the model; none is the model's own default."""

    backbone: str | None = setting(None, "any timm ResNet, with its weight tag")
    args: dict[str, Any] = setting({}, "other arguments of the model, as model.args.NAME")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the model's constructor."""
        named = {key: value for key, value in asdict(self).items() if key != "args"}
        return {key: value for key, value in named.items() if value is not None} | self.args


@dataclass(frozen=True)
class DEENModel(Model):
    """Arguments of DEEN; none is the model's own default."""

    dee: bool | None = setting(None, "generate DEEN's two extra branches")
    dee_mean: bool | None = setting(None, "average DEE's dilated convolutions; the paper sums them")
    mfa: bool | None = setting(None, "fuse the stages")
    mfa_softmax: bool | None = setting(None, "softmax on MFA's attention, as in the paper")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        name: As ``--recipe`` takes it, with the changes that were made to it.
        task: ``package.module:Class`` of the :class:`~deen_zoo.training.tasks.Task`; None is the
            one that the model's family names.
        data: Batches and augmentation.
        optimizer: SGD.
        schedule: Epochs and the learning rate over them.
        loss: The task's own settings: an instance of its ``Loss``.
        model: Arguments of the model, of one family where they are :class:`DEENModel`'s.
    """

    name: str
    task: str | None = None
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: Section = DEENLoss()
    model: Model = DEENModel()

    def lr(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0.

        >>> [round(RECIPES["official"].lr(e), 6) for e in (0, 9, 19, 20, 79, 80, 150)]
        [0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
        """
        schedule, lr = self.schedule, self.optimizer.lr
        if epoch < schedule.warmup:
            return lr * (epoch + 1) / schedule.warmup
        factors = [factor for start, factor in schedule.decay if epoch >= start]
        return lr * (factors[-1] if factors else 1.0)


_AGW = Recipe(  # train.py of AGW
    "agw",
    data=Data(identities_per_batch=8, grayscale=0.0, erasing=0.0),
    schedule=Schedule(epochs=81, decay=((20, 0.1), (50, 0.01)), test_every=2),
    loss=AGWLoss(),
    model=Model(),
)
_CAJ = replace(  # train_ext.py of CAJ, with the options of its README
    _AGW,
    name="caj",
    data=Data(identities_per_batch=8, augmentation="caj", erasing_area=(0.02, 0.4)),
    schedule=replace(_AGW.schedule, epochs=100),
    loss=AGWLoss(triplet_variant="squared"),
    model=Model(args={"flip": True}),
)
_SYNTHETIC = Recipe(  # from random weights, in two minutes: small batches, all at the full rate
    "synthetic",
    data=Data(identities_per_batch=8, images_per_modality=2, pad=5),
    optimizer=Optimizer(backbone_lr=1.0),
    schedule=Schedule(epochs=10, warmup=2, decay=((7, 0.1),), test_every=5),
    loss=DEENLoss(triplet=0.1, cpm=0.1),
)


def _synthetic(recipe: Recipe) -> Recipe:
    """The same method on drawn people, in batches and epochs as DEEN's recipe has them there."""
    return replace(
        _SYNTHETIC,
        name=f"{recipe.name}-synthetic",
        data=replace(recipe.data, images_per_modality=2, pad=5),
        loss=replace(recipe.loss, triplet=0.1),  # type: ignore[call-arg]
        model=recipe.model,
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("official"),
        Recipe(
            "paper",
            data=Data(pad=0, grayscale=0.0),
            optimizer=Optimizer(nesterov=False),
            schedule=Schedule(epochs=150, decay=((20, 0.1), (60, 0.01), (120, 0.001))),
            loss=DEENLoss(cpm_variant="paper", orthogonality=0.1),
            model=DEENModel(dee_mean=False, mfa_softmax=True),
        ),
        _SYNTHETIC,
        _AGW,
        _CAJ,
        _synthetic(_AGW),
        _synthetic(_CAJ),
    )
}


def get_recipe(
    name: str | os.PathLike[str] | Recipe,
    changes: Sequence[str] = (),
    loss: type[Section] | None = None,
) -> Recipe:
    """A recipe by name, or from a TOML file, with changes.

    A file has the sections of :class:`Recipe` as tables, and ``base`` at its top names the recipe
    that it changes (``official`` without one).

    Args:
        name: One of :data:`RECIPES`, a file that ends in ``.toml``, or a recipe.
        changes: ``"optimizer.lr=0.05"`` and so on, as ``--set`` takes them.
        loss: The type of ``recipe.loss``, when it is not the recipe's own; starts at its defaults.
            None is that of the task that a file names.

    Raises:
        UserError: No such recipe, file or setting; or a value that does not fit.
    """
    edits: dict[str, Any] = {}
    if isinstance(name, Recipe):
        recipe = name
    elif str(name) in RECIPES:
        recipe = RECIPES[str(name)]
    else:
        if Path(name).suffix != ".toml":
            raise UserError(f"recipe {str(name)!r}: choose from {', '.join(RECIPES)}, or FILE.toml")
        edits = flatten(_read_toml(Path(name)), 3)
        base = get_recipe(str(edits.pop("base", "official")))
        task = edits.pop("task", base.task)
        if not isinstance(task, str | None):
            raise UserError(f"recipe {name}: task is {task!r}: give package.module:Class")
        recipe = replace(base, name=Path(name).stem, task=task)
        if task and loss is None:
            loss = getattr(load_object(task, f"recipe {name}: task"), "Loss", None)
    if loss is not None and type(recipe.loss) is not loss:
        recipe = replace(recipe, loss=loss())
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--set {change}: give SECTION.NAME=VALUE, such as optimizer.lr=0.05")
        edits[key.strip()] = parse(text.strip())
    return override(recipe, edits)


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, by dotted names.

    >>> override(RECIPES["official"], {"optimizer.lr": 0.05}).lr(10)
    0.05

    Raises:
        UserError: No such setting (the message names the nearest), or a value that does not fit.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if section == "model" and name.startswith("args."):
            args = sections.setdefault("model", {}).setdefault("args", dict(recipe.model.args))
            args[name.removeprefix("args.")] = value
            continue
        part = getattr(recipe, section, None)
        kinds = get_type_hints(type(part)) if isinstance(part, Section) else {}
        if name not in kinds:
            known = list(flat(recipe))
            same = [other for other in known if other.partition(".")[2] == key]  # such as lr
            near = same or difflib.get_close_matches(key, known, 1, 0) or known
            raise UserError(f"there is no setting {key!r}: did you mean {near[0]}? "
                            f"Known are {', '.join(known)}")  # fmt: skip
        sections.setdefault(section, {})[name] = cast(key, value, kinds[name])
    try:
        changed = {name: replace(getattr(recipe, name), **new) for name, new in sections.items()}
    except UserError as error:
        raise UserError(f"recipe {recipe.name}: {error}") from error
    return replace(recipe, **changed)


def describe(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """Dotted name, value and description of every setting."""
    for section in fields(recipe):
        part = getattr(recipe, section.name)
        for item in fields(part) if isinstance(part, Section) else ():
            yield f"{section.name}.{item.name}", getattr(part, item.name), item.metadata["help"]


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return {key: value for key, value, _ in describe(recipe)}


def shown(value: Any) -> str:
    """A value as ``--set`` takes it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"recipe {path}: it cannot be read ({error})") from error
