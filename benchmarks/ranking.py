"""Time ``evaluate_ranking``, beside the reference's evaluators when a checkout is given.

    python benchmarks/ranking.py [--reference LLCM/DEEN] [--rounds 5] [--json]

Two measurements at the protocols' real sizes, on synthetic float32 similarities: one LLCM trial
(7,166 queries x 1,700 gallery images of 351 identities), and ten SYSU-MM01 trials (3,803 x 301
images of 96 identities). The two programs take turns, and their numbers are compared each time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deen_zoo.evaluation import evaluate_ranking

Array = NDArray[Any]
Case = tuple[Array, Array, Array, Array, Array]  # similarity, identities (q, g), cameras (q, g)


def make_case(queries: int, gallery: int, identities: int, cameras: list[int], seed: int) -> Case:
    """A float32 similarity without ties (the reference leaves their order to an unstable sort)
    where a match scores higher. ``cameras`` are the gallery's; SYSU's queries have 3 and 6."""
    rng = np.random.default_rng(seed)
    query_ids = rng.integers(0, identities, queries)
    gallery_ids = np.sort(np.arange(gallery) % identities)
    gallery_cameras = np.resize(cameras, gallery)
    query_cameras = rng.choice([3, 6] if len(cameras) == 4 else cameras, queries)
    ranks = np.tile(np.arange(gallery, dtype=np.float32), (queries, 1))
    similarity = 2 * rng.permuted(ranks, axis=1)
    similarity[query_ids[:, None] == gallery_ids] += 2 * (gallery // 3) + 1  # odd: of matches alone
    return similarity, query_ids, gallery_ids, query_cameras, gallery_cameras


def workloads() -> dict[str, tuple[str, list[Case]]]:
    """Name to ranking rule and cases."""
    llcm = make_case(7166, 1700, 351, list(range(1, 10)), seed=0)
    sysu = [make_case(3803, 301, 96, [1, 2, 4, 5], seed) for seed in range(10)]
    return {
        "LLCM, one trial, 7166 x 1700": ("llcm", [llcm]),
        "SYSU-MM01, ten trials, 3803 x 301": ("sysu", sysu),
    }


def load_reference(folder: Path) -> Any:
    """The reference's ``eval_metrics``, read in place."""
    path = folder / "eval_metrics.py"
    if not path.is_file():
        sys.exit(f"{path}: there is no such file; give the DEEN folder of the reference")
    spec = importlib.util.spec_from_file_location("eval_metrics", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(function: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def benchmark(reference: Path | None = None, rounds: int = 5) -> list[dict[str, Any]]:
    """Seconds (minimum and median over rounds) of each workload; with a reference its seconds,
    the ratio of the minima, and the greatest difference between the two programs' numbers."""
    evaluators = load_reference(reference) if reference else None
    rows = []
    for name, (rule, cases) in workloads().items():

        def ours(rule: str = rule, cases: list[Case] = cases) -> list[Any]:
            results = [evaluate_ranking(*case, rule=rule) for case in cases]
            return [(r.cmc.astype(np.float32), r.mAP, r.mINP) for r in results]

        def theirs(rule: str = rule, cases: list[Case] = cases) -> list[Any]:
            return [getattr(evaluators, f"eval_{rule}")(-case[0], *case[1:]) for case in cases]

        ours()  # warm up
        seconds: list[float] = []
        others: list[float] = []
        for _ in range(rounds):
            taken, mine = timed(ours)
            seconds.append(taken)
            if evaluators:
                taken, official = timed(theirs)
                others.append(taken)
        row: dict[str, Any] = {"workload": name, "rounds": rounds}
        row |= {"min": min(seconds), "median": statistics.median(seconds)}
        if others:
            pairs = zip(mine, official, strict=True)
            row |= {
                "reference_min": min(others),
                "reference_median": statistics.median(others),
                "ratio_of_min": min(others) / min(seconds),
                "ratio_of_median": statistics.median(others) / statistics.median(seconds),
                "greatest_difference": max(
                    float(np.abs(np.subtract(a, b)).max())
                    for left, right in pairs
                    for a, b in zip(left, right, strict=True)
                ),
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="the DEEN folder of the reference")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = benchmark(args.reference, args.rounds)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['workload']}: {row['min']:.3f} s min, {row['median']:.3f} s median", end="")
        if "reference_min" in row:
            print(
                f"; reference {row['reference_min']:.2f} s min, {row['reference_median']:.2f} s "
                f"median: {row['ratio_of_min']:.0f} x (medians {row['ratio_of_median']:.0f} x); "
                f"greatest difference {row['greatest_difference']:.1e}",
                end="",
            )
        print(f" ({row['rounds']} rounds)")


if __name__ == "__main__":
    main()
