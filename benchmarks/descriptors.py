"""Size, speed and agreement of each choice of descriptor: the table of docs/features.md.

    python benchmarks/descriptors.py --update docs/features.md
    python benchmarks/descriptors.py --speed-only --model deen_resnet50_llcm --images 2

Rank-1 and mAP are of llcm-ir2vis over synthetic people that the model has not seen; "same first
hit" is the share of infrared images whose most similar visible image is that of the official
descriptor. Times are the best of three alternating runs, in one CPU thread unless told otherwise.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deen_zoo import FeatureExtractor
from deen_zoo.data import open_dataset
from deen_zoo.evaluation import evaluate
from deen_zoo.evaluation.report import markdown_table
from deen_zoo.synthetic import synthesize

CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("official, float32 (default)", {}),
    ("official, float16", {"dtype": "float16"}),
    ("official, no flip", {"flip": False}),
    ("official, not normalised (`--raw`)", {"normalize": False}),
    ("bn", {"descriptor": "bn"}),
    ("pool", {"descriptor": "pool"}),
    ("original", {"descriptor": "original"}),
    ("original, no flip, float16",
     {"descriptor": "original", "flip": False, "dtype": "float16"}),
]  # fmt: skip


def speeds(extractors: list[FeatureExtractor], images: int) -> list[float]:
    """Images a second of each, decoding left out."""
    height, width = extractors[0].transform.size
    batch = torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(0))
    best = [float("inf")] * len(extractors)
    for _ in range(3):
        for i, extract in enumerate(extractors):
            start = time.perf_counter()
            extract(batch, "infrared")
            best[i] = min(best[i], time.perf_counter() - start)
    return [images / seconds for seconds in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="test_deen_resnet")
    parser.add_argument("--people", type=int, default=30, help="27 to test on")
    parser.add_argument("--images", type=int, default=64, help="in a batch that is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--speed-only", action="store_true", help="any model, without weights")
    parser.add_argument("--update", type=Path, help="a file that has such a table already")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    extractors = [
        FeatureExtractor(
            args.model, args.device, pretrained=not args.speed_only, batch_size=args.images,
            progress=False, **options,
        )
        for _, options in CHOICES
    ]  # fmt: skip
    rates = speeds(extractors, args.images)
    columns, more = ["choice", "numbers", "MB per 1,000 rows", "images/s"], not args.speed_only
    columns += ["same first hit", "rank-1", "mAP"] if more else []
    quality = qualities(extractors, args.people) if more else [()] * len(CHOICES)
    rows = []
    for (name, _), extract, rate, scores in zip(CHOICES, extractors, rates, quality, strict=True):
        size = extract.dim * extract.dtype.itemsize / 1000
        rows.append((name, f"{extract.dim:,}", f"{size:.1f}", f"{rate:.1f}", *scores))
    table = markdown_table(columns, rows)
    print(table)
    if args.update:
        update(args.update, table.splitlines())


def update(file: Path, table: list[str]) -> None:
    """Put the table in the place of that with the same head."""
    lines = file.read_text(encoding="utf-8").splitlines()
    end = start = lines.index(table[0])
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    lines[start:end] = table
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def qualities(extractors: list[FeatureExtractor], identities: int) -> list[tuple[str, ...]]:
    out: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "people")
        synthesize("llcm", root, identities, seed=7, test_fraction=0.9)
        dataset = open_dataset("llcm", root)
        samples = dataset.test("visible") + dataset.test("infrared")
        first: torch.Tensor | None = None
        for extract in extractors:
            rows = extract(samples).float()
            infrared = torch.tensor([s.modality == "infrared" for s in samples])
            hits = (rows[infrared] @ rows[~infrared].T).argmax(dim=1)
            first = hits if first is None else first
            mean = evaluate(rows, samples, "llcm-ir2vis").mean
            same = float((hits == first).float().mean())
            scores = (f"{100 * mean[key]:.1f}" for key in ("r1", "mAP"))
            out.append((f"{100 * same:.1f} %", *scores))
    return out


if __name__ == "__main__":
    main()
