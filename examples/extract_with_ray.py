"""Extract with Ray Data: a folder or an object store to Parquet, by actors on many machines.

    pip install 'deen-zoo[clients]'
    python examples/extract_with_ray.py crops/night --modality infrared --output rows
    python examples/extract_with_ray.py s3://crops/night --modality infrared \\
        --output s3://crops/rows --actors 8

Each actor holds one FeatureExtractor. Ray starts a lost actor again and repeats its batch, so a
killed one loses nothing. Every file in the output is a feature file: ``deen-zoo search`` reads it,
and so does a vector database. On one machine ``deen-zoo extract`` does the same without Ray.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from deen_zoo import FeatureExtractor
from deen_zoo.data.images import IMAGE_EXTENSIONS
from deen_zoo.errors import UserError, require


class Actor:
    """Descriptors of batches of files; ``kill`` names a file, and the actor that makes it dies."""

    def __init__(self, model: str, modality: str, skip_broken: bool, kill: str = "") -> None:
        self.extractor = FeatureExtractor(model, progress=False)
        self.modality, self.skip_broken, self.kill = modality, skip_broken, kill

    def __call__(self, batch: Any) -> Any:
        """A ``pyarrow.Table`` of path and bytes to one of path, modality and features."""
        if self.kill and not os.path.exists(self.kill):
            Path(self.kill).touch()
            os._exit(1)
        with tempfile.TemporaryDirectory() as scratch:
            names = {}
            for i, row in enumerate(batch.to_pylist()):
                file = Path(scratch, f"{i}{Path(row['path']).suffix}")
                file.write_bytes(row["bytes"])
                names[str(file)] = row["path"]
            table = self.extractor.table(list(names), modality=self.modality)
        for path, reason in table.unreadable.items():
            if not self.skip_broken:
                raise UserError(f"{names[path]}: {reason}; --skip-broken leaves it out")
        paths = [names[path] for path in table.paths]
        labels = {"infrared": table.labels["infrared"]}
        return replace(table, paths=paths, labels=labels, unreadable={}).to_arrow()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Extract with Ray Data.")
    add = parser.add_argument
    add("source", help="images at any depth: a folder that all machines see, s3://..., gs://...")
    add("--modality", choices=("visible", "infrared"), required=True)
    add("--output", required=True, help="of the Parquet files: a folder, s3://..., gs://...")
    add("--model", default="test_deen_resnet", help="a name, or local-dir:FOLDER")
    add("--actors", type=int, default=2, help="extractors at work (default: 2)")
    add("--batch-size", type=int, default=16)
    add("--skip-broken", action="store_true", help="leave out images that cannot be read")
    add("--kill-one", metavar="FILE", default="", help="one actor makes this file and dies: a test")
    args = parser.parse_args(argv)
    ray, data = require("ray", "clients"), require("ray.data", "clients")
    start = time.perf_counter()
    # One more for the tasks that read and write.
    ray.init(num_cpus=args.actors + 1, include_dashboard=False, log_to_driver=False)
    try:
        endings = [ending[1:] for ending in IMAGE_EXTENSIONS]
        files = data.read_binary_files(args.source, include_paths=True, file_extensions=endings)
        rows = files.map_batches(
            Actor,
            fn_constructor_args=(args.model, args.modality, args.skip_broken, args.kill_one),
            concurrency=args.actors,
            batch_size=args.batch_size,
            batch_format="pyarrow",
        )
        ready = time.perf_counter()
        rows.write_parquet(args.output)
        end = time.perf_counter()
        count = data.read_parquet(args.output).count()
    finally:
        ray.shutdown()
    print(f"{count} rows: {args.output}")
    print(
        f"{end - start:.1f} s, {count / (end - start):.0f} rows/s; {ready - start:.1f} s of them "
        "until Ray had started"
    )


if __name__ == "__main__":
    main()
