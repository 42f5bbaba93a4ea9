"""The whole pipeline: check the data, train, evaluate every protocol, write a report."""

from __future__ import annotations

import json
import os
import platform
import random
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.cache import open_cache
from ..data.check import check_dataset
from ..data.datasets import open_dataset
from ..data.images import check_intensity
from ..data.loader import TrainLoader
from ..data.protocols import Sample, get_protocol
from ..data.reader import DRAWN, ReidDataset
from ..data.transforms import TRANSFORMS, TrainTransform
from ..device import choose_device, resolve_precision
from ..distributed import Distributed, join
from ..errors import UserError, load_object, plural
from ..evaluation import ProtocolResult, evaluate, images_of, merge_trials
from ..evaluation.known import people_digest, refuse_known_people
from ..features.extractor import FeatureExtractor, data_config, extract, weights_sha256
from ..features.files import FeatureTable, label_column
from ..io import exclusive, read_object, sha256
from ..models import create_model, open_model
from ..models.base import NAMES, ReidModel
from ..models.catalog import installed_splits
from ..models.pretrained import WEIGHTS, load_weights, read_config
from ..synthetic import synthesize
from .loop import make_optimizer, train
from .report import command, write_results
from .settings import PEOPLE, TRY_WITHOUT_DATA, Settings
from .state import Run
from .tasks import task_class

__all__ = ["Settings", "reproduce"]

Results = dict[str, list[ProtocolResult]]


def reproduce(settings: Settings, world: Distributed | None = None) -> dict[str, Any]:
    """Check, train, evaluate, and write results.

    The output folder holds ``results.json``, ``report.md``, pictures, ``log.csv``, the saved state
    in ``states``, and two checkpoint folders: ``checkpoint`` (the last epoch) and ``best`` (the
    best on the test set). Each of several splits has the last five in ``split-1`` and so on.

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
        lock = exclusive(settings.output / ".lock", f"the run in {settings.output}")
        world.once(lambda: stack.enter_context(lock))
        check_early(settings)
        dataset = _check_data(settings, world)
        _check_matches(settings, dataset)
        fingerprint = world.once(dataset.fingerprint)
        record = _record(settings, fingerprint, world)
        run = {
            "record": record,
            "splits": list(settings.splits),
            "epochs": settings.epochs,
            "protocols": list(settings.protocols),
        }
        finished = world.once(lambda: _finished(settings, run))
        if finished is not None:
            return finished
        if settings.resume and not settings.eval_only:
            world.once(lambda: _check_states(settings, record))
        models, work = [], _Work(settings, dataset, world)
        for split in settings.splits:
            entry = work.given(split) if settings.eval_only else work.train(split, record)
            models.append(entry)
            work.evaluate(entry)
        results = {
            **_provenance(settings, world),
            "model": work.facts.get("model", settings.model),
            "run": run,
            "drawn": dataset.drawn,
            "data": fingerprint,
            "models": models,
            "command": command(settings),
            "protocols": work.protocols(),
        }
        world.once(lambda: write_results(settings.output, results, work.table))
    return results


def _finished(settings: Settings, run: dict[str, Any]) -> dict[str, Any] | None:
    """The results of the very same run, if it is resumed and has nothing left to do."""
    file = settings.output / "results.json"
    if not settings.resume or settings.eval_only or not file.is_file():
        return None
    results = read_object(file)
    return results if results.get("run") == run else None


def _check_states(settings: Settings, record: dict[str, Any]) -> None:
    """Refuse to resume any of the splits with other settings, before one of them is trained."""
    for split in settings.splits:
        Run(settings.folder(split), record | {"split": split}).check(settings.epochs)


def check_early(settings: Settings) -> None:
    """Refuse what would be found only after hours of work."""
    device = choose_device(settings.device)
    if settings.engine == "torch":
        resolve_precision(device, settings.precision)
    if settings.task:
        task_class(settings.task)
    file = settings.output / "results.json"
    if settings.eval_only and file.is_file():
        other = read_object(file).get("eval_only")
        if other != settings.eval_only:
            raise UserError(f"{file} is of {other}: choose another --output")
    for split in settings.splits:
        if settings.eval_only:
            _checkpoint(settings, split)
            if Run(settings.folder(split)).newest:
                raise UserError(f"{settings.folder(split)} holds a run: choose another --output")
        elif not settings.resume and Run(settings.folder(split)).newest:
            raise UserError(
                f"{settings.folder(split)} holds a run: continue it with --resume, or choose "
                "another --output"
            )


def _check_data(settings: Settings, world: Distributed) -> ReidDataset:
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
    faults = plural(len(report.faults), "fault")
    first = ", ".join(report.faults[0][:2]) + f": {report.faults[0][2]}" if report.faults else ""
    if settings.skip_broken:
        dataset.leave_out(fault.where for fault in report.faults if fault.kind == "unreadable")
        if first:
            _say(world, f"warning: {faults} left out, the first {first}")
    elif first:
        raise UserError(
            f"{root} cannot be used: {faults}, the first {first}; list all with 'deen-zoo check "
            f"{dataset.name} {root}', or leave them out with --skip-broken"
        )
    complete = "" if report.complete else " (counts differ from the published ones)"
    images = (report.fingerprint or {}).get("images", 0)
    _say(world, f"{root}: {plural(images, 'image')}, usable{complete}")
    return dataset


def _check_matches(settings: Settings, dataset: ReidDataset) -> None:
    """Refuse a test set in which nobody is on both sides, before hours of training."""
    for split in settings.splits:
        for name in settings.protocols:
            number = get_protocol(name).trials_of(split)[0]
            sides = dataset.query(name, number), dataset.gallery(name, number)
            people = [{sample.identity for sample in side} for side in sides]
            if people[0].isdisjoint(people[1]):
                raise UserError(
                    f"{settings.data_root}: none of the {len(people[0])} people among the queries "
                    f"of {name} is in the gallery: test on people with visible and infrared images"
                )


def _draw(settings: Settings) -> None:
    """Draw the people, unless they are there.

    Raises:
        UserError: Other files are in that folder, which are left alone, or another number of people
            than was asked for.
    """
    root, note = settings.data_root, settings.data_root / DRAWN
    if note.exists():
        there, asked = read_object(note).get("identities"), settings.people
        if asked is not None and there not in (None, asked):
            raise UserError(
                f"--people {asked}: {root} holds {there} drawn people: leave --people out to take "
                "them, or choose another --output or --data-root"
            )
        return
    if root.exists() and any(root.iterdir()):
        raise UserError(
            f"{root} holds other files than a whole tree of drawn people: choose another --output, "
            "or remove that folder"
        )
    people = settings.people or PEOPLE
    print(f"drawing {people} synthetic people into {root}", file=sys.stderr)
    synthesize(settings.kind.layout, root, people=people)


class _Work:
    """Trains and evaluates the splits of a dataset, and keeps what was measured.

    Attributes:
        table: The first split's descriptors, for the pictures.
        facts: What is said of each protocol: the descriptor, and whose published numbers are shown.
        results: Results of all splits, by epoch ("last" or "best") and protocol.
    """

    def __init__(self, settings: Settings, dataset: ReidDataset, world: Distributed) -> None:
        self.settings, self.dataset, self.world = settings, dataset, world
        self.table: FeatureTable | None = None
        self.facts: dict[str, str] = {}
        self.results: dict[str, Results] = {"last": {}, "best": {}}

    def train(self, split: int, record: dict[str, Any]) -> dict[str, Any]:
        """Train a split's model and write its checkpoint folders: its entry in results.json."""
        settings, world, recipe = self.settings, self.world, self.settings.recipe
        samples = self.dataset.train(split)
        people = {sample.identity for sample in samples}
        trained_on = {
            "dataset": self.dataset.name,
            **({"drawn": True} if self.dataset.drawn else {}),
            "split": split,
            "seed": settings.seed,
            "intensity": recipe.data.intensity or "full",
            "identities": len(people),
            "identities_sha256": people_digest(people),
        }
        run = Run(settings.folder(split), record | {"split": split}, trained_on)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(settings.seed)
        model = _build(settings, len(people))
        if not world.main:
            torch.manual_seed(settings.seed + world.rank)  # its own dropout
        model.to(world.device).to(memory_format=torch.channels_last)
        if settings.grad_checkpointing:
            model.set_grad_checkpointing()
        options = self.reading(model, trained_on)
        loader = TrainLoader(
            samples,
            data_config(model)["input_size"][1:],
            self.transform(model),
            recipe.data.identities_per_batch,
            recipe.data.images_per_modality,
            settings.seed,
            rank=world.rank,
            world_size=world.size,
            **options,
        )
        which = f" of split {split}" if len(settings.kind.splits) > 1 else ""
        epochs, steps = plural(settings.epochs, "epoch"), plural(len(loader), "step")
        _say(world, f"training{which}: {epochs} of {steps} on {world.device}")
        protocol = settings.protocols[0]
        number = get_protocol(protocol).trials_of(split)[0]
        sides = self.dataset.query(protocol, number) + self.dataset.gallery(protocol, number)

        def test() -> dict[str, float]:
            """As the reference chooses the best epoch: one protocol, one gallery."""
            features = self.extract(model, sides, options)
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
        return world.once(lambda: self.checkpoints(model, run, split))

    def transform(self, model: Any) -> TrainTransform:
        """The recipe's augmentation, normalised as the model has it."""
        data, config = self.settings.recipe.data, data_config(model)
        same = {name: getattr(data, name) for name in ("pad", "grayscale", "flip", "erasing")}
        area = data.erasing_area or self.settings.kind.erasing_area
        return TRANSFORMS[data.augmentation](
            **same, erasing_area=area, mean=config["mean"], std=config["std"]
        )

    def checkpoints(self, model: Any, run: Run, split: int) -> dict[str, Any]:
        """Write the checkpoint folders of the last and the best epoch."""
        entry: dict[str, Any] = {"split": split, "history": run.history}
        self.forget(run.folder / "checkpoint", weights_sha256(model))
        run.write_checkpoint(model, run.folder / "checkpoint")
        epochs = {"last": (run.epoch, run.folder / "checkpoint")}
        if run.best and run.newest:
            self.forget(run.folder / "best", sha256(run.newest / "best" / WEIGHTS))
            run.publish_best()
            epochs["best"] = run.best["epoch"], run.folder / "best"
        for which, (epoch, folder) in epochs.items():
            entry[which] = {
                "checkpoint": os.path.relpath(folder, self.settings.output),
                "epoch": epoch,
                "sha256": sha256(folder / WEIGHTS),
            }
        return entry

    def forget(self, folder: Path, digest: str) -> None:
        """Remove the results of the weights in a folder that others are about to replace: a kill
        must not leave them next to weights that they do not speak of."""
        old, results = folder / WEIGHTS, self.settings.output / "results.json"
        before = sha256(old) if old.is_file() else digest
        if before != digest and results.is_file() and before.encode() in results.read_bytes():
            for name in ("results.json", "report.md"):
                (self.settings.output / name).unlink(missing_ok=True)

    def given(self, split: int) -> dict[str, Any]:
        """The entry in results.json of weights that were not trained here."""
        source = _checkpoint(self.settings, split)
        self.refuse_known(source, split)
        weights = Path(source) / WEIGHTS
        digest = sha256(weights) if weights.is_file() else None
        last = {"checkpoint": source, "epoch": None, "sha256": digest}
        return {"split": split, "history": [], "last": last}

    def refuse_known(self, source: str | Path, split: int, model: Any = None) -> None:
        """Refuse weights that were trained on people whom the split tests.

        A folder says so before it is loaded; installed weights and those of the Hub when they are.
        """
        data = self.dataset
        tested = {sample.identity for sample in data.test(split=split)}
        trained_on = _trained_on(source, model)
        refuse_known_people(trained_on, source, type(data), split, tested, data)

    def evaluate(self, entry: dict[str, Any]) -> None:
        """Run every protocol with a split's last and best epoch."""
        split, trained_here = entry["split"], bool(entry["history"])
        found: list[ProtocolResult] = []
        for which in (which for which in self.results if which in entry):
            end = entry[which]
            if which == "last" or end["epoch"] != entry["last"]["epoch"]:
                source: str | Path = end["checkpoint"]
                source = self.settings.output / source if trained_here else source
                model = self.load(source)
                if not trained_here:
                    self.refuse_known(source, split, model)
                    end["sha256"] = end["sha256"] or _digest(model)
                found = self.measure(source, model, split)
            for result in found:
                self.results[which].setdefault(result.protocol, []).append(result)

    def measure(self, source: str | Path, model: Any, split: int) -> list[ProtocolResult]:
        """Every protocol of a split; each image that any trial compares is described once."""
        settings, data = self.settings, self.dataset
        samples = data.test(split=split)
        trials = {name: get_protocol(name).trials_of(split) for name in settings.protocols}
        drawn = sorted({i for name in trials for i in images_of(samples, name, trials[name])})
        used = [samples[i] for i in drawn]
        trained_on = _trained_on(source, model)
        options = self.reading(model, trained_on)
        if settings.engine == "torch":
            rows = self.extract(model, used, options)
        else:  # every process computes all rows
            del options["cache"]
            rows = FeatureExtractor(
                source if settings.precision == "int8" else model,
                precision=settings.precision, engine=settings.engine, normalize=False,
                progress=self.world.main, **options,
            )(used)  # fmt: skip
        labels = {
            "identity": label_column([sample.identity for sample in used]),
            "camera": label_column([sample.camera for sample in used]),
            "infrared": np.array([sample.modality == "infrared" for sample in used]),
        }
        paths = [sample.path for sample in used]
        made = {"intensity": str(options["intensity"])}
        self.table = self.table or FeatureTable(data.root, F.normalize(rows), paths, labels, made)
        descriptor = "image and mirrored image" if model.flip else "image alone"
        if options["intensity"] != "full":
            descriptor += f", 16-bit images scaled by {options['intensity']}"
        self.facts = {
            "descriptor": descriptor,
            "source": str(trained_on.get("source", "")),  # of converted weights, in the catalog
            "method": model.method,
        }
        if settings.eval_only and _own_function(settings) is None:
            self.facts["model"] = model.pretrained_cfg["architecture"]
        features = rows.new_zeros(len(samples), rows.shape[1])  # the others are never looked at
        features[drawn] = rows
        return [evaluate(features, samples, name, trials=trials[name]) for name in trials]

    def protocols(self) -> dict[str, dict[str, Any]]:
        """The last epoch's result of each protocol and, with it, the best epoch's."""
        out = {}
        for name, results in self.results["last"].items():
            method, source = self.facts["method"], self.facts["source"]
            entry = merge_trials(results).to_dict(self.dataset.drawn, method, source)
            entry |= {"chance": _chance(results), "descriptor": self.facts["descriptor"]}
            if name in self.results["best"]:
                best = merge_trials(self.results["best"][name])
                entry["best"] = {"mean": best.mean, "std": best.std}
            out[name] = entry
        return out

    def load(self, source: str | Path) -> Any:
        """The model of a checkpoint; one's own function builds it again, with the saved weights."""
        if Path(source).is_dir() and _own_function(self.settings) is not None:
            classes = read_config(source).get("num_classes")
            if not isinstance(classes, int) or not 0 <= classes <= 10**7:
                raise UserError(f"{source}: its config.json has no num_classes: get it again")
            model = _build(self.settings, classes)
            load_weights(model, source)
        else:
            model = open_model(source)
        return model.to(self.world.device).to(memory_format=torch.channels_last)

    def reading(self, model: Any, trained_on: dict[str, Any]) -> dict[str, Any]:
        """How images are read: by the recipe's intensity, or else as the model was trained."""
        settings = self.settings
        intensity = settings.recipe.data.intensity or str(trained_on.get("intensity", "full"))
        options: dict[str, Any] = {
            "intensity": check_intensity(intensity),
            "threads": settings.threads,
        }
        if settings.cache is None:
            return {**options, "cache": None}
        splits = [read() for _, read in self.dataset.splits_by_name()]
        paths = [sample.path for samples, _ in splits for sample in samples]
        size = data_config(model)["input_size"][1:]
        cache = open_cache(settings.cache, paths, size, intensity=options["intensity"])
        return {**options, "cache": cache}

    def extract(self, model: Any, samples: Sequence[Sample], options: dict[str, Any]) -> Tensor:
        """Descriptors of images, computed by all processes together."""
        settings = self.settings
        return extract(model, samples, self.world, settings.precision,
                       batch_size=settings.batch_size, progress=True, **options)  # fmt: skip


def _trained_on(source: str | Path, model: Any = None) -> dict[str, Any]:
    """What a checkpoint says of its training: source, dataset, split, intensity, ..."""
    own = read_config(source).get("deen_zoo") if (Path(source) / "config.json").is_file() else {}
    found = own.get("trained_on") if isinstance(own, dict) else None
    found = found or getattr(model, "trained_on", None)
    return found if isinstance(found, dict) else {}


def _digest(model: Any) -> str | None:
    """SHA-256 of the file that weights given by name, or of the Hub, were loaded from."""
    file = (getattr(model, "pretrained_cfg", None) or {}).get("file")
    return sha256(file) if file and Path(file).is_file() else None


def _checkpoint(settings: Settings, split: int) -> str:
    """The checkpoint to evaluate on a split: ``eval_only``, or what is of that split in it.

    A run on several splits holds a checkpoint of each; installed weights may be of several.
    """
    source = str(settings.eval_only)
    splits = installed_splits(source)
    if splits:
        if split not in splits:
            have = " ".join(map(str, splits))
            raise UserError(
                f"{source}: no weights of split {split} are installed: install them with "
                f"'deen-zoo convert FILE --install', or evaluate those there are, --splits {have}"
            )
        return str(splits[split])
    if len(settings.splits) > 1:
        names = (f"split-{split}", f"trial-{split}")  # the latter in runs of 0.1.0
        folders = [Path(source) / name / "checkpoint" for name in names]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            raise UserError(
                f"{folders[0]}: there is no such folder; each split of {settings.kind.title} has a "
                "model of its own: give the output folder of a run, or --splits with the one split "
                "of a checkpoint"
            )
        return str(found)
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
    name = name.rpartition(":")[2]
    imagenet = NAMES.get(name, False) and not settings.scratch
    if imagenet:
        arguments["pretrained_backbone"] = True
    try:
        return create_model(name, num_classes=num_classes, **arguments)
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


def _chance(results: Sequence[ProtocolResult]) -> float:
    """Rank-1 of a random ranking: the share of the gallery that shows the query's person."""
    shares = []
    for trial in (trial for result in results for trial in result.trials):
        people = Counter(sample.identity for sample in trial.gallery)
        shares += [people[query.identity] / len(trial.gallery) for query in trial.queries]
    return float(np.mean(shares))


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
        "batch_size": settings.batch_size,  # of evaluation, which may round differently too
        "code": _code(settings),
        "versions": {
            "deen_zoo": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        }
        | ({"openvino": version("openvino")} if settings.engine == "openvino" else {}),
    }


def _code(settings: Settings) -> dict[str, str]:
    """SHA-256 of the files of one's own model and task: what they do may change between runs."""
    found: dict[str, str] = {}
    for option, name in (("--model", settings.model), ("--task", settings.task)):
        if name and ":" in name:
            load_object(name, option)
            file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
            found |= {name: sha256(file)} if file else {}
    return found


def _say(world: Distributed, line: str) -> None:
    if world.main:
        print(line, file=sys.stderr, flush=True)
