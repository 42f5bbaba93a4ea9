"""Score another model's features by a named protocol.

The protocols read features, never a model: here those of two descriptors in plain NumPy, which
know nothing of DEEN. Colours per stripe of the body find nobody in infrared; the directions of
edges find some. Put your own model in the place of DESCRIPTORS.

    python examples/score_another_model.py
    python examples/score_another_model.py --root /data/LLCM --output features
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from deen_zoo.data import Sample, open_dataset
from deen_zoo.data.images import open_image
from deen_zoo.evaluation import ProtocolResult, evaluate, terminal_table
from deen_zoo.synthetic import synthesize

PROTOCOLS = ("llcm-ir2vis", "llcm-vis2ir")


def colours(image: Image.Image) -> np.ndarray:
    """Histograms of red, green and blue in six stripes, (6 * 3 * 8,)."""
    pixels = np.asarray(image.resize((48, 96)), np.float32)
    return np.concatenate(
        [
            np.histogram(stripe[..., channel], bins=8, range=(0, 256))[0]
            for stripe in np.split(pixels, 6)
            for channel in range(3)
        ]
    )


def edges(image: Image.Image) -> np.ndarray:
    """Histograms of the gradient's direction, weighted by its size, in 8 x 4 cells, (8 * 4 * 9,).

    Without sign, since what is bright in one modality may be dark in the other.
    """
    grey = np.asarray(image.convert("L").resize((32, 64)), np.float32)
    dy, dx = np.gradient(grey)
    size, direction = np.hypot(dx, dy), np.arctan2(dy, dx) % np.pi
    cells = []
    for rows in np.split(np.arange(64), 8):
        for columns in np.split(np.arange(32), 4):
            at = np.ix_(rows, columns)
            histogram, _ = np.histogram(direction[at], 9, (0, np.pi), weights=size[at])
            cells.append(histogram / (np.linalg.norm(histogram) + 1e-6))
    return np.concatenate(cells)


DESCRIPTORS = {"colours": colours, "edges": edges}


def extract(name: str, samples: list[Sample]) -> np.ndarray:
    """(images, D), rows of length 1, so that their dot product is the cosine similarity."""
    rows = []
    for sample in samples:
        rows.append(DESCRIPTORS[name](open_image(sample.path)).astype(np.float32))
    features = np.stack(rows)
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


def save(file: Path, features: np.ndarray, samples: list[Sample]) -> None:
    """As ``deen-zoo evaluate`` reads it."""
    np.savez(
        file,
        features=features,
        paths=[s.path for s in samples],
        identity=[s.identity for s in samples],
        camera=[s.camera for s in samples],
        infrared=[s.modality == "infrared" for s in samples],
    )


def main(argv: list[str] | None = None) -> dict[str, list[ProtocolResult]]:
    parser = argparse.ArgumentParser(description="Score another model's features by a protocol.")
    parser.add_argument("--root", help="of LLCM; without it, synthetic people are drawn")
    parser.add_argument("--output", type=Path, help="keep the feature files in this folder")
    args = parser.parse_args(argv)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or f"{scratch}/LLCM"
        if not args.root:
            synthesize("llcm", root, people=14, images_per_camera=2, test_fraction=0.85)
        dataset = open_dataset("llcm", root)
        samples = dataset.test("visible") + dataset.test("infrared")
        for name in DESCRIPTORS:
            features = extract(name, samples)
            results[name] = [evaluate(features, samples, protocol) for protocol in PROTOCOLS]
            rows = [result.to_dict(drawn=not args.root) for result in results[name]]
            print(f"{name}, {features.shape[1]} numbers per image:\n\n{terminal_table(rows)}\n")
            if args.output:
                args.output.mkdir(parents=True, exist_ok=True)
                file = args.output / f"{name}.npz"
                save(file, features, samples)
                print(f"the same by: deen-zoo evaluate {file} --protocol {PROTOCOLS[0]}\n")
    return results


if __name__ == "__main__":
    main()
