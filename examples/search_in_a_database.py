"""Search a vector database: from a Parquet file into LanceDB, with filters by camera and time.

    pip install 'deen-zoo[parquet]' lancedb
    python examples/search_in_a_database.py
    python examples/search_in_a_database.py --gallery day.parquet --query night.parquet \\
        --where "camera = 2"
    python examples/search_in_a_database.py --rows 100000 --index  # how fast, at which size

``deen-zoo extract ... -o day.parquet`` writes such files; columns that are added to them, such as
the time, come along and can be asked for. Without files synthetic people are drawn. The exact
search of ``deen-zoo search`` reads every row for every query; a database has an index (``--index``,
of 256 rows or more), keeps other facts about an image next to its descriptor, and takes and drops
rows between two queries. ``--rows`` draws rows in place of people, to measure with.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from deen_zoo import FeatureExtractor
from deen_zoo.data import open_dataset
from deen_zoo.errors import UserError, brief, require
from deen_zoo.features import FeatureTable, read_feature_table, write_feature_table
from deen_zoo.search import search
from deen_zoo.synthetic import synthesize

WORLD = 3  # the shipped tiny model was trained on people of world 0
WHERE = "camera <= 4 and time > 600"  # of drawn people
HITS, QUERIES, CAMERAS = 10, 32, 9


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


def draw_rows(folder: str, count: int, numbers: int) -> tuple[str, str]:
    """Parquet files of ``count`` rows of length 1, about ten around each centre, and of queries
    around the same centres."""
    random = torch.Generator().manual_seed(WORLD)
    centres = torch.randn(-(-count // 10), numbers, generator=random)
    files = {"visible": f"{folder}/day.parquet", "infrared": f"{folder}/night.parquet"}
    for (modality, file), n in zip(files.items(), (count, QUERIES), strict=True):
        rows = centres[torch.arange(n) % len(centres)]
        rows += torch.randn(n, numbers, generator=random)
        cameras = np.arange(n) % CAMERAS + 1
        labels = {"camera": cameras, "infrared": np.full(n, modality == "infrared")}
        names = [f"/data/gallery/cam{camera}/{i:06}.jpg" for i, camera in enumerate(cameras)]
        rows = torch.nn.functional.normalize(rows)
        write_feature_table(file, [FeatureTable(file, rows, names, labels)])
    return files["visible"], files["infrared"]


def open_database(folder: str, file: str) -> Any:
    """A LanceDB table of a Parquet file's columns."""
    rows = require("pyarrow.parquet", "parquet").read_table(file).replace_schema_metadata(None)
    return (
        require("lancedb", "clients")
        .connect(folder)
        .create_table("gallery", rows, mode="overwrite")
    )


def add_index(database: Any) -> None:
    """Rows in groups, and short codes of them: a query reads the nearest groups alone."""
    pq = require("lancedb.index", "clients").IvfPq(distance_type="dot")
    database.create_index("features", config=pq)


def nearest(database: Any, row: Any, k: int, where: str = "") -> list[dict[str, Any]]:
    """The k rows of the largest dot product, the best first."""
    query = database.search(row, vector_column_name="features").distance_type("dot").limit(k)
    # With an index: how many groups are read, and for how many times k rows the score is computed
    # from the row itself. Without one neither has a meaning.
    query = query.nprobes(20).refine_factor(10)
    try:
        found = query.where(where, prefilter=True).to_list() if where else query.to_list()
    except (ValueError, RuntimeError) as error:  # no such column, or no SQL
        columns = ", ".join(database.schema.names)
        raise UserError(f"--where {where}: {brief(error)}; the columns are {columns}") from error
    hits: list[dict[str, Any]] = found
    return hits


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it took, and what it gave."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main(argv: list[str] | None = None) -> Found:
    parser = argparse.ArgumentParser(description="Search a vector database.")
    parser.add_argument("--gallery", help="a Parquet file of visible images")
    parser.add_argument("--query", help="a feature file of infrared images")
    parser.add_argument("--where", help=f"SQL over its columns; for drawn people: {WHERE}")
    parser.add_argument("--output", type=Path, help="keep the database in this folder")
    parser.add_argument("--index", action="store_true", help="build an index, IVF_PQ")
    parser.add_argument("--rows", type=int, metavar="N", help="draw N rows in place of people")
    parser.add_argument("--numbers", type=int, default=256, help="in each of these rows (256)")
    args = parser.parse_args(argv)
    if bool(args.gallery) != bool(args.query) or (args.gallery and args.rows):
        parser.error("give both --gallery and --query, or --rows, or none of the three")
    where = args.where or ("" if args.gallery or args.rows else WHERE)
    with tempfile.TemporaryDirectory() as scratch:
        files = (args.gallery, args.query)
        if args.rows:
            files = draw_rows(scratch, args.rows, args.numbers)
        elif not args.gallery:
            files = draw_people(scratch)
        found = compare(files, args.output or Path(scratch, "database"), args.index, where)
    return found


def compare(files: tuple[str, str], folder: Path, index: bool, where: str) -> Found:
    """The database next to the exact search: what both find, and how fast."""
    require("lancedb", "clients")  # its import is not timed
    gallery, queries = (read_feature_table(file) for file in files)
    rows = queries.features.float().numpy()
    writing, database = timed(lambda: open_database(str(folder), files[0]))
    indexing, _ = timed(lambda: add_index(database)) if index else (0.0, None)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    hits = nearest(database, rows[0], 5, where)  # the first query also opens the files
    asking, first = timed(lambda: [nearest(database, row, HITS)[0]["path"] for row in rows])
    together, result = timed(lambda: search(queries, gallery, HITS))
    alone, _ = timed(lambda: search(queries.select(np.arange(len(rows)) == 0), gallery, HITS))
    exact = [gallery.paths[i] for i in result.indices[:, 0].tolist()]

    n, each = len(gallery), 1000 / len(rows)
    print(f"database: {n / writing:,.0f} rows/s written, {size / n:,.0f} bytes per row")
    if index:
        print(f"its index: built in {indexing:.1f} s")
    print(
        f"a query: {asking * each:.1f} ms in the database, {1000 * alone:.1f} ms by the exact "
        f"search, {together * each:.1f} ms with {len(rows)} at once"
    )
    same = sum(a == b for a, b in zip(first, exact, strict=True))
    print(f"{same} of {len(exact)} first hits are those of the exact search")
    print(f"{Path(queries.paths[0]).name}, where {where or 'nothing is asked'}:")
    for hit in hits:
        others = {name: hit[name] for name in ("camera", "time") if hit.get(name) is not None}
        print(f"  {1 - hit['_distance']:.3f}  {Path(hit['path']).name}  {others or ''}")
    return Found(first, exact, hits)


if __name__ == "__main__":
    main()
