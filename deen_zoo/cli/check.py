"""Check a dataset folder: counts found and expected, every broken, missing or stray file.

Exit code 1 says that the folder is unusable as it is, 2 that it is not such a dataset at all.
"""

from __future__ import annotations

import argparse
import json
import sys

EXAMPLES = """\
  deen-zoo check sysu /data/SYSU-MM01
  deen-zoo check llcm /data/LLCM --fast
  deen-zoo check regdb /data/RegDB --json > regdb.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..data.datasets import known_datasets

    add = parser.add_argument
    add("dataset", help=known_datasets())
    add("root", metavar="ROOT", help="the folder as its authors give it")
    about = "do not decode images: truncated ones are not found"
    add("--fast", action="store_true", help=about)
    add("--json", action="store_true", help="the full report as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    from ..data.check import check_dataset

    print(f"checking {args.dataset} at {args.root}", file=sys.stderr)
    report = check_dataset(args.dataset, args.root, decode=not args.fast, progress=True)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.usable else 1
