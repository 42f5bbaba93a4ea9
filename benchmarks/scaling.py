"""How speed and memory grow: with the batch, with the threads that decode, with the gallery."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from deen_zoo import create_model
from deen_zoo.errors import UserError, require
from deen_zoo.evaluation import evaluate_ranking
from deen_zoo.features.extractor import FeatureExtractor, data_config
from deen_zoo.synthetic import synthesize

from .contest import Spec, contest
from .workloads import descriptors

__all__ = ["Curves", "draw_curves", "measure_curves"]

BATCHES = (1, 2, 4, 8, 16, 32)
FORMS = ("plain", "float32", "bfloat16", "int8")
THREADS = (1, 2, 4)
GALLERIES = (1_000, 10_000, 100_000, 1_000_000)
QUERIES = 100
MB = 1e6


@dataclass(frozen=True)
class Curves:
    """What :func:`measure_curves` found, each the best of its rounds.

    Attributes:
        model: Whose.
        batches: Form to batch size to images/s, from preprocessed images.
        decoders: Number of decoding threads to images/s, from files.
        seconds: Gallery size to the seconds that ranking :data:`QUERIES` queries takes.
        megabytes: Gallery size to what it needs at its peak beside the similarities.
    """

    model: str
    batches: dict[str, dict[int, float]]
    decoders: dict[int, float]
    seconds: dict[int, float]
    megabytes: dict[int, float]


def measure_curves(
    model: str = "test_deen_resnet",
    batches: Sequence[int] = BATCHES,
    galleries: Sequence[int] = GALLERIES,
    rounds: int = 3,
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Curves:
    """Measure on the CPU.

    Args:
        model: By name.
        batches: Sizes of batches.
        galleries: Numbers of images in the gallery.
        rounds: Of each measurement.
        threads: Of torch; None for its default.
        say: Called with a line of progress.

    Raises:
        UserError: Not on Linux, whose kernel counts memory.
    """
    _reset_peak()
    with tempfile.TemporaryDirectory() as scratch:
        _, *size = data_config(create_model(model))["input_size"]
        threads = threads or torch.get_num_threads()
        spec = Spec(Path(scratch), None, model, 2, tuple(size), "cpu", threads)
        speeds: dict[str, dict[int, float]] = {form: {} for form in FORMS}
        for n in batches:
            say(f"batches of {n}")
            found = contest(descriptors, FORMS, replace(spec, images=2 * n), rounds)
            for form in FORMS:
                speeds[form][n] = 2 * n / min(found[form].seconds)
        say("files and threads")
        synthesize("llcm", spec.folder / "people", 40, progress=False)
        found = contest(from_files, [str(n) for n in THREADS], spec, rounds)
        decoders = {n: found[str(n)].answer / min(found[str(n)].seconds) for n in THREADS}
        seconds, megabytes = {}, {}
        for n in galleries:
            say(f"a gallery of {n:,}")
            outcome = contest(rank, ["deen_zoo"], replace(spec, images=n), rounds)["deen_zoo"]
            seconds[n], megabytes[n] = min(outcome.seconds), outcome.answer / MB
    return Curves(model, speeds, decoders, seconds, megabytes)


def from_files(contestant: str, spec: Spec) -> Callable[[], int]:
    """Image files to rows with so many threads; the answer is the number of images."""
    extract = FeatureExtractor(
        spec.model, "cpu", pretrained=False, threads=int(contestant), progress=False, batch_size=16
    )
    return lambda: len(extract(spec.folder / "people", "visible"))


def rank(contestant: str, spec: Spec) -> Callable[[], int]:
    """:data:`QUERIES` queries against ``spec.images``; the answer is the memory it took, bytes."""
    rng = np.random.default_rng(0)
    similarity = rng.random((QUERIES, spec.images), dtype=np.float32)
    gallery_ids = np.arange(spec.images) // 20
    query_ids = rng.choice(gallery_ids, QUERIES)

    taken = [0]  # the first run allocates what later ones use again

    def run() -> int:
        before = _reset_peak()
        evaluate_ranking(similarity, query_ids, gallery_ids, rule="regdb")
        taken.append(_memory("VmHWM") - before)
        return max(taken)

    return run


def _reset_peak() -> int:
    """Let the kernel count this process's peak memory anew; its memory now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UserError(f"memory is measured on Linux only ({error})") from error
    return _memory("VmRSS")


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def draw_curves(curves: Curves, path: str | os.PathLike[str]) -> None:
    """A picture of the three, PNG or SVG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", extra="viz")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    batch, decoders, gallery = figure.subplots(1, 3)
    for form, speeds in curves.batches.items():
        label = "plain, float32" if form == "plain" else f"optimized, {form}"
        batch.plot(list(speeds), list(speeds.values()), "o-", label=label)
    batch.set(title="descriptors", xlabel="images in a batch", ylabel="images/s", xscale="log")
    batch.set_xticks(list(speeds), [str(n) for n in speeds])
    batch.minorticks_off()
    batch.legend(fontsize="small")
    decoders.plot(list(curves.decoders), list(curves.decoders.values()), "o-", color="C0")
    decoders.set(title="files to descriptors", xlabel="threads that decode", ylabel="images/s")
    decoders.set_xticks(list(curves.decoders))
    gallery.loglog(list(curves.seconds), list(curves.seconds.values()), "o-", color="C0")
    gallery.set(title=f"ranking {QUERIES} queries", xlabel="gallery images")
    gallery.set_ylabel("seconds", color="C0")
    memory = gallery.twinx()
    memory.semilogx(list(curves.megabytes), list(curves.megabytes.values()), "s--", color="C1")
    memory.set_ylabel("MB beside the similarities", color="C1")
    for axes in (batch, decoders, memory):
        axes.set_ylim(bottom=0)
    for axes in (batch, decoders, gallery):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
