"""The pictures of docs/features.md, of the shipped model and drawn people that it has not seen.

    python benchmarks/pictures.py                # into docs/
    python benchmarks/pictures.py --output here --model runs/llcm/checkpoint --seed 1

Which images are shown is decided by the seed alone, whatever the model makes of them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image

from deen_zoo import FeatureExtractor
from deen_zoo.data import open_dataset
from deen_zoo.synthetic import synthesize
from deen_zoo.visualize import activation_maps, sample_ranking, similarities, tsne

WORLD = 7  # the shipped model was trained on people of world 0


def draw(extractor: FeatureExtractor, output: Path, people: int, seed: int) -> None:
    """ranking.png, tsne.png, similarities.png and activations.png."""
    with tempfile.TemporaryDirectory() as scratch:
        synthesize("llcm", scratch, people, seed=WORLD, test_fraction=0.9)
        dataset = open_dataset("llcm", scratch)
        samples = {kind: dataset.test(kind) for kind in ("infrared", "visible")}
        table = extractor.table([*samples["infrared"], *samples["visible"]])
        sample_ranking(table, output / "ranking.png", queries=4, k=6, seed=seed)
        tsne(table, output / "tsne.png", seed=seed)
        similarities(table, output / "similarities.png")
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for rows in samples.values():  # three people of either modality
            order = torch.randperm(len(rows), generator=generator).tolist()
            first = {rows[i].identity: rows[i] for i in reversed(order)}
            chosen += list(first.values())[-3:]
        activation_maps(extractor, chosen, output / "activations.png")


def shrink(file: Path) -> None:
    """256 colours are enough, and a third of the bytes; those of a large picture are chosen by a
    smaller copy, in a tenth of the time."""
    with Image.open(file) as image:
        whole = image.convert("RGB")
    copy = whole.reduce(max(1, round((whole.width * whole.height / 250_000) ** 0.5)))
    palette = copy.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4)
    whole.quantize(palette=palette, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--model", default="test_deen_resnet")
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the images that are shown")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    draw(FeatureExtractor(args.model, progress=False), args.output, args.people, args.seed)
    for name in ("ranking", "tsne", "similarities", "activations"):
        shrink(args.output / f"{name}.png")
        print(args.output / f"{name}.png")


if __name__ == "__main__":
    main()
