"""Write a synthetic dataset in the layout of SYSU-MM01, RegDB or LLCM."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from . import seed

EXAMPLES = """\
  deen-zoo synthesize llcm data/synthetic-llcm --people 100 --seed 0
  deen-zoo synthesize sysu data/synthetic-sysu --people 500 --images-per-camera 8
  deen-zoo synthesize regdb data/synthetic-regdb --people 64 --json
  deen-zoo synthesize llcm data/small --people 8 --sheet people.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..synthetic.layouts import LAYOUTS

    add = parser.add_argument
    add("layout", choices=tuple(LAYOUTS), help="whose layout")
    add("root", metavar="ROOT", help="folder to write: new, or empty")
    add("--people", type=int, default=32, metavar="N", help="how many are drawn")
    add("--seed", type=seed, default=0, help="seed of the people and their pictures")
    usual = ", ".join(f"{name} {spec.images_per_camera}" for name, spec in LAYOUTS.items())
    about = f"images of each person in each camera that sees them ({usual})"
    add("--images-per-camera", type=int, metavar="N", help=about)
    about = "share of the people to test on (as in the real dataset)"
    add("--test-fraction", type=float, metavar="F", help=about)
    add("--workers", type=int, metavar="N", help="processes that draw (all CPU cores)")
    add("--sheet", metavar="PNG", help="also write a contact sheet of the people")
    add("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    from ..io import check_target, write_atomically
    from ..synthetic import contact_sheet, synthesize

    if args.sheet and Path(args.sheet).absolute().parent != Path(args.root).absolute():
        check_target(args.sheet)
    names = ("people", "seed", "images_per_camera", "test_fraction", "workers")
    tree = synthesize(args.layout, args.root, **{name: getattr(args, name) for name in names})
    if args.sheet:
        sheet = contact_sheet(args.layout, args.seed, min(args.people, 6))
        picture = io.BytesIO()
        sheet.save(picture, "PNG", optimize=True)
        write_atomically(args.sheet, picture.getvalue())
    if args.json:
        print(json.dumps(tree._asdict(), indent=2))
    else:
        images = tree.visible_images + tree.infrared_images
        print(
            f"{args.root}: {images:,} images ({tree.visible_images:,} visible, "
            f"{tree.infrared_images:,} infrared) of {tree.identities} people, "
            f"{tree.test_identities} of them to test on"
        )
    return 0
