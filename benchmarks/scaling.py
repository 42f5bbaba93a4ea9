"""How speed and memory grow: with the batch, with the threads that decode, with the gallery.

python -m benchmarks.scaling docs/scaling.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from deen_zoo import FeatureExtractor, create_model
from deen_zoo.evaluation import evaluate_ranking
from deen_zoo.synthetic import synthesize

from . import workloads
from .__main__ import environment
from .contest import Outcome, Spec, Workload, contest
from .works import ENGINES

BATCHES, THREADS, GALLERIES = (1, 4, 16, 64), (1, 2, 4), (1_000, 10_000, 100_000)
QUERIES = 200


def from_files(contestant: str, spec: Spec) -> Callable[[], int]:
    """Image files to rows with so many threads; the answer is the number of images."""
    extract = FeatureExtractor(
        spec.model, "cpu", pretrained=False, threads=int(contestant), progress=False
    )
    return lambda: len(extract(spec.folder / "people", "visible"))


def rank(contestant: str, spec: Spec) -> Callable[[], None]:
    """:data:`QUERIES` queries against a gallery of ``contestant`` images."""
    size, rng = int(contestant), np.random.default_rng(0)
    similarity = rng.random((QUERIES, size), dtype=np.float32)
    gallery_ids = np.arange(size) // 20
    query_ids = rng.choice(gallery_ids, QUERIES)

    def run() -> None:
        evaluate_ranking(similarity, query_ids, gallery_ids, rule="regdb")

    return run


def measure(model: str, threads: int) -> dict[str, dict[str, dict[int, float]]]:
    """Panel -> line -> x -> y, on the CPU; engines that are not installed have no line."""
    size = create_model(model).pretrained_cfg["input_size"][1:]
    with workloads.scratch() as folder:
        spec = Spec(folder, None, model, 1, tuple(size), "cpu", threads)
        synthesize("llcm", folder / "people", 40, progress=False)

        def hold(work: Workload, names: list[str], spec: Spec = spec) -> dict[str, Outcome]:
            found = contest(work, names, spec, 3, lambda line: print(line, file=sys.stderr))
            return {name: outcome for name, outcome in found.items() if not outcome.failed}

        batches: dict[str, dict[int, float]] = {name: {} for name in ENGINES}
        for n in BATCHES:
            found = hold(workloads.descriptors, list(ENGINES), replace(spec, images=n))
            for name, outcome in found.items():
                batches[name][n] = n / outcome.median
        decoding = hold(from_files, [str(n) for n in THREADS])
        ranking = hold(rank, [str(n) for n in GALLERIES])
    return {
        "images in a batch": {name: line for name, line in batches.items() if line},
        "threads that decode": {
            "files to rows": {int(n): o.answer / o.median for n, o in decoding.items()}
        },
        "images in the gallery": {
            f"ranking {QUERIES} queries": {int(n): o.median for n, o in ranking.items()}
        },
    }


def draw(panels: dict[str, dict[str, dict[int, float]]], title: str, file: Path) -> None:
    """One picture of the three panels, with the machine in its title."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title, fontsize="small")
    for axes, (xlabel, lines) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for label, line in lines.items():
            axes.plot(list(line), list(line.values()), "o-", label=label)
        axes.set(xlabel=xlabel, ylabel="seconds" if "gallery" in xlabel else "images/s")
        if "gallery" in xlabel:
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_xscale("log", base=2)
            ticks = sorted({x for line in lines.values() for x in line})
            axes.set_xticks(ticks, [str(x) for x in ticks])
            axes.set_ylim(bottom=0)
        axes.legend(fontsize="x-small", frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--model", default="test_deen_resnet")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    machine = environment(args.threads)
    title = f"{args.model}, {machine['cpu']}, {args.threads} threads, torch {machine['torch']}"
    draw(measure(args.model, args.threads), title, args.picture)


if __name__ == "__main__":
    main()
