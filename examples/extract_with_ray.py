"""Extract a folder with Ray Data: actors on any number of machines, rows to Parquet files.

    pip install 'deen-zoo[parquet]' 'ray[data]'
    python examples/extract_with_ray.py crops/night --modality infrared --output rows/
    python examples/extract_with_ray.py crops/night --modality infrared --output rows/ --actors 8

Each actor holds one FeatureExtractor. Ray starts a lost actor again and repeats its batch, so a
killed one loses nothing. On one machine ``deen-zoo extract`` does the same without Ray.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from deen_zoo import FeatureExtractor
from deen_zoo.data.folder import list_images
from deen_zoo.errors import require


class Actor:
    """Descriptors of batches of paths; ``kill`` names a file, and the actor that makes it dies."""

    def __init__(self, model: str, modality: str, kill: str = "") -> None:
        self.extractor = FeatureExtractor(model, progress=False)
        self.modality, self.kill = modality, kill

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        paths = [str(path) for path in batch["item"]]
        if self.kill and not os.path.exists(self.kill):
            Path(self.kill).touch()
            os._exit(1)
        table = self.extractor.table(paths, modality=self.modality)
        return {"path": table.paths, "features": table.features.float().numpy()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Extract a folder with Ray Data.")
    parser.add_argument("folder", help="images at any depth, on storage that all machines see")
    parser.add_argument("--modality", choices=("visible", "infrared"), required=True)
    parser.add_argument("--output", required=True, help="a folder of Parquet files")
    parser.add_argument("--model", default="test_deen_resnet", help="a name, or local-dir:FOLDER")
    parser.add_argument("--actors", type=int, default=2, help="extractors at work (default: 2)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--kill-one", action="store_true", help="let one actor die, as a test")
    args = parser.parse_args(argv)
    ray = require("ray", "clients")
    data = require("ray.data", "clients")
    paths = [os.path.abspath(path) for path in list_images(args.folder)[0]]
    os.makedirs(args.output, exist_ok=True)
    killed = os.path.abspath(f"{args.output}/.killed") if args.kill_one else ""
    # One more for the tasks that list and write.
    ray.init(num_cpus=args.actors + 1, include_dashboard=False, log_to_driver=False)
    try:
        blocks = max(args.actors, len(paths) // args.batch_size)
        rows = data.from_items(paths, override_num_blocks=blocks).map_batches(
            Actor,
            fn_constructor_args=(args.model, args.modality, killed),
            concurrency=args.actors,
            batch_size=args.batch_size,
        )
        rows.write_parquet(args.output)
    finally:
        ray.shutdown()
        if killed:
            Path(killed).unlink(missing_ok=True)
    print(f"{len(paths)} images: {args.output}")


if __name__ == "__main__":
    main()
