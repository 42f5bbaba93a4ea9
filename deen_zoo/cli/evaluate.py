"""Score any model's saved features by a named protocol, next to the published numbers."""

from __future__ import annotations

import argparse
import json
import sys

EXAMPLES = """\
  deen-zoo evaluate features.safetensors --protocol llcm-ir2vis
  deen-zoo evaluate vis.npz ir.npz --protocol sysu-all --data-root SYSU-MM01 --draw official
  deen-zoo evaluate split3.npz --protocol regdb-vis2ir --split 3 --json
  deen-zoo evaluate features.npz --protocol llcm-ir2vis --rerank --per-query queries.csv

A feature file has features (images, D), paths, identity, camera, infrared; any program writes it:
  np.savez("features.npz", features=f, paths=p, identity=i, camera=c, infrared=r)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..data.datasets import several_splits
    from ..data.protocols import PROTOCOLS

    add = parser.add_argument
    add("features", nargs="+", metavar="FEATURES", help=".safetensors or .npz; several are joined")
    about = f"{', '.join(PROTOCOLS)}, or package.module:name of your own"
    add("--protocol", required=True, metavar="PROTOCOL", help=about)
    add("--data-root", metavar="ROOT", help="the dataset, to read labels or official draws from")
    add("--trials", type=int, metavar="N", help="how many gallery draws (default: 10)")
    about = f"the split of the features' model, among {several_splits()}"
    add("--split", type=int, default=1, metavar="N", help=about)
    official = ", ".join(name for name, row in PROTOCOLS.items() if row.official_draw)
    about = f"galleries as the reference draws them, or the dataset's authors ({official})"
    add("--draw", choices=("seeded", "official"), default="seeded", help=about)
    about = "gallery images of each identity and camera; the multi-shot setting has 10"
    add("--shots", type=int, default=1, metavar="N", help=about)
    about = "with k-reciprocal re-ranking, under its own name (k1 20, k2 6, lambda 0.3)"
    add("--rerank", action="store_true", help=about)
    add("--per-query", metavar="CSV", help="write a row for each query of each trial")
    add("--camera-pairs", action="store_true", help="also score each pair of cameras")
    add("--json", action="store_true", help="print JSON, fractions, instead of the table")


def run(args: argparse.Namespace) -> int:
    from ..data.datasets import get_dataset, open_dataset, several_splits
    from ..data.protocols import get_protocol, read_permutations
    from ..data.reader import drawn_people
    from ..errors import UserError
    from ..evaluation import KReciprocal, evaluate, terminal_table
    from ..evaluation.known import refuse_known_people
    from ..features.files import read_feature_table
    from ..io import check_target

    protocol, name = get_protocol(args.protocol), args.protocol.rpartition(":")[2]
    if protocol.sampled and args.split != 1:
        raise UserError(
            f"--split is for {several_splits()}; {name} has one split and --trials draws"
        )
    if not protocol.sampled and args.trials not in (None, 1):
        raise UserError(f"--trials is for drawn galleries; {name} draws none: say --split")
    if args.draw == "official" and not args.data_root:
        raise UserError("--draw official is read from the dataset's own folder: give --data-root")
    if args.per_query:
        check_target(args.per_query)
    table = read_feature_table(*args.features)
    if table.provenance.get("normalize") == "true" and table.provenance.get("flip") == "true":
        print(
            "note: these rows are L2-normalised and those behind published numbers are not; "
            "'deen-zoo extract --raw' writes rows of the same kind",
            file=sys.stderr,
        )
    dataset = open_dataset(protocol.dataset, args.data_root) if args.data_root else None
    if dataset:
        features, samples = table.of_dataset(dataset, args.split)
    else:
        features, samples = table.features, table.samples()
    kind, tested = get_dataset(protocol.dataset), {sample.identity for sample in samples}
    refuse_known_people(table.trained_on, table.source, kind, args.split, tested, dataset)
    permutations = read_permutations(args.data_root) if args.draw == "official" else None
    rerank = KReciprocal() if args.rerank else None
    print(f"{name}: {len(samples)} images ...", file=sys.stderr, flush=True)
    result = evaluate(
        features, samples, name, trials=args.trials if protocol.sampled else [args.split],
        draw=args.draw, shots=args.shots, permutations=permutations, rerank=rerank,
        camera_pairs=args.camera_pairs,
    )  # fmt: skip
    if args.per_query:
        result.write_queries(args.per_query)
    drawn = dataset.drawn if dataset else drawn_people(samples[0].path)
    method = table.provenance.get("method")
    entry = result.to_dict(drawn, method, str(table.trained_on.get("source", "")))
    found, whole = result.counts["queries"], result.expected_counts.get("queries", 0)
    if entry["published"] and whole > 2 * found:
        print(
            f"note: {found:,} queries, and the published numbers are of {whole:,}: this is not "
            f"{kind.title}'s whole test set, so do not compare them",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(entry, indent=2))
        return 0
    print(terminal_table([entry]))
    if drawn:
        print("\nThe people are drawn: this says nothing about real cameras.")
    if result.camera_pairs:
        print("\nquery camera, gallery camera, valid queries, r1, mAP")
    for a, b, queries, *scores in result.camera_pairs:
        cells = ["no match" if s is None else f"{100 * s:.2f}" for s in scores]
        print(f"{a:>3} {b:>3} {queries:>8.1f} {cells[0]:>9} {cells[1]:>9}")
    return 0
