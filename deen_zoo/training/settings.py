"""The settings of a run. Each is declared, described and turned into an option here, once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ..data.datasets import get_dataset, known_datasets, several_splits
from ..data.reader import ReidDataset
from ..device import PRECISIONS
from ..errors import UserError
from .recipes import RECIPES, Recipe, describe, get_recipe, shown
from .sections import check_range, setting

__all__ = ["EXTRACTION", "Settings", "add_options", "add_recipe_changes"]

PEOPLE = 96  # in a synthetic world that is drawn
EXTRACTION = ("device", "precision", "engine", "batch_size", "threads")  # of an extractor, too
TRY_WITHOUT_DATA = "without data, try 'deen-zoo reproduce synthetic'"


@dataclass(frozen=True)
class Settings:
    """What to run, and where. :meth:`create` fills in what depends on the dataset.

    The fields are described where they are declared, and by ``deen-zoo reproduce --help``.
    """

    dataset: str = setting(MISSING, f"{known_datasets()}; synthetic draws its own people")
    output: Path = setting(MISSING, "folder of the run (default: runs/DATASET)", metavar="FOLDER")
    data_root: Path = setting(MISSING, "folder of the dataset", metavar="FOLDER")
    recipe: Recipe = setting(
        MISSING,
        f"{', '.join(RECIPES)}, or a TOML file (default: official; synthetic has its own)",
        metavar="NAME|FILE.toml",
    )
    model: str = setting(
        MISSING, "a model by name, or package.module:function (default: the dataset's)"
    )
    epochs: int = setting(MISSING, "stop after so many epochs (default: the recipe's)", 1, type=int)
    splits: tuple[int, ...] = setting(
        MISSING, f"some of {several_splits()}", type=int, nargs="+", metavar="N"
    )
    protocols: tuple[str, ...] = setting(
        MISSING,
        "protocols of the dataset; the first one chooses the best epoch (default: all)",
        nargs="+",
        metavar="NAME",
    )
    cache: Path | None = setting(MISSING, "keep decoded images there", metavar="FOLDER")
    task: str | None = setting(
        None, "package.module:Class, the losses (default: what the model's family names)"
    )
    scratch: bool = setting(False, "start from random weights, not from ImageNet's")
    people: int | None = setting(
        None, f"people in a synthetic world that is drawn (default: {PEOPLE})", 4, type=int
    )
    seed: int = setting(0, "seed of the weights, the batches and the augmentation")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = setting(
        "auto",
        "auto is bfloat16 on a GPU that has it; int8 needs openvino and a folder of quantize",
        choices=(*PRECISIONS, "int8"),
    )
    engine: str = setting(
        "torch",
        "computes descriptors; openvino is faster on a CPU, most of all in bfloat16",
        choices=("torch", "openvino"),
    )
    compile: bool = setting(False, "use torch.compile")
    grad_checkpointing: bool = setting(
        False, "less memory and slower: compute the stages' maps twice"
    )
    threads: int | None = setting(
        None, "threads that decode (default: one per core)", 1, type=int, metavar="N"
    )
    batch_size: int = setting(64, "images at a time, when descriptors are computed", 1, type=int)
    save_every: int | None = setting(None, "save within epochs too", 1, type=int, metavar="STEPS")
    skip_broken: bool = setting(False, "leave out broken images, with a counted warning")
    resume: bool = setting(False, "continue the run in --output")
    eval_only: str | None = setting(
        None, "a checkpoint folder, model name or hf-hub: id; no training", metavar="CHECKPOINT"
    )

    @classmethod
    def create(
        cls,
        dataset: str,
        output: str | os.PathLike[str],
        data_root: str | os.PathLike[str] | None = None,
        changes: Sequence[str] = (),
        **given: Any,
    ) -> Settings:
        """Settings by the names of the fields, with the dataset's own defaults for None.

        ``recipe`` may be a name, a TOML file or a :class:`~deen_zoo.training.recipes.Recipe`;
        ``changes`` are applied to it, as ``--set`` has them.

        Raises:
            UserError: There is no such dataset, recipe or setting, or settings that do not go
                together. Nothing was done yet.
        """
        kind, output = get_dataset(dataset), Path(output)
        given = {k: v for k, v in {"data_root": data_root, **given}.items() if v is not None}
        if "data_root" not in given and not kind.synthetic:
            ask = f", which is given out on request only: {kind.ask}" if kind.ask else ""
            raise UserError(
                f"{dataset} needs --data-root, the folder of {kind.title}{ask}; {TRY_WITHOUT_DATA}"
            )
        for name, folder in (("--output", output), ("--cache", Path(given.get("cache", output)))):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{name} {folder}: it is a file; give a folder")
        splits = tuple(given.get("splits", kind.splits))
        if "splits" in given and len(kind.splits) == 1:
            raise UserError(f"--splits chooses among {several_splits()}; {dataset} has one")
        if len(set(splits)) < len(splits) or not set(splits) <= set(kind.splits):
            raise UserError(
                f"--splits {' '.join(map(str, splits))}: choose from {kind.splits[0]} to "
                f"{kind.splits[-1]}, each once"
            )
        for item in fields(cls):
            check_range(f"--{item.name.replace('_', '-')}", given.get(item.name), item)
        _check_together(kind, given)
        known = kind.protocols()
        for name in given.get("protocols", ()):
            if name not in known:
                raise UserError(f"--protocols {name}: choose from {dataset}'s, {', '.join(known)}")
        recipe = given.get("recipe", kind.default_recipe)
        task, loss = given.get("task"), None
        if task and not isinstance(recipe, Recipe):
            from .tasks import task_class

            loss = task_class(task).Loss
        recipe = get_recipe(recipe, changes, loss)
        usual = {
            "data_root": output / "data",
            "cache": output / "cache" if kind.synthetic else None,
            "model": kind.default_model,
            "epochs": recipe.schedule.epochs,
            "task": recipe.task,
            "protocols": known,
        }
        chosen = usual | given | {"recipe": recipe, "splits": splits}
        for name in ("data_root", "cache"):
            chosen[name] = chosen[name] and Path(chosen[name])
        chosen["protocols"] = tuple(chosen["protocols"])
        return cls(dataset, output, **chosen)

    @property
    def kind(self) -> type[ReidDataset]:
        """The dataset's class, which holds all its facts."""
        return get_dataset(self.dataset)

    def folder(self, split: int) -> Path:
        """Where a split's model is kept."""
        return self.output / f"split-{split}" if len(self.kind.splits) > 1 else self.output


def _check_together(kind: type[ReidDataset], given: dict[str, Any]) -> None:
    """Refuse settings that would do nothing next to the others."""
    if given.get("people") and not kind.synthetic:
        raise UserError(f"--people draws them, and {kind.name} has its own: leave it out")
    for name in ("scratch", "compile", "save_every", "epochs"):
        if given.get(name) and given.get("eval_only"):
            raise UserError(f"--{name.replace('_', '-')} is of training: not with --eval-only")
    if given.get("cache") and given.get("engine", "torch") != "torch":
        raise UserError("--cache is of the torch engine: leave it out with --engine openvino")
    engine, int8 = given.get("engine", "torch"), given.get("precision") == "int8"
    if engine != "torch" and not given.get("eval_only"):
        raise UserError(f"--engine {engine} evaluates: give it with --eval-only CHECKPOINT")
    if int8 and engine == "torch":
        raise UserError("--precision int8 is OpenVINO's: give --engine openvino --eval-only")


def add_options(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """The options of all fields of :class:`Settings` but the seed, or of the named ones."""
    for item in (item for item in fields(Settings) if not names or item.name in names):
        argument = {"help": item.metadata["help"], **item.metadata["argument"]}
        if item.name == "dataset":
            parser.add_argument(item.name, **argument)
        elif item.name != "seed":
            argument["default"] = None if item.default is MISSING else item.default
            if item.default is False:
                argument["action"] = "store_true"
            parser.add_argument(f"--{item.name.replace('_', '-')}", **argument)


def add_recipe_changes(parser: argparse.ArgumentParser) -> None:
    """``--set``, and all settings that it takes below the examples."""
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the recipe (see below); may be given again",
    )
    rows = (f"  {key}={shown(v)}\n      {about}" for key, v, about in describe(RECIPES["official"]))
    parser.epilog = f"{parser.epilog or ''}\nsettings for --set, as the official recipe has them:\n"
    parser.epilog += "\n".join(rows).replace("%", "%%")
