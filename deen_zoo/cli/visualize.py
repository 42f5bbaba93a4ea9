"""Draw ranking sheets, similarity histograms, t-SNE or activation maps, as PNG, SVG or PDF."""

from __future__ import annotations

import argparse
import sys

from . import seed
from .extract import add_model_arguments, extractor

EXAMPLES = """\
  deen-zoo visualize ranking llcm.safetensors -o ranking.png --queries 6 -k 8
  deen-zoo visualize tsne llcm.safetensors -o tsne.svg --people 20
  deen-zoo visualize similarities llcm.safetensors -o similarities.png
  deen-zoo visualize activations night.jpg -o maps.png --model test_deen_resnet \\
      --modality infrared

The first three take labelled feature files, which "deen-zoo extract" makes of a dataset (--layout)
or of a CSV file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("kind", choices=("ranking", "similarities", "tsne", "activations"))
    add("source", nargs="+", metavar="SOURCE", help="feature files; images for activations")
    add("-o", "--output", required=True, metavar="FILE", help=".png, .svg or .pdf")
    add("--queries", type=int, default=5, metavar="N", help="ranking: infrared images to search")
    add("-k", type=int, default=8, metavar="N", help="ranking: hits per query")
    add("--people", type=int, default=20, metavar="N", help="tsne: number of people")
    add("--seed", type=seed, default=0, help="chooses the queries or people")
    about = "similarities: the share of the pairs of two people that the threshold takes"
    add("--calibrate", type=float, default=0.01, metavar="RATE", help=about)
    about = "activations: the images' modality"
    add("--modality", choices=("visible", "infrared", "auto"), help=about)
    add_model_arguments(parser, required=False)


def run(args: argparse.Namespace) -> int:
    from .. import visualize
    from ..errors import UserError
    from ..features.files import read_feature_table

    visualize.check_picture(args.output)
    if args.kind == "activations":
        if args.model is None:
            raise UserError("activations need a model: name it with --model")
        visualize.activation_maps(extractor(args), args.source, args.output, args.modality)
    else:
        table = read_feature_table(*args.source)
        print(f"drawing {args.kind} of {len(table)} rows ...", file=sys.stderr, flush=True)
        if args.kind == "ranking":
            visualize.sample_ranking(table, args.output, args.queries, args.k, args.seed)
        elif args.kind == "tsne":
            visualize.tsne(table, args.output, args.people, args.seed)
        else:
            visualize.similarities(table, args.output, args.calibrate)
    print(args.output)
    return 0
