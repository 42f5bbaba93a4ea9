"""Fit short descriptors: PCA of features, applied by extract --project.

Give features of many images like those to be searched, extracted with the model and options that
the head is to be used with. Labels are not needed, but for the table of --evaluate.
"""

from __future__ import annotations

import argparse
import json

EXAMPLES = """\
  deen-zoo project train.safetensors -o runs/llcm/checkpoint/project-256.safetensors --dim 256
  deen-zoo extract night/ -o night.safetensors --model runs/llcm/checkpoint --modality infrared \\
      --project runs/llcm/checkpoint/project-256.safetensors
  deen-zoo project train.safetensors -o head.safetensors --evaluate labelled.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("features", nargs="+", metavar="FEATURES", help="feature files; several are joined")
    add("-o", "--output", required=True, metavar="HEAD", help="the head, .safetensors")
    add("--dim", type=int, default=256, metavar="N", help="numbers in a descriptor")
    about = "0 leaves distances as they are, 1 makes all directions count the same"
    add("--whiten", type=float, default=0.5, metavar="POWER", help=about)
    about = "labelled features of other people: print mAP against size, infrared to visible"
    add("--evaluate", nargs="+", metavar="FEATURES", help=about)
    add("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    from ..features.files import check_comparable, read_feature_table
    from ..features.project import check_head_name, fit_head, size_table, write_head

    check_head_name(args.output)
    table = read_feature_table(*args.features)
    held_out = read_feature_table(*args.evaluate) if args.evaluate else None
    if held_out:
        check_comparable(table, held_out)
    head = fit_head(table, args.dim, args.whiten)
    write_head(head, args.output)
    sizes = size_table(table, held_out, whiten=args.whiten) if held_out else []
    if args.json:
        found = {"file": args.output, "dim": head.dim, "rows": len(table), "sizes": sizes}
        print(json.dumps(found))
        return 0
    print(f"{args.output}: {len(head.mean)} numbers to {head.dim}, fitted on {len(table)} rows")
    if sizes:
        print("   size   rank-1      mAP")
        for row in sizes:
            print(f"{row['dim']:>7} {row['r1']:>8.1%} {row['mAP']:>8.1%}")
    return 0
