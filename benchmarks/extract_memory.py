"""Memory of an extraction while it runs, in MB of anonymous memory beyond the start's.

    python benchmarks/extract_memory.py --images 1000 10000

One image is linked under many names; each count runs in a process of its own, through a small model
whose last stage is as wide as asked for, so that the rows, not the model, would fill the memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image


def anonymous_mb() -> float:
    """Memory that is not backed by a file, of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("this system does not say RssAnon")


def measure(width: int, folder: str, shard: int) -> None:
    from deen_zoo import FeatureExtractor, create_model

    small = {"stem_width": 16, "stem_type": "deep", "channels": (32, 48, 64, width)}
    model = create_model(
        "test_deen_resnet",
        num_classes=0,
        backbone_args=small,
        pretrained_cfg_overlay={"input_size": (3, 64, 32)},
    )
    extractor = FeatureExtractor(model, "cpu", flip=False, threads=1, progress=False)
    extractor(sorted(Path(folder).iterdir())[:64], "visible")
    start, samples, done = anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            samples.append(anonymous_mb() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    table = extractor.write(folder, Path(folder).parent / "f.safetensors", "visible", shard=shard)
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    size = table.features.nbytes / 2**20
    print(f"{len(table):>8} {size:>9.1f} {max(samples):>12.1f} {len(table) / seconds:>9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--width", type=int, default=1024, help="C: a row has 6*C numbers")
    parser.add_argument("--shard", type=int, default=1024)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        measure(args.width, args.folder, args.shard)
        return
    print(f"{'images':>8} {'file, MB':>9} {'memory, MB':>12} {'images/s':>9}", flush=True)
    for count in args.images:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "images")
            folder.mkdir()
            pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(scratch, "one.jpg"))
            for i in range(count):
                os.link(Path(scratch, "one.jpg"), folder / f"{i:06}.jpg")
            same = [f"--width={args.width}", f"--shard={args.shard}", f"--folder={folder}"]
            subprocess.run([sys.executable, __file__, *same], check=True)


if __name__ == "__main__":
    main()
