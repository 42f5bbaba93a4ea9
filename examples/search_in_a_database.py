"""Search a vector database: from a Parquet file into LanceDB, with filters by camera and time.

    pip install 'deen-zoo[parquet]' lancedb
    python examples/search_in_a_database.py
    python examples/search_in_a_database.py --gallery day.parquet --query night.parquet \\
        --where "camera = 2"

``deen-zoo extract ... -o day.parquet`` writes such files; columns that are added to them, such as
the time, come along and can be asked for. Without files synthetic people are drawn. The exact
search of ``deen-zoo search`` reads every row for every query; a database has an index, keeps other
facts about an image next to its descriptor, and takes new rows while it is searched.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from deen_zoo import FeatureExtractor
from deen_zoo.data import open_dataset
from deen_zoo.errors import require
from deen_zoo.features import read_feature_table
from deen_zoo.search import search
from deen_zoo.synthetic import synthesize

WORLD = 3  # the shipped tiny model was trained on people of world 0
WHERE = "camera <= 4 and time > 600"  # of drawn people


class Found(NamedTuple):
    database: list[str]  # first hit of each query
    exact: list[str]
    filtered: list[dict[str, Any]]  # hits of the first query


def draw_people(folder: str) -> tuple[str, str]:
    """Parquet files of visible and of infrared images, with their cameras and times."""
    pa, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    root = f"{folder}/people"
    synthesize("llcm", root, 12, seed=WORLD, images_per_camera=1, test_fraction=0.5)
    dataset, extractor = open_dataset("llcm", root), FeatureExtractor("test_deen_resnet")
    files = {"visible": f"{folder}/day.parquet", "infrared": f"{folder}/night.parquet"}
    for modality, file in files.items():
        rows = extractor.table(dataset.test(modality)).to_arrow()
        seconds = pa.array([60 * i for i in range(len(rows))])  # as a recording system knows them
        parquet.write_table(rows.append_column("time", seconds), file)
    return files["visible"], files["infrared"]


def open_database(folder: str, file: str) -> Any:
    """A LanceDB table of a Parquet file's columns."""
    rows = require("pyarrow.parquet", "parquet").read_table(file).replace_schema_metadata(None)
    return (
        require("lancedb", "clients")
        .connect(folder)
        .create_table("gallery", rows, mode="overwrite")
    )


def nearest(database: Any, row: Any, k: int, where: str = "") -> list[dict[str, Any]]:
    """The k rows of the largest dot product, the best first."""
    query = database.search(row, vector_column_name="features").distance_type("dot").limit(k)
    hits: list[dict[str, Any]] = (query.where(where, prefilter=True) if where else query).to_list()
    return hits


def main(argv: list[str] | None = None) -> Found:
    parser = argparse.ArgumentParser(description="Search a vector database.")
    parser.add_argument("--gallery", help="a Parquet file of visible images")
    parser.add_argument("--query", help="a feature file of infrared images")
    parser.add_argument("--where", help=f"SQL over its columns; for drawn people: {WHERE}")
    parser.add_argument("--output", type=Path, help="keep the database in this folder")
    args = parser.parse_args(argv)
    if bool(args.gallery) != bool(args.query):
        parser.error("give both --gallery and --query, or neither")
    with tempfile.TemporaryDirectory() as scratch:
        files = (args.gallery, args.query) if args.gallery else draw_people(scratch)
        gallery, queries = (read_feature_table(file) for file in files)
        database = open_database(str(args.output or f"{scratch}/database"), files[0])
        rows = queries.features.float().numpy()
        first = [nearest(database, row, 1)[0]["path"] for row in rows]
        exact = [gallery.paths[i] for i in search(queries, gallery, 1).indices[:, 0].tolist()]
        where = args.where or ("" if args.gallery else WHERE)
        hits = nearest(database, rows[0], 5, where)
    same = sum(a == b for a, b in zip(first, exact, strict=True))
    print(f"{same} of {len(exact)} first hits are those of the exact search")
    print(f"{Path(queries.paths[0]).name}, where {where or 'nothing is asked'}:")
    for hit in hits:
        others = {name: hit[name] for name in ("camera", "time") if hit.get(name) is not None}
        print(f"  {1 - hit['_distance']:.3f}  {Path(hit['path']).name}  {others or ''}")
    return Found(first, exact, hits)


if __name__ == "__main__":
    main()
