"""Training recipes: what the official code does, what the paper says, and a small synthetic one.

Paper and code disagree on several points, and each is a field here. ``official`` is the default,
since it is what published follow-ups ran; ``paper`` takes the paper's number wherever it gives one
and the code's elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError

__all__ = ["RECIPES", "Recipe", "get_recipe"]


@dataclass(frozen=True)
class Recipe:
    """Everything about a training run but the data, the model and the seed.

    Attributes:
        name: As ``--recipe`` takes it.
        epochs: How many; shorter runs follow the same schedule and stop early.
        identities: P, identities a batch.
        images: K, images of each identity in each modality.
        pad: Pixels added on each side before a random crop.
        grayscale: Probability of dropping the colour, in both modalities.
        erasing: Probability of random erasing.
        erasing_area: Share of the image that is erased; None for the code's value of each dataset.
        base_lr: Learning rate of the BN neck and the classifier after the warm-up.
        warmup: Epochs of linear warm-up.
        decay: (first epoch, factor) in order of epochs, each in force until the next.
        backbone_lr: Factor on the learning rate of everything but BN neck and classifier.
        momentum: Of SGD.
        nesterov: Of SGD.
        weight_decay: Of all parameters.
        clip: Greatest norm of the gradient; None is no clipping.
        triplet_weight: Of the batch-hard triplet loss.
        triplet_margin: Of its hinge.
        cpm_weight: Of the CPM loss; 0 leaves it out.
        cpm_margin: Of its hinges.
        cpm_form: ``"official"`` or ``"paper"``, see :func:`deen_zoo.training.losses.cpm_loss`.
        model_form: The same of DEE and MFA, see :class:`deen_zoo.models.DEEN`.
        ort_weight: Of the orthogonality loss; 0 leaves it out.
        test_every: Epochs between tests during training; the last epoch is always tested.
    """

    name: str
    epochs: int = 151
    identities: int = 6
    images: int = 4
    pad: int = 10
    grayscale: float = 0.5
    erasing: float = 0.5
    erasing_area: tuple[float, float] | None = None
    base_lr: float = 0.1
    warmup: int = 10
    decay: tuple[tuple[int, float], ...] = ((20, 0.1), (80, 0.01))
    backbone_lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    clip: float | None = None
    triplet_weight: float = 1.0
    triplet_margin: float = 0.3
    cpm_weight: float = 0.8
    cpm_margin: float = 0.2
    cpm_form: str = "official"
    model_form: str = "official"
    ort_weight: float = 0.01
    test_every: int = 1

    def lr(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0.

        >>> [round(RECIPES["official"].lr(e), 6) for e in (0, 9, 19, 20, 79, 80, 150)]
        [0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
        """
        if epoch < self.warmup:
            return self.base_lr * (epoch + 1) / self.warmup
        factors = [factor for start, factor in self.decay if epoch >= start]
        return self.base_lr * (factors[-1] if factors else 1.0)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("official"),
        Recipe(
            "paper",
            epochs=150,
            pad=0,
            grayscale=0.0,
            decay=((20, 0.1), (60, 0.01), (120, 0.001)),
            nesterov=False,
            cpm_form="paper",
            model_form="paper",
            ort_weight=0.1,
        ),
        Recipe(  # from random weights, in two minutes: small batches, the whole model at full rate
            "synthetic",
            epochs=10,
            identities=8,
            images=2,
            pad=5,
            warmup=2,
            decay=((7, 0.1),),
            backbone_lr=1.0,
            triplet_weight=0.1,
            cpm_weight=0.1,
            test_every=5,
        ),
    )
}


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {name!r}: choose from {', '.join(RECIPES)}")
    return RECIPES[name]
