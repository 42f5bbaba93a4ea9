"""Search a vector database: from a Parquet file into LanceDB, with filters by camera and time.

    pip install 'deen-zoo[parquet]' lancedb
    python examples/search_in_a_database.py
    python examples/search_in_a_database.py --gallery day.parquet --query night.parquet

``deen-zoo extract ... -o day.parquet`` writes such files. Without them synthetic people are drawn.
The exact search of ``deen-zoo search`` reads every row for every query; a database has an index,
keeps other facts about an image next to its descriptor, and takes new rows while it is searched.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from deen_zoo import FeatureExtractor
from deen_zoo.errors import require
from deen_zoo.features import FeatureTable, read_feature_table, write_feature_table
from deen_zoo.search import search
from deen_zoo.synthetic import synthesize

WORLD = 3  # the shipped tiny model was trained on people of world 0


class Found(NamedTuple):
    database: list[str]  # first hit of each query
    exact: list[str]
    camera: int
    filtered_cameras: list[int]


def draw_people(folder: str) -> tuple[str, str]:
    """Parquet files of visible and of infrared images."""
    synthesize("llcm", f"{folder}/people", 12, seed=WORLD, images_per_camera=1, test_fraction=0.5)
    extractor = FeatureExtractor("test_deen_resnet")
    files = {"visible": f"{folder}/day.parquet", "infrared": f"{folder}/night.parquet"}
    for modality, file in files.items():
        part = "test_vis" if modality == "visible" else "test_nir"
        table = extractor.table([f"{folder}/people/{part}"], modality=modality)
        write_feature_table(file, [table])
    return files["visible"], files["infrared"]


def open_database(folder: str, gallery: FeatureTable) -> Any:
    """A LanceDB table of the gallery; camera and time would come from the recording system."""
    pa = require("pyarrow", "parquet")
    rows = gallery.to_arrow()
    cameras = [1 + i % 3 for i in range(len(gallery))]
    times = [60 * i for i in range(len(gallery))]  # seconds since midnight
    for name, values in (("camera", cameras), ("time", times)):
        if name in rows.column_names:
            rows = rows.drop_columns([name])
        rows = rows.append_column(name, pa.array(values, pa.int64()))
    rows = rows.replace_schema_metadata(None)
    return require("lancedb", "clients").connect(folder).create_table("gallery", rows)


def nearest(database: Any, row: Any, k: int, where: str = "") -> list[dict[str, Any]]:
    """The k rows of the largest dot product, the best first."""
    query = database.search(row, vector_column_name="features").distance_type("dot").limit(k)
    hits: list[dict[str, Any]] = (query.where(where, prefilter=True) if where else query).to_list()
    return hits


def main(argv: list[str] | None = None) -> Found:
    parser = argparse.ArgumentParser(description="Search a vector database.")
    parser.add_argument("--gallery", help="a feature file of visible images")
    parser.add_argument("--query", help="a feature file of infrared images")
    parser.add_argument("--camera", type=int, default=2, help="only this camera (default: 2)")
    parser.add_argument("--after", type=int, default=600, help="only after this second of the day")
    parser.add_argument("--output", type=Path, help="keep the database in this folder")
    args = parser.parse_args(argv)
    if bool(args.gallery) != bool(args.query):
        parser.error("give both --gallery and --query, or neither")
    with tempfile.TemporaryDirectory() as scratch:
        files = (args.gallery, args.query) if args.gallery else draw_people(scratch)
        gallery, queries = (read_feature_table(file) for file in files)
        database = open_database(str(args.output or f"{scratch}/database"), gallery)
        rows = queries.features.float().numpy()
        first = [nearest(database, row, 1)[0]["path"] for row in rows]
        exact = [gallery.paths[i] for i in search(queries, gallery, 1).indices[:, 0].tolist()]
        where = f"camera = {args.camera} and time > {args.after}"
        hits = nearest(database, rows[0], 5, where)
    same = sum(a == b for a, b in zip(first, exact, strict=True))
    print(f"{same} of {len(exact)} first hits are those of the exact search")
    print(f"{Path(queries.paths[0]).name}, only where {where}:")
    for hit in hits:
        print(f"  {1 - hit['_distance']:.3f}  camera {hit['camera']}  {hit['time']:>5} s  "
              f"{Path(hit['path']).name}")  # fmt: skip
    return Found(first, exact, args.camera, [hit["camera"] for hit in hits])


if __name__ == "__main__":
    main()
