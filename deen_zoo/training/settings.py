"""The settings of a run, with the defaults that depend on the dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.datasets import DATASETS, PROTOCOLS
from ..errors import UserError, check_least
from .recipes import Recipe, get_recipe

__all__ = ["Settings"]

MODELS = {
    "sysu": "deen_resnet50_sysu",
    "regdb": "deen_resnet50_regdb",
    "llcm": "deen_resnet50_llcm",
    "own": "deen_resnet50_llcm",
    "synthetic": "test_deen_resnet",
}
TRY_WITHOUT_DATA = "without data, try 'deen-zoo reproduce synthetic'"


@dataclass(frozen=True)
class Settings:
    """What to reproduce, and where; :meth:`create` fills in what depends on the dataset.

    Attributes:
        dataset: ``"sysu"``, ``"regdb"``, ``"llcm"``, ``"own"``, or ``"synthetic"``: a
            drawn world in LLCM's layout, made when it is not there yet.
        output: Folder of the run.
        data_root: Of the dataset.
        recipe: How to train.
        model: As :func:`deen_zoo.create_model` takes it.
        epochs: Stop after so many.
        trials: The splits to train a model each for; RegDB has ten, the others one.
        protocols: Of the dataset, to evaluate; the first one chooses the best epoch.
        cache: Folder for decoded images (see ``deen_zoo.data.cache``); None decodes every time.
        dee: Of the model: generate the two extra branches.
        mfa: Of the model: fuse the stages.
        scratch: Start a ResNet-50 from random weights, not from ImageNet's.
        identities: People in the synthetic world when it is made.
        seed: Of the weights, the batches and the augmentation.
        device: ``"auto"`` or a torch device.
        precision: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
        compile: Use ``torch.compile``.
        grad_checkpointing: Compute the maps of the first two stages again in the backward pass
            instead of keeping them: less memory, the same numbers, some more time.
        threads: Threads that decode; None is the number of available cores.
        batch_size: Images at a time in evaluation.
        save_every: Steps between saves within an epoch; None is at its end only.
        skip_broken: Leave out, counted and reported, what ``check`` finds broken or mislabelled;
            it decodes every image once to know.
        resume: Go on from where ``output`` stands.
        eval_only: Train nothing; evaluate this checkpoint folder, model name or ``hf-hub:`` id.
    """

    dataset: str
    output: Path
    data_root: Path
    recipe: Recipe
    model: str
    epochs: int
    trials: tuple[int, ...]
    protocols: tuple[str, ...]
    cache: Path | None
    dee: bool = True
    mfa: bool = True
    scratch: bool = False
    identities: int = 96
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    grad_checkpointing: bool = False
    threads: int | None = None
    batch_size: int = 64
    save_every: int | None = None
    skip_broken: bool = False
    resume: bool = False
    eval_only: str | None = None

    @classmethod
    def create(
        cls,
        dataset: str,
        output: str | os.PathLike[str],
        data_root: str | os.PathLike[str] | None = None,
        recipe: str | None = None,
        model: str | None = None,
        epochs: int | None = None,
        trials: Sequence[int] | None = None,
        protocols: Sequence[str] | None = None,
        cache: str | os.PathLike[str] | None = None,
        **others: Any,
    ) -> Settings:
        """Settings with the dataset's own defaults where None is given; ``others`` are the rest.

        Those are the model of the same name and the official recipe; for the synthetic world
        ``test_deen_resnet``, a recipe of its own, and ``OUTPUT/data`` and ``OUTPUT/cache``.

        Raises:
            UserError: No such dataset or recipe, or settings that do not go together.
        """
        if dataset not in MODELS:
            raise UserError(f"dataset {dataset!r}: choose from {', '.join(MODELS)}")
        output, synthetic = Path(output), dataset == "synthetic"
        if data_root is None and not synthetic:
            kind = DATASETS[dataset]
            given = f", which is given out on request only: {kind.ask}" if kind.ask else ""
            raise UserError(
                f"{dataset} needs --data-root, the folder of {kind.title}{given}; "
                f"{TRY_WITHOUT_DATA}"
            )
        if trials and dataset != "regdb":
            raise UserError(f"--trials chooses among RegDB's splits; {dataset} has one")
        for option, number, least in (
            ("--epochs", epochs, 1),
            ("--batch-size", others.get("batch_size"), 1),
            ("--threads", others.get("threads"), 1),
            ("--save-every", others.get("save_every"), 1),
        ):
            if number is not None:
                check_least(option, number, least)
        layout = _layout(dataset)
        known = [name for name, terms in PROTOCOLS.items() if terms.dataset == layout]
        for name in protocols or ():
            if name not in known:
                raise UserError(f"--protocols {name}: choose from {dataset}'s, {', '.join(known)}")
        chosen = get_recipe(recipe or ("synthetic" if synthetic else "official"))
        if cache is None and synthetic:
            cache = output / "cache"
        return cls(
            dataset,
            output,
            Path(data_root) if data_root is not None else output / "data",
            chosen,
            model or MODELS[dataset],
            epochs or chosen.epochs,
            tuple(trials or range(1, 11)) if dataset == "regdb" else (1,),
            tuple(protocols or known),
            None if cache is None else Path(cache),
            **others,
        )

    @property
    def layout(self) -> str:
        """Of the data on disk: the name of the dataset that it looks like."""
        return _layout(self.dataset)

    def folder(self, trial: int) -> Path:
        """Where a split's model is kept."""
        return self.output / f"trial-{trial}" if self.dataset == "regdb" else self.output


def _layout(dataset: str) -> str:
    return "llcm" if dataset == "synthetic" else dataset
