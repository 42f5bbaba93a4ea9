"""Speed and memory of this package, beside the reference's when a checkout of it is given.

Each program runs in a process of its own, in turns, on the same inputs. The whole of it takes about
half an hour on two CPU cores; name a few works for a part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from deen_zoo.device import keep_freed_memory
from deen_zoo.errors import UserError
from deen_zoo.visualize import check_picture

from . import WORKS, benchmark, draw_curves, environment, measure_curves, table

EXAMPLES = """\
  python -m benchmarks --official LLCM/DEEN
  python -m benchmarks ranking losses --official LLCM/DEEN --rounds 9 --json
  python -m benchmarks descriptors --model test_deen_resnet
  python -m benchmarks start --curves scaling.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("works", nargs="*", metavar="WORK", help=f"{', '.join(WORKS)} (default: all)")
    add("--official", metavar="FOLDER", help="the DEEN folder of a checkout of the reference")
    add("--model", default="deen_resnet50_llcm", help="default: deen_resnet50_llcm")
    add("--images", type=int, default=64, help="in two batches of descriptors (default: 64)")
    add("--rounds", type=int, help="of each work (default: 1 to 15, few of what takes minutes)")
    add("--threads", type=int, help="of torch (default: torch's own)")
    add("--curves", metavar="PICTURE", help="also measure how it scales, and draw it: PNG or SVG")
    add("--json", action="store_true", help="everything as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.curves:
        check_picture(args.curves)
    rows = benchmark(
        args.works or tuple(WORKS), args.official,
        model=args.model, images=args.images, rounds=args.rounds, threads=args.threads, say=say,
    )  # fmt: skip
    machine = environment(args.threads)
    curves = None
    if args.curves:
        curves = measure_curves(args.model, threads=args.threads, say=say)
        draw_curves(curves, args.curves)
    if args.json:
        found = [{**asdict(row), "met": row.met} for row in rows]
        print(
            json.dumps({"environment": machine, "rows": found, "curves": curves and asdict(curves)})
        )
        return 0
    print(table(rows))
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items() if value))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        return run(args)
    except (UserError, OSError) as error:
        print(f"benchmarks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
