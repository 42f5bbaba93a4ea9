"""The whole pipeline: check the data, train, evaluate every protocol, write what came out.

``python -m deen_zoo.reproduce ...`` is short for ``deen-zoo reproduce ...``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from .data.cache import DecodedCache, open_cache
from .data.check import check_dataset
from .data.datasets import DATASETS, PROTOCOLS, ReidDataset, Sample, open_dataset
from .data.loading import train_loader
from .data.synthetic import synthesize
from .data.transforms import ERASING_AREA, TrainTransform
from .device import choose_device
from .distributed import World, join
from .errors import UserError
from .evaluation import ProtocolResult, evaluate, merge_trials
from .features import data_config, extract
from .models import DEEN, create_model, save_pretrained
from .recipes import Recipe, get_recipe
from .run_report import write_results
from .train import Run, Task, make_optimizer, train

__all__ = ["Settings", "reproduce"]

MODELS = {
    "sysu": "deen_resnet50_sysu",
    "regdb": "deen_resnet50_regdb",
    "llcm": "deen_resnet50_llcm",
    "synthetic": "test_deen_resnet",
}
TRY_WITHOUT_DATA = "without data, try 'deen-zoo reproduce synthetic'"


@dataclass(frozen=True)
class Settings:
    """What to reproduce, and where; :meth:`create` fills in what depends on the dataset.

    Attributes:
        dataset: ``"sysu"``, ``"regdb"``, ``"llcm"``, or ``"synthetic"``: a drawn world in LLCM's
            layout, made when it is not there yet.
        output: Folder of the run.
        data_root: Of the dataset.
        recipe: How to train.
        model: As :func:`deen_zoo.create_model` takes it.
        epochs: Stop after so many.
        trials: The splits to train a model each for; RegDB has ten, the others one.
        cache: Folder for decoded images (see ``deen_zoo.data.cache``); None decodes every time.
        dee: Of the model: generate the two extra branches.
        mfa: Of the model: fuse the stages.
        scratch: Start a ResNet-50 from random weights, not from ImageNet's.
        identities: People in the synthetic world when it is made.
        seed: Of the weights, the batches and the augmentation.
        device: ``"auto"`` or a torch device.
        precision: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
        compile: Use ``torch.compile``.
        workers: Processes that decode.
        batch_size: Images at a time in evaluation.
        save_every: Steps between saves within an epoch; None is at its end only.
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
    cache: Path | None
    dee: bool = True
    mfa: bool = True
    scratch: bool = False
    identities: int = 96
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    workers: int = 4
    batch_size: int = 64
    save_every: int | None = None
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
            raise UserError(
                f"{dataset} needs --data-root, the folder of {kind.title}, which is given out on "
                f"request only: {kind.ask}; {TRY_WITHOUT_DATA}"
            )
        if trials and dataset != "regdb":
            raise UserError(f"--trials chooses among RegDB's splits; {dataset} has one")
        if epochs is not None and epochs < 1:
            raise UserError(f"--epochs {epochs}: give 1 or more")
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
            None if cache is None else Path(cache),
            **others,
        )

    @property
    def layout(self) -> str:
        """Of the data on disk: the name of the dataset that it looks like."""
        return "llcm" if self.dataset == "synthetic" else self.dataset

    @property
    def protocols(self) -> list[str]:
        return [name for name, terms in PROTOCOLS.items() if terms.dataset == self.layout]

    def folder(self, trial: int) -> Path:
        """Where a split's model is kept."""
        return self.output / f"trial-{trial}" if self.dataset == "regdb" else self.output


def reproduce(settings: Settings, world: World | None = None) -> dict[str, Any]:
    """Check, train, evaluate, and write results.

    The output folder holds ``results.json``, ``report.md``, ``curves.png``, ``log.csv``, the
    training state ``last.safetensors``, and two checkpoint folders: ``checkpoint`` (the last
    epoch) and ``best`` (the best on the test set). RegDB has these, but for the first two, for each
    split, in ``trial-1`` and so on.

    Args:
        settings: From :meth:`Settings.create`.
        world: The processes that share the work; by default those of ``torchrun``.

    Returns:
        What ``results.json`` holds.

    Raises:
        UserError: Settings or data that cannot be used; or the loss became NaN or infinite.
        OSError: Something cannot be written.
    """
    if world is None:
        with join(choose_device(settings.device)) as world:
            return reproduce(settings, world)
    settings.output.mkdir(parents=True, exist_ok=True)
    dataset = _open_data(settings, world)
    fingerprint = dataset.fingerprint()
    models: list[dict[str, Any]] = []
    measured: dict[str, dict[str, list[ProtocolResult]]] = {"last": {}, "best": {}}
    for trial in settings.trials:
        if settings.eval_only:
            found: dict[str, tuple[str, int | None]] = {
                "last": (_checkpoint(settings, trial), None)
            }
            models.append({"trial": trial, "history": []})
        else:
            run = _train(settings, dataset, trial, fingerprint["sha256"], world)
            folder, tested = settings.folder(trial), run.best
            found = {"last": (str(folder / "checkpoint"), run.epoch - 1)}
            if tested is not None:
                found["best"] = (str(folder / "best"), tested["epoch"])
            models.append({"trial": trial, "history": run.history})
        previous: list[ProtocolResult] = []
        for which, (source, epoch) in found.items():
            if which == "last" or epoch != found["last"][1]:
                previous = _evaluate(settings, dataset, _load(source, world), trial, world)
            models[-1][which] = {"checkpoint": source, "epoch": epoch, "sha256": _sha256(source)}
            for result in previous:
                measured[which].setdefault(result.protocol, []).append(result)
    results = {
        **_provenance(settings, world),
        "data": fingerprint,
        "models": models,
        "protocols": _protocols(settings, dataset, measured),
    }
    if world.main:
        write_results(settings.output, results)
    world.barrier()
    return results


def _open_data(settings: Settings, world: World) -> ReidDataset:
    root = settings.data_root
    if settings.dataset == "synthetic" and not root.exists():
        if world.main:
            _say(world, f"drawing a synthetic world of {settings.identities} people into {root}")
            synthesize("llcm", root, identities=settings.identities)
        world.barrier()
    try:
        dataset = open_dataset(settings.layout, root)
    except UserError as error:
        raise UserError(f"{error}; {TRY_WITHOUT_DATA}") from error
    if world.main:
        report = check_dataset(settings.layout, root, decode=False)
        if not report.usable:
            fault = report.faults[0]
            raise UserError(
                f"{root} cannot be used: {len(report.faults)} faults, the first {fault.kind}, "
                f"{fault.where}: {fault.detail}; list all by 'deen-zoo check {dataset.name} {root}'"
            )
        complete = "" if report.complete else " (counts differ from the published ones)"
        images = (report.fingerprint or {}).get("images")
        _say(world, f"{root}: {images} images, usable{complete}")
    return dataset


def _train(
    settings: Settings, dataset: ReidDataset, trial: int, fingerprint: str, world: World
) -> Run:
    """Train a split's model and save the last epoch's as a checkpoint folder."""
    recipe, folder = settings.recipe, settings.folder(trial)
    config = {
        "data": fingerprint,
        "model": settings.model,
        "recipe": recipe.name,
        "seed": settings.seed,
        "trial": trial,
        "dee": settings.dee,
        "mfa": settings.mfa,
        "cpm_weight": recipe.cpm_weight,
        "ort_weight": recipe.ort_weight,
        "processes": world.size,
    }
    run = Run(folder, config)
    started = run.state_file.exists()
    if started and not settings.resume:
        raise UserError(f"{folder} holds a run: go on with --resume, or choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    samples = dataset.train(trial)
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    model = create_model(
        settings.model,
        num_classes=len({sample.identity for sample in samples}),
        dee=settings.dee,
        mfa=settings.mfa,
        pretrained_backbone=not (settings.scratch or started or settings.model.startswith("test")),
    )
    _place(model, world)
    data = data_config(model)
    size = data["input_size"][1:]
    cache = _cache(settings, dataset, size)
    area = recipe.erasing_area or ERASING_AREA[settings.layout]
    loader = train_loader(
        samples,
        size,
        TrainTransform(
            recipe.pad, recipe.grayscale, erasing=recipe.erasing, erasing_area=area,
            mean=data["mean"], std=data["std"],
        ),
        recipe.identities,
        recipe.images,
        settings.seed,
        settings.workers,
        cache,
        rank=world.rank,
        world_size=world.size,
    )  # fmt: skip
    protocol = settings.protocols[0]
    number = trial if settings.dataset == "regdb" else 0
    sides = dataset.query(protocol, number) + dataset.gallery(protocol, number)

    def test() -> dict[str, float]:
        """The reference's choice of the best epoch: one protocol, one gallery."""
        features = _extract(settings, model, sides, cache, world)
        mean = evaluate(features, sides, protocol, trials=[number]).mean
        return {"r1": mean["r1"], "mAP": mean["mAP"]}

    train(
        Task(model, recipe, settings.precision),
        make_optimizer(model, recipe),
        loader,
        run,
        world,
        settings.epochs,
        test,
        resume=settings.resume,
        compile=settings.compile,
        save_every=settings.save_every,
    )
    if world.main:
        save_pretrained(model, folder / "checkpoint")
    world.barrier()
    return run


def _checkpoint(settings: Settings, trial: int) -> str:
    """The checkpoint to evaluate on a split: ``eval_only``, or what a RegDB run has in it."""
    source = str(settings.eval_only)
    if len(settings.trials) > 1:
        folder = Path(source) / f"trial-{trial}" / "checkpoint"
        if not folder.is_dir():
            raise UserError(
                f"{folder}: there is no such folder; each split of RegDB has a model of its own: "
                "give the output folder of a run, or --trials with the one split of a checkpoint"
            )
        return str(folder)
    return source


def _load(source: str, world: World) -> DEEN:
    name = f"local-dir:{source}" if Path(source).is_dir() else source
    return _place(create_model(name, pretrained=True), world)


def _place(model: DEEN, world: World) -> DEEN:
    return model.to(world.device).to(memory_format=torch.channels_last)


def _sha256(source: str) -> str | None:
    weights = Path(source) / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None


def _cache(settings: Settings, dataset: ReidDataset, size: tuple[int, int]) -> DecodedCache | None:
    if settings.cache is None:
        return None
    paths = [sample.path for _, samples, _ in dataset.read_splits() for sample in samples]
    return open_cache(settings.cache, paths, size)


def _extract(
    settings: Settings,
    model: DEEN,
    samples: Sequence[Sample],
    cache: DecodedCache | None,
    world: World,
) -> torch.Tensor:
    return extract(
        model,
        samples,
        world,
        settings.precision,
        batch_size=settings.batch_size,
        workers=settings.workers,
        cache=cache,
        progress=True,
    )


def _evaluate(
    settings: Settings, dataset: ReidDataset, model: DEEN, trial: int, world: World
) -> list[ProtocolResult]:
    samples = dataset.test("visible", trial) + dataset.test("infrared", trial)
    cache = _cache(settings, dataset, data_config(model)["input_size"][1:])
    features = _extract(settings, model, samples, cache, world)
    trials = [trial] if settings.dataset == "regdb" else None
    return [evaluate(features, samples, name, trials=trials) for name in settings.protocols]


def _protocols(
    settings: Settings,
    dataset: ReidDataset,
    measured: dict[str, dict[str, list[ProtocolResult]]],
) -> dict[str, dict[str, Any]]:
    """Of each protocol the last epoch's result and, beside it, the best epoch's."""
    out = {}
    for name, results in measured["last"].items():
        entry = merge_trials(results).to_dict()
        if Path(dataset.root, "synthetic.json").exists():  # drawn people are not the papers'
            entry |= {"published": [], "expected_counts": {}}
        if name in measured["best"]:
            best = merge_trials(measured["best"][name])
            entry["best"] = {"mean": best.mean, "std": best.std}
        out[name] = entry
    return out


def _provenance(settings: Settings, world: World) -> dict[str, Any]:
    from . import __version__

    return {
        "dataset": settings.dataset,
        "model": settings.model,
        "dee": settings.dee,
        "mfa": settings.mfa,
        "recipe": asdict(settings.recipe),
        "epochs": settings.epochs,
        "seed": settings.seed,
        "eval_only": settings.eval_only,
        "device": world.device.type,
        "processes": world.size,
        "precision": settings.precision,
        "versions": {
            "deen_zoo": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
    }


def _say(world: World, line: str) -> None:
    if world.main:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["reproduce", *sys.argv[1:]]))
