"""The whole pipeline: check the data, train, evaluate every protocol, write a report."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ..data.cache import DecodedCache, open_cache
from ..data.check import check_dataset
from ..data.datasets import open_dataset
from ..data.images import Intensity, parse_intensity
from ..data.loader import train_loader
from ..data.protocols import Sample, get_protocol
from ..data.reader import ReidDataset
from ..data.transforms import ChannelTransform, TrainTransform
from ..device import choose_device, resolve_precision
from ..distributed import Distributed, join
from ..errors import UserError
from ..evaluation import ProtocolResult, evaluate, images_of, merge_trials, published
from ..evaluation.metrics import label_array
from ..features.extractor import FeatureExtractor, data_config, extract
from ..features.files import FeatureTable
from ..io import exclusive, sha256
from ..models import create_model
from ..models.base import MODALITIES, NAMES, ReidModel
from ..models.catalog import installed_splits
from ..synthetic import synthesize
from .loop import make_optimizer, train
from .report import command, write_results
from .settings import TRY_WITHOUT_DATA, Settings
from .state import Run
from .tasks import load_object, task_class

__all__ = ["Settings", "reproduce"]


def reproduce(settings: Settings, world: Distributed | None = None) -> dict[str, Any]:
    """Check, train, evaluate, and write results.

    The output folder holds ``results.json``, ``report.md``, pictures, ``log.csv``, the saved state
    in ``states``, and two checkpoint folders: ``checkpoint`` (the last epoch) and ``best`` (the
    best on the test set). RegDB has the last five for each split, in ``trial-1`` and so on.

    Args:
        settings: From :meth:`Settings.create`.
        world: The processes that share the work; by default those of ``torchrun``.

    Returns:
        The content of ``results.json``.

    Raises:
        UserError: Settings or data that cannot be used, a run that cannot be resumed with these
            settings, or a loss that became NaN or infinite.
        OSError: Something cannot be written.
    """
    if world is None:
        with join(choose_device(settings.device)) as world:
            return reproduce(settings, world)
    with ExitStack() as stack:
        world.once(lambda: _enter(stack, settings))
        _check_early(settings)
        dataset = check_data(settings, world)
        fingerprint = world.once(dataset.fingerprint)
        record = _record(settings, fingerprint, world)
        run = {"record": record, "epochs": settings.epochs, "protocols": list(settings.protocols)}
        finished = world.once(lambda: _finished(settings, run))
        if finished is not None:
            return finished
        models, measured = [], _Measured()
        for trial in settings.trials:
            if settings.eval_only:
                model = given_checkpoint(settings, dataset, trial)
            else:
                model = train_split(settings, dataset, trial, record | {"trial": trial}, world)
            models.append(model)
            evaluate_split(settings, dataset, trial, model, measured, world)
        results = {
            **_provenance(settings, world),
            "run": run,
            "drawn": dataset.drawn,
            "data": fingerprint,
            "models": models,
            "command": command(settings),
            "protocols": measured.protocols(dataset.drawn),
        }
        world.once(lambda: write_results(settings.output, results, measured.table))
    return results


def _enter(stack: ExitStack, settings: Settings) -> None:
    """Lock the output folder."""
    settings.output.mkdir(parents=True, exist_ok=True)
    stack.enter_context(exclusive(settings.output / ".lock", f"the run in {settings.output}"))


def _finished(settings: Settings, run: dict[str, Any]) -> dict[str, Any] | None:
    """The results of the very same run, if it is resumed and has nothing left to do."""
    file = settings.output / "results.json"
    if not settings.resume or settings.eval_only or not file.is_file():
        return None
    results: dict[str, Any] = json.loads(file.read_text())
    return results if results.get("run") == run else None


def _check_early(settings: Settings) -> None:
    """Refuse what would be found only after hours of work."""
    resolve_precision(choose_device(settings.device), settings.precision)
    if settings.task:
        task_class(settings.task)
    for trial in settings.trials:
        if settings.eval_only:
            _checkpoint(settings, trial)
            if Run(settings.folder(trial)).newest:
                raise UserError(f"{settings.folder(trial)} holds a run: choose another --output")
        elif not settings.resume and Run(settings.folder(trial)).newest:
            raise UserError(
                f"{settings.folder(trial)} holds a run: continue it with --resume, or choose "
                "another --output"
            )


def check_data(settings: Settings, world: Distributed) -> ReidDataset:
    """The dataset, drawn first if it is the synthetic one, and checked.

    Raises:
        UserError: It cannot be used; the message names the first fault.
    """
    root = settings.data_root
    if settings.kind.synthetic:
        world.once(lambda: _draw(settings))
    try:
        dataset = open_dataset(settings.dataset, root, settings.skip_broken)
    except UserError as error:
        raise UserError(f"{error}; {TRY_WITHOUT_DATA}") from error
    report = world.once(
        lambda: check_dataset(settings.dataset, root, decode=settings.skip_broken, progress=True)
    )
    if settings.skip_broken:
        dataset.leave_out(fault.where for fault in report.faults if fault.kind == "unreadable")
        if report.faults:
            first = report.faults[0]
            _say(world, f"warning: {len(report.faults)} faults are left out, the first "
                        f"{first.kind}, {first.where}: {first.detail}")  # fmt: skip
    elif not report.usable:
        fault = report.faults[0]
        raise UserError(
            f"{root} cannot be used: {len(report.faults)} faults, the first {fault.kind}, "
            f"{fault.where}: {fault.detail}; list all with 'deen-zoo check {dataset.name} "
            f"{root}', or leave them out with --skip-broken"
        )
    complete = "" if report.complete else " (counts differ from the published ones)"
    images = (report.fingerprint or {}).get("images")
    _say(world, f"{root}: {images} images, usable{complete}")
    return dataset


def _draw(settings: Settings) -> None:
    """Draw the people, unless they are there; a tree that 0.1.0 left half drawn is drawn again.

    Raises:
        UserError: Other files are in that folder, which are left alone.
    """
    root = settings.data_root
    if (root / ".unfinished").exists():  # 0.1.0 drew in it
        shutil.rmtree(root)
    if (root / "synthetic.json").exists():
        return
    if root.exists() and any(root.iterdir()):
        raise UserError(
            f"{root} holds other files than a whole tree of drawn people: choose another --output, "
            "or remove that folder"
        )
    print(f"drawing {settings.people} synthetic people into {root}", file=sys.stderr)
    synthesize(settings.kind.layout, root, identities=settings.people)


def train_split(
    settings: Settings,
    dataset: ReidDataset,
    trial: int,
    record: dict[str, Any],
    world: Distributed,
) -> dict[str, Any]:
    """Train a split's model and write its checkpoint folders: its entry in ``results.json``."""
    recipe, folder = settings.recipe, settings.folder(trial)
    samples = dataset.train(trial)
    run = Run(folder, record, _trained_on(settings, samples, trial))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(settings.seed)
    model = _build(settings, len({sample.identity for sample in samples}))
    if not world.main:
        torch.manual_seed(settings.seed + world.rank)  # its own dropout
    model.to(world.device).to(memory_format=torch.channels_last)
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True, stages=2)  # half of the maps
    data = data_config(model)
    size = data["input_size"][1:]
    intensity = _intensity(settings)
    cache = _cache(settings, dataset, size, intensity)
    loader = train_loader(
        samples,
        size,
        (ChannelTransform if recipe.data.augmentation == "caj" else TrainTransform)(
            recipe.data.pad,
            recipe.data.grayscale,
            recipe.data.flip,
            recipe.data.erasing,
            recipe.data.erasing_area or settings.kind.erasing_area,
            data["mean"],
            data["std"],
        ),
        recipe.data.identities_per_batch,
        recipe.data.images_per_modality,
        settings.seed,
        settings.threads,
        cache,
        rank=world.rank,
        world_size=world.size,
        intensity=intensity,
    )
    protocol = settings.protocols[0]
    row = get_protocol(protocol)
    number = row.trials[0] if row.sampled else trial  # a gallery's draw, or the split
    sides = dataset.query(protocol, number) + dataset.gallery(protocol, number)

    def test() -> dict[str, float]:
        """As the reference chooses the best epoch: one protocol, one gallery."""
        features = _extract(settings, model, sides, cache, intensity, world)
        mean = evaluate(features, sides, protocol, trials=[number]).mean
        return {"r1": mean["r1"], "mAP": mean["mAP"]}

    train(
        task_class(settings.task, model)(model, recipe, settings.precision),
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
    return world.once(lambda: _write_checkpoints(settings, model, run, trial))


def _write_checkpoints(settings: Settings, model: Any, run: Run, trial: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"trial": trial, "history": run.history}
    run.write_checkpoint(model, run.folder / "checkpoint")
    epochs = {"last": (run.epoch, run.folder / "checkpoint")}
    if run.best:
        run.publish_best()
        epochs["best"] = run.best["epoch"], run.folder / "best"
    for which, (epoch, folder) in epochs.items():
        entry[which] = {
            "checkpoint": os.path.relpath(folder, settings.output),
            "epoch": epoch,
            "sha256": sha256(folder / "model.safetensors"),
        }
    return entry


def _trained_on(settings: Settings, samples: Sequence[Sample], split: int) -> dict[str, Any]:
    identities = {str(sample.identity) for sample in samples}
    return {
        "dataset": settings.dataset,
        "split": split,
        "seed": settings.seed,
        "intensity": settings.recipe.data.intensity or "full",
        "identities": len(identities),
        "identities_sha256": _digest(identities),
    }


def _digest(identities: Iterable[object]) -> str:
    names = "\n".join(sorted({str(identity) for identity in identities}))
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def _intensity(settings: Settings, trained: dict[str, Any] | None = None) -> Intensity:
    """How 16-bit images become 8-bit: by the recipe, or else as a checkpoint was trained."""
    return parse_intensity(
        settings.recipe.data.intensity or str((trained or {}).get("intensity", "full"))
    )


def _trained_with(source: str | Path, model: Any = None) -> dict[str, Any]:
    """What a checkpoint says of its training: source, dataset, split, intensity, ..."""
    file = Path(source) / "config.json"
    own = json.loads(file.read_text()).get("deen_zoo", {}) if file.is_file() else {}
    found = own.get("trained_on") or getattr(model, "trained_on", None)
    return found if isinstance(found, dict) else {}


def _refuse_known_people(
    dataset: ReidDataset, split: int, source: str | Path, model: Any = None
) -> None:
    """Raise a UserError if a checkpoint was trained on people whom the split tests.

    A folder says so before it is loaded; installed weights and those of the Hub when they are.
    """
    trained = _trained_with(source, model)
    if trained.get("dataset") != dataset.name or trained.get("split") == split:
        return
    tested = {sample.identity for kind in MODALITIES for sample in dataset.test(kind, split)}
    for other in dataset.splits:
        people = {sample.identity for sample in dataset.train(other)}
        same = trained.get("identities_sha256", _digest(people)) == _digest(people)
        if other == trained.get("split") and same and people & tested:
            raise UserError(
                f"{source} was trained on split {other} of {dataset.title}, and "
                f"{len(people & tested)} of those people are in the test set of split {split}: "
                f"evaluate it with --trials {other}"
            )


def given_checkpoint(settings: Settings, dataset: ReidDataset, trial: int) -> dict[str, Any]:
    """The entry in ``results.json`` of weights that were not trained here."""
    source = _checkpoint(settings, trial)
    _refuse_known_people(dataset, trial, source)
    weights = Path(source) / "model.safetensors"
    digest = sha256(weights) if weights.is_file() else None
    last = {"checkpoint": source, "epoch": None, "sha256": digest}
    return {"trial": trial, "history": [], "last": last}


def _checkpoint(settings: Settings, trial: int) -> str:
    """The checkpoint to evaluate on a split: ``eval_only``, or what is of that split in it.

    A run on RegDB holds a checkpoint of each split; installed weights may be of several.
    """
    source = str(settings.eval_only)
    splits = installed_splits(source)
    if splits:
        if trial not in splits:
            have = " ".join(map(str, splits))
            raise UserError(
                f"{source}: no weights of split {trial} are installed: install them with "
                f"'deen-zoo convert FILE --install', or evaluate those there are, --trials {have}"
            )
        return str(splits[trial])
    if len(settings.trials) > 1:
        folder = Path(source) / f"trial-{trial}" / "checkpoint"
        if not folder.is_dir():
            raise UserError(
                f"{folder}: there is no such folder; each split of RegDB has a model of its own: "
                "give the output folder of a run, or --trials with the one split of a checkpoint"
            )
        return str(folder)
    return source


def _build(settings: Settings, num_classes: int) -> Any:
    """The model, before training or loading."""
    arguments, size = settings.recipe.model.arguments, settings.recipe.data.image_size
    name, build = settings.model, _own_function(settings)
    if build is not None:
        if size:
            arguments["image_size"] = size
        model = build(num_classes=num_classes, **arguments)
        if not isinstance(model, ReidModel):
            raise UserError(
                f"--model {name} gave a {type(model).__name__}: give a subclass of "
                "deen_zoo.models.ReidModel, such as PlainModel around a timm backbone"
            )
        return model
    if size:
        arguments["pretrained_cfg_overlay"] = {"input_size": (3, *size)}
    imagenet = not (settings.scratch or name.startswith("test"))
    if ":" not in name:
        arguments["pretrained_backbone"] = imagenet
    try:
        return create_model(name.rpartition(":")[2], num_classes=num_classes, **arguments)
    except TypeError as error:
        raise UserError(f"--model {name}: {error}; see recipe.model") from error
    except UserError as error:
        if not imagenet:
            raise
        raise UserError(f"{error}; or start from random weights with --scratch") from error


def _own_function(settings: Settings) -> Any:
    """What ``--model module:function`` names, unless it is registered as a model by its name."""
    if ":" not in settings.model:
        return None
    function = load_object(settings.model, "--model")
    return None if getattr(function, "__name__", "") in NAMES else function


def _load(settings: Settings, source: str | Path, world: Distributed) -> Any:
    """The model of a checkpoint; one's own function builds it again, with the weights as saved."""
    if Path(source).is_dir() and _own_function(settings) is not None:
        config = json.loads((Path(source) / "config.json").read_text())
        model = _build(settings, config["num_classes"])
        model.load_state_dict(load_file(Path(source) / "model.safetensors"))
    else:
        name = f"local-dir:{source}" if Path(source).is_dir() else str(source)
        model = create_model(name, pretrained=True)
    return model.to(world.device).to(memory_format=torch.channels_last)


def _cache(
    settings: Settings, dataset: ReidDataset, size: tuple[int, int], intensity: Intensity
) -> DecodedCache | None:
    if settings.cache is None:
        return None
    paths = [sample.path for _, samples, _ in dataset.read_splits() for sample in samples]
    return open_cache(settings.cache, paths, size, intensity=intensity)


def _extract(
    settings: Settings,
    model: Any,
    samples: Sequence[Sample],
    cache: DecodedCache | None,
    intensity: Intensity,
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
        intensity=intensity,
    )


class _Measured:
    """Results of all splits, by epoch ("last" or "best") and protocol."""

    source: str | None = None  # of converted weights, in the catalog
    method: str = ""  # as published.json names it
    descriptor: str = ""
    table: FeatureTable | None = None  # the first split's descriptors, for the pictures

    def __init__(self) -> None:
        self.results: dict[str, dict[str, list[ProtocolResult]]] = {"last": {}, "best": {}}

    def add(self, which: str, results: Sequence[ProtocolResult]) -> None:
        for result in results:
            self.results[which].setdefault(result.protocol, []).append(result)

    def protocols(self, drawn: bool) -> dict[str, dict[str, Any]]:
        """Of each protocol the last epoch's result and, with it, the best epoch's."""
        out = {}
        for name, results in self.results["last"].items():
            entry = merge_trials(results).to_dict()
            entry["chance"] = _chance(results)
            if self.source:  # what its own source reports
                entry["published"] = published(name, weights=self.source)
            elif self.method:
                entry["published"] = published(name, self.method)
            entry["descriptor"] = self.descriptor
            if drawn:
                entry |= {"published": [], "expected_counts": {}}
            if name in self.results["best"]:
                best = merge_trials(self.results["best"][name])
                entry["best"] = {"mean": best.mean, "std": best.std}
            out[name] = entry
        return out


def _chance(results: Sequence[ProtocolResult]) -> float:
    """Rank-1 of a random ranking: the share of the gallery that shows the query's person."""
    shares = []
    for trial in (trial for result in results for trial in result.trials):
        people = Counter(sample.identity for sample in trial.gallery)
        shares += [people[query.identity] / len(trial.gallery) for query in trial.queries]
    return float(np.mean(shares))


def evaluate_split(
    settings: Settings,
    dataset: ReidDataset,
    trial: int,
    entry: dict[str, Any],
    measured: _Measured,
    world: Distributed,
) -> None:
    """Run every protocol with a split's last and best epoch."""
    found: list[ProtocolResult] = []
    for which in ("last", "best"):
        if which not in entry:
            continue
        end = entry[which]
        if which == "last" or end["epoch"] != entry["last"]["epoch"]:
            source = settings.output / end["checkpoint"] if entry["history"] else end["checkpoint"]
            model = _load(settings, source, world)
            if not entry["history"]:
                _refuse_known_people(dataset, trial, source, model)
            found, table = _evaluate(settings, dataset, source, model, trial, world)
            measured.table = measured.table or table
            trained = _trained_with(source, model)
            measured.source = trained.get("source")
            measured.method = type(model).__name__
            measured.descriptor = "image and mirrored image" if model.flip else "image alone"
            intensity = _intensity(settings, trained)
            if intensity != "full":
                measured.descriptor += f", 16-bit images scaled by {intensity}"
        measured.add(which, found)


def _evaluate(
    settings: Settings,
    dataset: ReidDataset,
    source: str | Path,
    model: Any,
    trial: int,
    world: Distributed,
) -> tuple[list[ProtocolResult], FeatureTable]:
    """Every protocol of a split; each image that any trial compares goes through the model once."""
    samples = dataset.test("visible", trial) + dataset.test("infrared", trial)
    trials = {name: None if get_protocol(name).sampled else [trial] for name in settings.protocols}
    drawn = sorted({i for name in trials for i in images_of(samples, name, trials[name])})
    intensity = _intensity(settings, _trained_with(source, model))
    cache = _cache(settings, dataset, data_config(model)["input_size"][1:], intensity)
    used = [samples[i] for i in drawn]
    if settings.engine == "torch":
        rows = _extract(settings, model, used, cache, intensity, world)
    else:  # every process computes all rows
        rows = FeatureExtractor(
            source if settings.precision == "int8" else model,
            precision=settings.precision, engine=settings.engine, normalize=False,
            intensity=intensity, threads=settings.threads, progress=world.main,
        )(used)  # fmt: skip
    features = rows.new_zeros(len(samples), rows.shape[1])  # the others are never looked at
    features[drawn] = rows
    results = [evaluate(features, samples, name, trials=trials[name]) for name in trials]
    labels = {
        "identity": label_array([sample.identity for sample in used]),
        "camera": label_array([sample.camera for sample in used]),
        "infrared": np.array([sample.modality == "infrared" for sample in used]),
    }
    paths = [sample.path for sample in used]
    return results, FeatureTable(dataset.root, F.normalize(rows), paths, labels)


def _record(settings: Settings, fingerprint: dict[str, Any], world: Distributed) -> dict[str, Any]:
    """Everything that changes the numbers of a run, but the number of epochs."""
    provenance = _provenance(settings, world)
    recipe = provenance.pop("recipe")
    recipe.pop("name")
    recipe["schedule"].pop("epochs")
    for key in ("epochs", "eval_only"):
        provenance.pop(key)
    provenance["versions"].pop("python")
    data = {key: fingerprint[key] for key in ("images", "sha256", "content") if key in fingerprint}
    first = settings.protocols[0]
    return {**provenance, "recipe": recipe, "data": data, "protocol": first}


def _provenance(settings: Settings, world: Distributed) -> dict[str, Any]:
    from .. import __version__

    return {
        "dataset": settings.dataset,
        "model": settings.model,
        "task": settings.task,
        "scratch": settings.scratch,
        "recipe": json.loads(json.dumps(asdict(settings.recipe))),
        "epochs": settings.epochs,
        "seed": settings.seed,
        "eval_only": settings.eval_only,
        "device": world.device.type,
        "processes": world.size,
        "threads": torch.get_num_threads(),  # on a CPU another number rounds, and ends, differently
        "engine": settings.engine,
        "precision": settings.precision
        if settings.engine != "torch"
        else resolve_precision(world.device, settings.precision),
        "compile": settings.compile,
        "versions": {
            "deen_zoo": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }


def _say(world: Distributed, line: str) -> None:
    if world.main:
        print(line, file=sys.stderr, flush=True)
