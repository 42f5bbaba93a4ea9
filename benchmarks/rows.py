"""The rows of the benchmark: which contest, how many rounds, and what is to be reached."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from deen_zoo import create_model, save_pretrained
from deen_zoo.errors import UserError, check_least
from deen_zoo.features.extractor import data_config
from deen_zoo.models.convert import convert
from deen_zoo.synthetic import synthesize

from . import official, workloads
from .agreement import same_first_hits
from .contest import Outcome, Spec, Workload, contest

__all__ = ["WORKS", "Row", "benchmark", "environment", "table"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        work: What was measured.
        unit: Of the two figures.
        ours: This package's figure, the median over rounds; None: not measured.
        reference: The reference's.
        ratio: How many times faster (of speeds) or smaller (of sizes) this package is, the median
            over rounds; None without a reference.
        low: The least ratio of a round.
        high: The greatest.
        target: What the ratio is to be.
        note: Agreement of the results, or why there is no figure.
    """

    work: str
    unit: str
    ours: float | None = None
    reference: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where that was not measured or there is none."""
        return None if self.ratio is None or self.target is None else self.ratio >= self.target


@dataclass(frozen=True)
class Plan:
    """What a run of :func:`benchmark` is asked for."""

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
        """The contest, without the reference where there is none."""
        if not self.spec.official:
            contestants = [name for name in contestants if name != "reference"]
        spec = replace(self.spec, **changes)
        if spec.official and workload in (workloads.descriptors, workloads.training_step):
            workloads.share_weights(spec)
        return contest(workload, contestants, spec, self.rounds or rounds, self.say, warm_up)


def _speed(
    work: str,
    unit: str,
    amount: float,
    ours: Outcome,
    reference: Outcome | None,
    target: float | None,
    note: str = "",
) -> Row:
    """A row of a rate, amount / seconds, or, where ``unit`` is a time, of seconds * amount."""

    def figure(outcome: Outcome) -> float:
        return outcome.median * amount if unit in ("s", "ms") else amount / outcome.median

    if reference is None:
        return Row(work, unit, figure(ours), target=target, note=note)
    ratios = [b / a for a, b in zip(ours.seconds, reference.seconds, strict=True)]
    return Row(
        work, unit, figure(ours), figure(reference), statistics.median(ratios), min(ratios),
        max(ratios), target, note,
    )  # fmt: skip


def _size(work: str, ours: int | None, reference: int | None, target: float) -> Row:
    """A row of bytes; ``target`` is the share of the reference's that is not to be exceeded."""
    ratio = reference / ours if ours and reference else None
    ours_mb, reference_mb = (size / 1e6 if size else None for size in (ours, reference))
    return Row(work, "MB", ours_mb, reference_mb, ratio, target=1 / target)


def _memory(work: str, ours: Outcome, reference: Outcome | None, target: float) -> Row:
    theirs = reference.memory if reference else None
    return _size(f"{work}: peak memory", ours.memory, theirs, target)


def _descriptors(plan: Plan) -> list[Row]:
    names = ("reference", "float32", "bfloat16", "int8")
    found = plan.hold(workloads.descriptors, names, 3)
    plan.say("comparing first hits on drawn people")
    shares, queries = same_first_hits(("bfloat16", "int8"))
    reference, rows = found.get("reference"), []
    for name, target in (("float32", 1.7), ("bfloat16", 3.4), ("int8", 5.0)):
        notes = [_descriptor_note(found[name].answer, reference and reference.answer)]
        if name in shares:
            notes.append(f"same first hit for {shares[name]:.1%} of {queries:,} drawn queries")
        note = "; ".join(filter(None, notes))
        work = f"descriptors on a CPU, batches of {plan.spec.images // 2}, {name}"
        rows.append(
            _speed(work, "images/s", plan.spec.images, found[name], reference, target, note)
        )
    return rows


def _descriptor_note(ours: Any, reference: Any) -> str:
    if reference is None:
        return ""
    difference = np.abs(ours - reference).max()
    cosine = (ours * reference).sum(1) / np.linalg.norm(ours, axis=1)
    cosine = float((cosine / np.linalg.norm(reference, axis=1)).min())
    return f"greatest difference {difference:.1e}, least cosine {cosine:.5f}"


def _sysu_test(plan: Plan) -> list[Row]:
    """22 people to test on: 4 images of each in each camera, as ``synthesize`` makes them."""
    spec = plan.spec
    root, folder = spec.folder / "sysu", spec.folder / "sysu-checkpoint"
    synthesize("sysu", root, identities=30, test_fraction=0.75, progress=False)
    if spec.official:
        weights = spec.folder / "sysu.t"
        official.save_weights(spec.official, 395, "sysu", weights)
        convert(weights, folder, "deen_resnet50_sysu")
    else:
        save_pretrained(create_model(spec.model), folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, *workloads.SYSU_SIZE]
    (folder / "config.json").write_text(json.dumps(config))
    names = ("reference", "float32", "float32 optimized", "bfloat16 optimized")
    found = plan.hold(workloads.sysu_test, names, 1, warm_up=False)
    reference, rows = found.get("reference"), []
    for name in names[1:]:
        answer = found[name].answer
        note = f"rank-1 {answer['r1']:.2%}, mAP {answer['mAP']:.2%}"
        if reference:
            note += f"; the reference's {reference.answer['r1']:.2%}, {reference.answer['mAP']:.2%}"
        work = f"ten-trial SYSU test, files to table, 128 x 64, {name}"
        rows.append(_speed(work, "s", 1, found[name], reference, 5.0, note))
    return rows


def _ranking(plan: Plan) -> list[Row]:
    rows = []
    for work, workload, target in (
        ("ranking metrics, LLCM: 7,166 x 1,700", workloads.ranking, 50.0),
        ("ranking metrics, SYSU: ten of 3,803 x 301", workloads.sysu_ranking, None),
    ):
        found = plan.hold(workload, ("reference", "deen_zoo"), 5)
        reference = found.get("reference")
        note = _difference(found["deen_zoo"].answer, reference and reference.answer)
        rows.append(_speed(work, "s", 1, found["deen_zoo"], reference, target, note))
    return rows


def _losses(plan: Plan) -> list[Row]:
    found = plan.hold(workloads.losses, ("reference", "deen_zoo"), 15)
    reference = found.get("reference")
    note = _difference(found["deen_zoo"].answer, reference and reference.answer)
    work = "losses forward and backward, 48 images"
    return [_speed(work, "ms", 100, found["deen_zoo"], reference, 5.0, note)]


def _difference(ours: Any, reference: Any) -> str:
    if reference is None:
        return ""
    return f"greatest difference {np.abs(np.asarray(ours) - np.asarray(reference)).max():.1e}"


def _training(plan: Plan) -> list[Row]:
    targets = {"float32": (1.9, 0.8), "bfloat16": (4.8, 0.55)}
    targets = {name + how: t for name, t in targets.items() for how in ("", " grad checkpointing")}
    found = plan.hold(workloads.training_step, ("reference", *targets), 2, images=24)
    reference, rows = found.get("reference"), []
    for name, (speed, memory) in targets.items():
        work = f"training step on a CPU, 24 + 24 images, {name}"
        rows.append(_speed(work, "s", 1, found[name], reference, speed))
        rows.append(_memory(work, found[name], reference, memory))
    return rows


def _start(plan: Plan) -> list[Row]:
    found = contest(workloads.start, ("timm", "deen_zoo"), plan.spec, plan.rounds or 7, plan.say)
    work = "start: import deen_zoo beside import timm"
    return [_speed(work, "s", 1, found["deen_zoo"], found["timm"], 1 / 1.1)]


def _checkpoint(plan: Plan) -> list[Row]:
    folder = plan.spec.folder / "saved"
    save_pretrained(create_model(plan.spec.model), folder)
    reference = None
    if plan.spec.official:
        reference = workloads.share_weights(plan.spec).stat().st_size
    return [_size("checkpoint", (folder / "model.safetensors").stat().st_size, reference, 0.48)]


def _gpu(plan: Plan) -> list[Row]:
    describe, train = (
        "descriptors on a GPU, bfloat16 compiled",
        "training step on a GPU, 24 + 24 images, bfloat16",
    )
    if not torch.cuda.is_available():
        note = "not measured: no CUDA device"
        return [
            Row(describe, "images/s", target=8.0, note=note),
            Row(train, "s", target=3.0, note=note),
            Row(f"{train}: peak memory", "MB", target=2.0, note=note),
        ]
    images = max(64, plan.spec.images)
    names = ("reference", "bfloat16 compiled")
    found = plan.hold(workloads.descriptors, names, 10, device="cuda", images=images)
    ours, reference = found[names[1]], found.get("reference")
    note = _descriptor_note(ours.answer, reference and reference.answer)
    peak = workloads.bfloat16_peak()
    share = workloads.operations(replace(plan.spec, images=images)) / ours.median / peak
    note += f"; {share:.0%} of the {peak / 1e12:.0f} TFLOP/s of a large bfloat16 product"
    rows = [_speed(describe, "images/s", images, ours, reference, 8.0, note)]
    found = plan.hold(
        workloads.training_step, ("reference", "bfloat16"), 10, device="cuda", images=24
    )
    ours, reference = found["bfloat16"], found.get("reference")
    rows.append(_speed(train, "s", 1, ours, reference, 3.0))
    rows.append(_memory(train, ours, reference, 0.5))
    return rows


WORKS: dict[str, Callable[[Plan], list[Row]]] = {
    "descriptors": _descriptors,
    "sysu-test": _sysu_test,
    "ranking": _ranking,
    "losses": _losses,
    "training": _training,
    "start": _start,
    "checkpoint": _checkpoint,
    "gpu": _gpu,
}


def benchmark(
    works: Sequence[str] = tuple(WORKS),
    reference: str | os.PathLike[str] | None = None,
    *,
    model: str = "deen_resnet50_llcm",
    images: int = 64,
    rounds: int | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time this package and, in turns, the reference, each in a process of its own.

    Args:
        works: Names of :data:`WORKS`.
        reference: The ``DEEN`` folder of a checkout of the official code, or None.
        model: What runs; with a reference one of its three.
        images: That are described, one half of them visible, one infrared, each half a batch; 32
            is the reference's own.
        rounds: Of each contest; None for its own number (1 to 15, fewer of what takes minutes).
        threads: Of torch; None for its default.
        say: Called with a line of progress.

    Raises:
        UserError: An unknown work, numbers that are none, a folder that is not the reference's, a
            model that it lacks, or a contestant that failed.
    """
    unknown = [work for work in works if work not in WORKS]
    if unknown:
        raise UserError(f"{unknown[0]!r}: choose from {', '.join(WORKS)}")
    if images < 2 or images % 2:
        raise UserError(f"images is {images}; give an even number from 2 on")
    for option, number in (("rounds", rounds), ("threads", threads)):
        if number is not None:
            check_least(option, number, 1)
    checkout = official.check_checkout(reference) if reference else None
    if checkout and model not in workloads.DATASETS:
        known = ", ".join(workloads.DATASETS)
        raise UserError(f"the reference has no {model}: choose from {known}, or leave it out")
    _, *size = data_config(create_model(model))["input_size"]
    threads = threads or torch.get_num_threads()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        spec = Spec(Path(scratch), checkout, model, images, tuple(size), "cpu", threads)
        for work in works:
            say(f"{work} ...")
            rows += WORKS[work](Plan(spec, rounds, say))
    return rows


def environment(threads: int | None = None) -> dict[str, Any]:
    """Hardware and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| work | deen_zoo | reference | ratio (rounds) | target | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        figures = [_figure(x, row.unit) for x in (row.ours, row.reference)]
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}x"
        if row.low is not None and row.high is not None and row.low < row.high:
            ratio += f" ({row.low:.3g} to {row.high:.3g})"
        target = "" if row.target is None else f"{row.target:.3g}x"
        if row.met is False:
            target += " **missed**"
        lines.append("| " + " | ".join([row.work, *figures, ratio, target, row.note]) + " |")
    return "\n".join(lines)


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
