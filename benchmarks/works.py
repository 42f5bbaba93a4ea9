"""What is measured, by whom, and the rows that come of it.

A work is done by contestants. ``"reference"`` is the official code, unedited; ``"timm"`` is a plain
ResNet-50 of timm at the same image size, a yardstick that everybody knows; the others are this
package, named ``"ENGINE PRECISION"``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deen_zoo import FeatureExtractor, create_model, save_pretrained
from deen_zoo.data import open_dataset
from deen_zoo.data.protocols import Sample
from deen_zoo.evaluation import evaluate
from deen_zoo.models.convert import convert
from deen_zoo.synthetic import synthesize

from . import official, workloads
from .contest import Outcome, Spec, Workload, contest

__all__ = ["WORKS", "Plan", "Row"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One line of the table of record.

    Attributes:
        work: What was measured.
        engine: Which engine or program did it.
        precision: In which precision.
        unit: Unit of the figures.
        figure: This package's figure, the median over rounds; None where it was not measured.
        reference: The reference's figure.
        ratio: How many times faster, or smaller, this package is: the median over rounds.
        low: The lowest ratio of a round.
        high: The highest ratio of a round.
        timm_ratio: The same ratio to a plain timm ResNet-50.
        target: What the ratio should be.
        note: How well the results agree, or why there is no figure.
    """

    work: str
    engine: str = ""
    precision: str = ""
    unit: str = ""
    figure: float | None = None
    reference: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    timm_ratio: float | None = None
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a ratio or a target."""
        return None if self.ratio is None or self.target is None else self.ratio >= self.target


@dataclass(frozen=True)
class Plan:
    """What a run of the benchmark is asked for."""

    spec: Spec
    rounds: int | None
    say: Callable[[str], None]

    def hold(
        self,
        workload: Workload,
        contestants: Sequence[str],
        rounds: int,
        warm_up: bool = True,
        **changes: Any,
    ) -> dict[str, Outcome]:
        """The contest, without the reference where there is no checkout of it."""
        if not self.spec.official:
            contestants = [name for name in contestants if name != "reference"]
        spec = replace(self.spec, **changes)
        return contest(workload, contestants, spec, self.rounds or rounds, self.say, warm_up)


def _ratios(ours: Outcome, other: Outcome | None) -> list[float]:
    """How many times faster ``ours`` is, round by round."""
    if other is None or other.failed or ours.failed:
        return []
    return [b / a for a, b in zip(ours.seconds, other.seconds, strict=True)]


def speed(
    work: str,
    name: str,
    unit: str,
    amount: float,
    found: dict[str, Outcome],
    target: float | None = None,
    note: str = "",
    against: str = "reference",
) -> Row:
    """A row of a rate, amount / seconds, or, where ``unit`` is a time, of seconds * amount."""
    ours, engine, precision = found[name], *(name.split(" ", 1) + [""])[:2]
    if ours.failed:
        return Row(
            work, engine, precision, unit, target=target, note=f"not measured: {ours.failed}"
        )

    def figure(outcome: Outcome | None) -> float | None:
        if outcome is None or outcome.failed:
            return None
        return outcome.median * amount if unit in ("s", "ms") else amount / outcome.median

    ratios, timm = _ratios(ours, found.get(against)), _ratios(ours, found.get("timm"))
    return Row(
        work, engine, precision, unit, figure(ours), figure(found.get(against)),
        statistics.median(ratios) if ratios else None,
        min(ratios, default=None), max(ratios, default=None),
        statistics.median(timm) if timm and against != "timm" else None, target, note,
    )  # fmt: skip


def size(
    work: str, name: str, ours: int | None, reference: int | None, target: float | None
) -> Row:
    """A row of bytes; ``target`` is the greatest share of the reference's size."""
    engine, precision = (name.split(" ", 1) + [""])[:2]
    ratio = reference / ours if ours and reference else None
    figure, theirs = (n / 1e6 if n else None for n in (ours, reference))
    least = 1 / target if target else None
    return Row(work, engine, precision, "MB", figure, theirs, ratio, target=least)


def agreement(ours: Outcome, reference: Outcome | None) -> str:
    """How far descriptors, or other results, are from the reference's."""
    if reference is None or ours.failed or reference.failed:
        return ""
    a, b = ours.answer, reference.answer
    difference = f"greatest difference {np.abs(a - b).max():.1e}"
    if a.ndim < 2:
        return difference
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1)
    cosine = float((cosine / np.linalg.norm(b, axis=1)).min())
    return f"{difference}, lowest cosine {cosine:.5f}"


ENGINES = ("torch float32", "openvino float32", "openvino bfloat16", "openvino int8")
# Ratios to reach on a CPU with AMX, which has units for bfloat16 and int8; else there is none.
DESCRIPTOR_TARGETS = {"openvino float32": 1.6, "openvino bfloat16": 7.3, "openvino int8": 11.0}


def descriptors(plan: Plan) -> list[Row]:
    """uint8 images in memory to official descriptors, in batches of 8, of 32 and of one image."""
    plan.say("comparing first hits on drawn people")
    hits = same_first_hits(("openvino bfloat16", "openvino int8"))
    rows = []
    for images, rounds in ((8, 3), (32, 2), (1, 9)):
        names = ("reference", "timm", *ENGINES)
        found = plan.hold(workloads.descriptors, names, rounds, images=images)
        reference = found.get("reference")
        for name in ENGINES:
            notes = [agreement(found[name], reference)]
            if name in hits and images == 32:
                notes.append(hits[name])
            target = DESCRIPTOR_TARGETS.get(name) if workloads.has_amx() else None
            if images == 1:
                target = 5.0 if target and name == "openvino bfloat16" else None
            work = f"descriptors, batches of {images}" if images > 1 else "one image, latency"
            unit = "images/s" if images > 1 else "ms"
            amount = images if images > 1 else 1000
            note = "; ".join(filter(None, notes))
            rows.append(speed(work, name, unit, amount, found, target, note))
    return rows


def same_first_hits(
    names: Sequence[str], people: int = 96, model: str = "test_deen_resnet"
) -> dict[str, str]:
    """In which share of drawn queries an engine finds the very image that plain torch finds.

    The test people of a drawn world, ``llcm-ir2vis`` and ``llcm-vis2ir``, ten draws each, by the
    official descriptor with mirrored images. int8 is calibrated on training images.
    """
    with workloads.scratch() as folder:
        root = folder / "people"
        synthesize("llcm", root, people, progress=False)
        dataset = open_dataset("llcm", root)
        samples = dataset.test("visible") + dataset.test("infrared")
        options: dict[str, Any] = {"progress": False, "normalize": False}
        plain = FeatureExtractor(model, "cpu", "float32", **options)
        wanted, found = _first_hits(plain(samples), samples), {}
        for name in names:
            try:
                extractor = workloads.extractor(model, name, folder, dataset.train(), **options)
                hits = _first_hits(extractor(samples), samples)
            except Exception as error:  # an engine that is not installed, or not for this CPU
                found[name] = f"first hits not compared: {error}"
                continue
            share = sum(map(str.__eq__, hits, wanted)) / len(wanted)
            found[name] = f"same first hit for {share:.1%} of {len(wanted):,} drawn queries"
    return found


def _first_hits(rows: torch.Tensor, samples: Sequence[Sample]) -> list[str]:
    """The path of the first hit of each query of each draw."""
    place, hits = {sample.path: i for i, sample in enumerate(samples)}, []
    for protocol in ("llcm-ir2vis", "llcm-vis2ir"):
        for trial in evaluate(rows, samples, protocol).trials:
            sides = ([place[s.path] for s in side] for side in (trial.queries, trial.gallery))
            query, gallery = sides
            best = (rows[query] @ rows[gallery].T).argmax(dim=1)
            hits += [trial.gallery[i].path for i in best.tolist()]
    return hits


def sysu_test(plan: Plan) -> list[Row]:
    """SYSU-MM01's test from files to the table: 22 people, 4 images of each in each camera."""
    folder = plan.spec.folder
    synthesize("sysu", folder / "sysu", 30, test_fraction=0.75, progress=False)
    if plan.spec.official:
        weights = folder / "sysu.t"
        official.save_weights(plan.spec.official, 395, "sysu", weights)
        convert(weights, folder / "sysu-checkpoint")
    else:
        save_pretrained(create_model("deen_resnet50_sysu"), folder / "sysu-checkpoint")
    config = folder / "sysu-checkpoint" / "config.json"
    content = json.loads(config.read_text())
    content["pretrained_cfg"]["input_size"] = [3, *workloads.SYSU_SIZE]
    config.write_text(json.dumps(content))
    names = ("reference", "torch float32", "openvino float32", "openvino bfloat16")
    found = plan.hold(workloads.sysu_test, names, 1, warm_up=False)
    reference, rows = found.get("reference"), []
    for name in names[1:]:
        note = ""
        if not found[name].failed:
            note = "rank-1 {r1:.2%}, mAP {mAP:.2%}".format(**found[name].answer)
        if note and reference and not reference.failed:
            note += "; the reference's {r1:.2%}, {mAP:.2%}".format(**reference.answer)
        work = "ten-draw SYSU test, files to table, 128 x 64"
        rows.append(speed(work, name, "s", 1, found, 3.5, note))
    return rows


def ranking(plan: Plan) -> list[Row]:
    """CMC, mAP and mINP at the sizes of LLCM's and SYSU-MM01's tests."""
    rows = []
    for work, workload in (
        ("ranking metrics, LLCM: 7,166 x 1,700", workloads.ranking),
        ("ranking metrics, SYSU: ten of 3,803 x 301", workloads.sysu_ranking),
    ):
        found = plan.hold(workload, ("reference", "numpy float32"), 5)
        reference = found.get("reference")
        note = agreement(found["numpy float32"], reference)
        rows.append(speed(work, "numpy float32", "s", 1, found, 60.0, note))
    return rows


def losses(plan: Plan) -> list[Row]:
    """The losses of 48 images, forward and backward."""
    found = plan.hold(workloads.losses, ("reference", "torch float32"), 15)
    reference = found.get("reference")
    note = agreement(found["torch float32"], reference)
    work = "losses forward and backward, 48 images"
    return [speed(work, "torch float32", "ms", 100, found, 7.0, note)]


def training(plan: Plan, device: str = "cpu", rounds: int = 1) -> list[Row]:
    """A training step of 24 + 24 images, and the peak memory of the process."""
    targets: dict[str, tuple[float | None, float | None]] = {
        "torch float32": (2.2, None),
        "torch float32, grad checkpointing": (None, 0.8),
        "torch bfloat16": (5.7, None),
        "torch bfloat16, grad checkpointing": (None, 0.45),
    }
    if device == "cuda":
        targets = {"torch bfloat16": (4.0, 0.5)}
    elif not workloads.has_bfloat16():
        targets = {name: t for name, t in targets.items() if "bfloat16" not in name}
    found = plan.hold(
        workloads.training_step, ("reference", *targets), rounds, images=24, device=device
    )
    reference, rows = found.get("reference"), []
    work = f"training step, 24 + 24 images, on a {device.upper()}"
    for name, (faster, smaller) in targets.items():
        rows.append(speed(work, name, "s", 1, found, faster))
        theirs = reference.memory if reference else None
        rows.append(size(f"{work}: peak memory", name, found[name].memory, theirs, smaller))
    if device == "cpu" and not workloads.has_bfloat16():
        note = "not measured: bfloat16 on this CPU is slower than float32 (no AVX-512)"
        rows.append(Row(work, "torch", "bfloat16", target=5.7, note=note))
    return rows


def reading(plan: Plan) -> list[Row]:
    """Image files (150 x 360 JPEGs) read, resized to 384 x 144 and put into uint8 batches."""
    found = plan.hold(workloads.reading, ("1 thread", "2 threads"), 3)
    return [
        speed("images read, resized and batched", name, "images/s", workloads.FILES, found)
        for name in found
    ]


def start(plan: Plan) -> list[Row]:
    """Importing the package, and the help of a verb, next to ``import timm``."""
    names = ("timm", "import deen_zoo", "deen-zoo extract --help")
    found = contest(workloads.start, names, plan.spec, plan.rounds or 7, plan.say)
    rows = []
    for name, target in zip(names[1:], (0.95, 1.0), strict=True):
        row = speed("start, against import timm", name, "s", 1, found, target, against="timm")
        rows.append(replace(row, engine=name, precision=""))
    return rows


def checkpoint(plan: Plan) -> list[Row]:
    """The size of a checkpoint on disk."""
    folder = plan.spec.folder / "saved"
    save_pretrained(create_model(plan.spec.model), folder)
    reference = None
    if plan.spec.official:
        reference = workloads.share_weights(plan.spec).stat().st_size
    ours = (folder / "model.safetensors").stat().st_size
    return [size("checkpoint", "safetensors", ours, reference, 0.48)]


def gpu(plan: Plan) -> list[Row]:
    """Descriptors and a training step on a GPU, in bfloat16."""
    if not torch.cuda.is_available():
        works = ("descriptors on a GPU", "training step, 24 + 24 images, on a CUDA")
        note = "not measured: no CUDA device"
        return [Row(work, "torch", "bfloat16", note=note) for work in works]
    images, name = 256, "torch bfloat16"
    names = ("reference", "timm", name)
    found = plan.hold(workloads.descriptors, names, 10, device="cuda", images=images)
    reference = found.get("reference")
    note = agreement(found[name], reference)
    if not found[name].failed:
        peak = workloads.product_rate()
        share = workloads.operations(replace(plan.spec, images=images)) / found[name].median / peak
        note += f"; {share:.0%} of the {peak / 1e12:.0f} TFLOP/s of a large bfloat16 product"
    row = speed(f"descriptors on a GPU, batches of {images}", name, "images/s", images, found,
                10.0, note)  # fmt: skip
    return [row, *training(plan, "cuda", 10)]


WORKS: dict[str, Callable[[Plan], list[Row]]] = {
    "descriptors": descriptors,
    "sysu-test": sysu_test,
    "ranking": ranking,
    "losses": losses,
    "training": training,
    "reading": reading,
    "start": start,
    "checkpoint": checkpoint,
    "gpu": gpu,
}
