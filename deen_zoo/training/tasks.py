"""Tasks: a model and the losses that train it. The loop only loops."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data.loader import TrainBatch
from ..device import autocast
from ..distributed import Distributed
from ..errors import UserError, load_object
from .losses import (
    batch_hard_triplet_loss,
    cpm_loss,
    identity_loss,
    orthogonality_loss,
    weighted_triplet_loss,
)
from .recipes import RECIPES, AGWLoss, DEENLoss, Recipe
from .sections import Section

__all__ = ["AGWTask", "DEENTask", "Task", "task_class"]


class Task(nn.Module):
    """A model and its losses; a subclass gives :meth:`losses`.

    Args:
        model: On the model contract, with a classifier of as many identities as the labels have.
        recipe: ``recipe.loss`` is an instance of the class's ``Loss``.
        precision: As for :func:`deen_zoo.device.autocast`; the losses are never below float32.
    """

    Loss: ClassVar[type[Section]] = Section

    def __init__(self, model: Any, recipe: Recipe, precision: str = "float32") -> None:
        super().__init__()
        if not isinstance(recipe.loss, self.Loss):
            fitting = [name for name, one in RECIPES.items() if isinstance(one.loss, self.Loss)]
            remedy = f"name it, --task {type(self).__module__}:{type(self).__name__}"
            if fitting:
                remedy = f"choose --recipe {', '.join(fitting)}"
            raise UserError(
                f"recipe {recipe.name} has the loss settings of another task "
                f"({type(recipe.loss).__name__}); {type(self).__name__} takes "
                f"{self.Loss.__name__}: {remedy}"
            )
        self.model: Any = model
        self.recipe, self.precision = recipe, precision
        self.loss: Any = recipe.loss
        self.world = Distributed(torch.device("cpu"))  # the processes; the loop sets it

    def features(self, batch: TrainBatch) -> dict[str, Tensor]:
        """What the model gives for a batch (``forward_train``), in float32 or above.

        Several processes compute their own images; each gets the rows of all, as the labels are.
        """
        n, world = len(batch.images), self.world
        infrared = batch.infrared[world.rank * n : (world.rank + 1) * n]
        with autocast(batch.images.device, self.precision):
            out: dict[str, Tensor] = self.model.forward_train(batch.images, infrared)
        full = {k: t if t.dtype == torch.float64 else t.float() for k, t in out.items()}
        return {name: world.gather_batch(rows, n) for name, rows in full.items()}

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Weighted terms by name, each a scalar; their sum is the loss.

        With several processes, the labels (and :meth:`features`) are those of all their images,
        ``batch.images`` only this process's.

        ``batch.labels`` (N,) and ``batch.infrared`` (N,) may be on the CPU while the images are on
        a device, which saves the device a wait. Every step must give the same names.
        """
        raise NotImplementedError

    def forward(self, images: Tensor, labels: Tensor, infrared: Tensor) -> dict[str, Tensor]:
        """:meth:`losses`, as a call that can be compiled and shared by processes."""
        everyone = self.world.gather_batch(labels), self.world.gather_batch(infrared)
        return self.losses(TrainBatch(images, *everyone))


class DEENTask(Task):
    """DEEN's loss: identity, batch-hard triplet, center-guided pair mining, orthogonality.

    Without generated branches (``dee=False``) the last two have nothing to act on and are left out.
    """

    Loss = DEENLoss
    loss: DEENLoss

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        loss, out = self.loss, self.features(batch)
        pool, n = out["pool"], len(batch.labels)  # (B*N, C), branch-major
        branches = len(pool) // n
        terms = {"identity": identity_loss(out["logits"], batch.labels)}
        if loss.triplet:
            labels = batch.labels.repeat(branches)
            triplet = batch_hard_triplet_loss(pool, labels, loss.triplet_margin)
            terms["triplet"] = loss.triplet * triplet
        if branches > 1 and loss.cpm:
            cpm = cpm_loss(
                pool[:n], pool[n:], batch.labels, batch.infrared, loss.cpm_margin,
                one_hinge=loss.cpm_variant == "paper",
            )  # fmt: skip
            terms["cpm"] = loss.cpm * cpm
        if branches > 1 and loss.orthogonality:
            terms["orthogonality"] = loss.orthogonality * orthogonality_loss(pool, branches)
        return terms


class AGWTask(Task):
    """The loss of AGW and CAJ: identity and weighted regularised triplet."""

    Loss = AGWLoss
    loss: AGWLoss

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        loss, out = self.loss, self.features(batch)
        terms = {"identity": identity_loss(out["logits"], batch.labels)}
        if loss.triplet:
            pool, labels, variant = out["pool"], batch.labels, loss.triplet_variant
            if variant == "batch-hard":
                triplet = batch_hard_triplet_loss(pool, labels, loss.triplet_margin)
            else:
                triplet = weighted_triplet_loss(pool, labels, variant == "squared")
            terms["triplet"] = loss.triplet * triplet
        return terms


def task_class(name: str | None, model: Any = None) -> type[Task]:
    """The task that is named, or else the one that the model's family names as ``model.task``."""
    name = name or getattr(model, "task", None)
    if name is None:
        return DEENTask
    found = load_object(name, "--task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"--task {name}: it is not a subclass of deen_zoo.training.tasks.Task")
    return found
