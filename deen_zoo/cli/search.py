"""Ranked galleries for query images: table, JSON, picture; and the score to decide by.

Either side is a feature file (see "deen-zoo extract") or images and folders, which need --model and
their modality. Next to a feature file they are extracted with its descriptor, flip, normalisation
and intensity, unless --intensity says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from .extract import add_model_arguments, extractor, name_unreadable

if TYPE_CHECKING:
    from ..features.files import FeatureTable

EXAMPLES = """\
  deen-zoo search --query night.jpg --query-modality infrared \\
      --gallery people/ --gallery-modality visible --model test_deen_resnet -o ranking.png
  deen-zoo search --query night.safetensors --gallery people.safetensors -k 20 --json
  deen-zoo search --gallery labelled.safetensors --calibrate 0.001
  deen-zoo search --query night.safetensors --gallery people.safetensors --threshold 0.62"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modalities = ("visible", "infrared", "auto")
    add = parser.add_argument
    add("--query", nargs="+", metavar="SOURCE", help="feature files, or images and folders")
    add("--gallery", nargs="+", metavar="SOURCE", required=True, help="the like, to be searched")
    add("--query-modality", choices=modalities, help="modality of query images")
    add("--gallery-modality", choices=modalities, help="modality of gallery images")
    add("-k", type=int, default=8, metavar="N", help="hits per query")
    add("-o", "--output", metavar="FILE", help="picture of the first ten rankings, .png or .svg")
    add("--threshold", type=float, default=-math.inf, metavar="SCORE", help="leave out hits below")
    about = (
        "do not search: the threshold for this false-match rate, from labelled features; "
        "without --query, of the gallery's infrared rows against its visible ones"
    )
    add("--calibrate", type=float, metavar="RATE", help=about)
    add_model_arguments(parser, required=False)
    add("--json", action="store_true", help="all of it as JSON")


def run(args: argparse.Namespace) -> int:
    from ..errors import UserError
    from ..search import calibrate, search

    if args.query is None and args.calibrate is None:
        raise UserError("--query is missing: name the images or the feature file to search for")
    if args.calibrate is not None and (args.output or args.threshold > -math.inf):
        raise UserError(
            "--calibrate gives a threshold and no ranking: leave out --output and --threshold"
        )
    if args.output:
        from ..visualize import check_picture, ranking_sheet

        check_picture(args.output)
    query, gallery = _tables(args)
    code = name_unreadable({**(query.unreadable if query else {}), **gallery.unreadable})
    if args.calibrate is not None:
        _print(args, calibrate(query or gallery, gallery if query else None, args.calibrate))
        return code
    assert query is not None
    print(f"searching {len(gallery)} images for {len(query)} ...", file=sys.stderr, flush=True)
    device = "cpu" if args.device == "auto" else args.device
    result = search(query, gallery, args.k, device)
    if args.output:
        ranking_sheet(result, args.output, threshold=args.threshold)
    if args.json:
        found = {"provenance": gallery.provenance, "queries": result.to_dict(args.threshold)}
        print(json.dumps(found, indent=2))
    else:
        print(result.table(args.threshold))
    return code


def _tables(args: argparse.Namespace) -> tuple[FeatureTable | None, FeatureTable]:
    """Query and gallery, where images are extracted in the way of the other side's file."""
    from ..errors import UserError
    from ..features.files import SUFFIXES, read_feature_table

    sides = {"query": args.query, "gallery": args.gallery}
    tables: dict[str, FeatureTable] = {}
    for side, sources in sides.items():
        files = [s.endswith(SUFFIXES) for s in sources or ()]
        if any(files) and not all(files):
            raise UserError(
                f"--{side}: feature files and images together; extract the images first"
            )
        for source in sources or ():
            if not os.path.exists(source):
                raise UserError(f"--{side} {source}: there is no such file or folder")
        if any(files):
            tables[side] = read_feature_table(*sources)
    rest = [side for side, sources in sides.items() if sources and side not in tables]
    if rest:
        if args.model is None:
            raise UserError(f"--{rest[0]} is of images: name the --model to extract them with")
        like = next((table.provenance for table in tables.values()), {})
        options: dict[str, Any] = {k: like[k] for k in ("descriptor", "intensity") if k in like}
        options |= {k: like[k] == "true" for k in ("flip", "normalize") if k in like}
        options |= {"intensity": args.intensity} if args.intensity else {}
        make = extractor(args, **options)
        for side in rest:
            modality = getattr(args, f"{side}_modality")
            if modality is None and not all(source.endswith(".csv") for source in sides[side]):
                raise UserError(
                    f"--{side} is of images: say --{side}-modality visible, infrared or auto"
                )
            tables[side] = make.table(sides[side], modality)
    return tables.get("query"), tables["gallery"]


def _print(args: argparse.Namespace, found: Any) -> None:
    from ..errors import plural

    if args.json:
        print(json.dumps(vars(found), indent=2))
        return
    print(
        f"threshold {found.threshold:.4f}: takes {found.false_match_rate:.3%} of "
        f"{plural(found.different_pairs, 'pair')} of two people, and {found.true_match_rate:.1%} "
        f"of {plural(found.same_pairs, 'pair')} of one"
    )
    if found.false_matches < 30:
        print(
            f"the first share rests on {plural(found.false_matches, 'false match')}: give more "
            "labelled images, for at least 30, before relying on it",
            file=sys.stderr,
        )
