"""The whole pipeline: check the data, train, evaluate every protocol, write what came out."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from ..data.cache import DecodedCache, open_cache
from ..data.check import check_dataset
from ..data.datasets import PROTOCOLS, ReidDataset, Sample, open_dataset
from ..data.loader import train_loader
from ..data.transforms import ERASING_AREA, TrainTransform
from ..device import choose_device
from ..distributed import Distributed, join
from ..errors import UserError
from ..evaluation import ProtocolResult, evaluate, images_of, merge_trials
from ..features.extractor import data_config, extract
from ..models import DEEN, create_model, save_pretrained
from ..synthetic import synthesize
from .loop import Run, Task, make_optimizer, train
from .report import write_results
from .settings import TRY_WITHOUT_DATA, Settings

__all__ = ["Settings", "reproduce"]


def reproduce(settings: Settings, world: Distributed | None = None) -> dict[str, Any]:
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
        ends, history = _ends(settings, dataset, trial, fingerprint["sha256"], world)
        models.append({"trial": trial, "history": history, **ends})
        found: list[ProtocolResult] = []
        for which, end in ends.items():
            if which == "last" or end["epoch"] != ends["last"]["epoch"]:
                source = settings.output / end["checkpoint"] if history else end["checkpoint"]
                found = _evaluate(settings, dataset, _load(source, world), trial, world)
            for result in found:
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


def _open_data(settings: Settings, world: Distributed) -> ReidDataset:
    root = settings.data_root
    if settings.dataset == "synthetic" and not root.exists():
        if world.main:
            _say(world, f"drawing a synthetic world of {settings.identities} people into {root}")
            synthesize("llcm", root, identities=settings.identities)
        world.barrier()
    try:
        dataset = open_dataset(settings.layout, root, settings.skip_broken)
    except UserError as error:
        raise UserError(f"{error}; {TRY_WITHOUT_DATA}") from error
    if settings.skip_broken:
        report = check_dataset(settings.layout, root, progress=world.main)
        dataset.leave_out(fault.where for fault in report.faults if fault.kind == "unreadable")
        if report.faults:
            first = report.faults[0]
            _say(world, f"warning: {len(report.faults)} faults are left out, the first "
                        f"{first.kind}, {first.where}: {first.detail}")  # fmt: skip
    elif world.main:
        report = check_dataset(settings.layout, root, decode=False)
        if not report.usable:
            fault = report.faults[0]
            raise UserError(
                f"{root} cannot be used: {len(report.faults)} faults, the first {fault.kind}, "
                f"{fault.where}: {fault.detail}; list all by 'deen-zoo check {dataset.name} "
                f"{root}', or leave them out by --skip-broken"
            )
    if world.main:
        complete = "" if report.complete else " (counts differ from the published ones)"
        images = (report.fingerprint or {}).get("images")
        _say(world, f"{root}: {images} images, usable{complete}")
    return dataset


def _ends(
    settings: Settings, dataset: ReidDataset, trial: int, fingerprint: str, world: Distributed
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The checkpoints to evaluate on a split, "last" and "best", and the log of training."""
    if settings.eval_only:
        source = _checkpoint(settings, trial)
        return {"last": {"checkpoint": source, "epoch": None, "sha256": _sha256(source)}}, []
    run = _train(settings, dataset, trial, fingerprint, world)
    epochs = {"last": run.epoch - 1} | ({"best": run.best["epoch"]} if run.best else {})
    folders = {"last": run.folder / "checkpoint", "best": run.folder / "best"}
    ends = {
        which: {
            "checkpoint": os.path.relpath(folders[which], settings.output),
            "epoch": epoch,
            "sha256": _sha256(folders[which]),
        }
        for which, epoch in epochs.items()
    }
    return ends, run.history


def _train(
    settings: Settings, dataset: ReidDataset, trial: int, fingerprint: str, world: Distributed
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
    imagenet = not (settings.scratch or started or settings.model.startswith("test"))
    try:
        model = create_model(
            settings.model,
            num_classes=len({sample.identity for sample in samples}),
            dee=settings.dee,
            mfa=settings.mfa,
            dee_mean=recipe.model_form != "paper",
            mfa_softmax=recipe.model_form == "paper",
            pretrained_backbone=imagenet,
        )
    except UserError as error:
        if not imagenet:
            raise
        raise UserError(f"{error}; or start from random weights with --scratch") from error
    _place(model, world)
    model.set_grad_checkpointing(settings.grad_checkpointing, stages=2)  # half of the maps
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
        settings.threads,
        cache,
        rank=world.rank,
        world_size=world.size,
    )  # fmt: skip
    protocol = settings.protocols[0]
    number = trial if settings.dataset == "regdb" else PROTOCOLS[protocol].trials[0]
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


def _load(source: str | Path, world: Distributed) -> DEEN:
    name = f"local-dir:{source}" if Path(source).is_dir() else str(source)
    return _place(create_model(name, pretrained=True), world)


def _place(model: DEEN, world: Distributed) -> DEEN:
    return model.to(world.device).to(memory_format=torch.channels_last)


def _sha256(source: str | Path) -> str | None:
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
    world: Distributed,
) -> torch.Tensor:
    return extract(
        model,
        samples,
        world,
        settings.precision,
        batch_size=settings.batch_size,
        threads=settings.threads,
        cache=cache,
        progress=True,
    )


def _evaluate(
    settings: Settings, dataset: ReidDataset, model: DEEN, trial: int, world: Distributed
) -> list[ProtocolResult]:
    """Every protocol of a split; each image that any trial compares goes through the model once."""
    samples = dataset.test("visible", trial) + dataset.test("infrared", trial)
    trials = [trial] if settings.dataset == "regdb" else None
    drawn = sorted({i for name in settings.protocols for i in images_of(samples, name, trials)})
    cache = _cache(settings, dataset, data_config(model)["input_size"][1:])
    rows = _extract(settings, model, [samples[i] for i in drawn], cache, world)
    features = rows.new_zeros(len(samples), rows.shape[1])  # the others are never looked at
    features[drawn] = rows
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


def _provenance(settings: Settings, world: Distributed) -> dict[str, Any]:
    from .. import __version__

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
        "threads": torch.get_num_threads(),  # on a CPU another number rounds, and ends, differently
        "precision": settings.precision,
        "versions": {
            "deen_zoo": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
    }


def _say(world: Distributed, line: str) -> None:
    if world.main:
        print(line, file=sys.stderr, flush=True)
