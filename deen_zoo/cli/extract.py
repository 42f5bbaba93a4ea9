"""Images or folders to a feature file with their paths, modality, labels and provenance.

A killed extraction goes on where it stopped when the same command is given again. Images that
cannot be read are named on stderr and in the file; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

EXAMPLES = """\
  deen-zoo extract gallery/ -o gallery.safetensors --model test_deen_resnet --modality visible
  deen-zoo extract night/*.jpg -o night.npz --model runs/llcm/checkpoint --modality infrared
  deen-zoo extract images.csv -o own.safetensors --model hf-hub:ORG/NAME
  deen-zoo extract day/ -o day.parquet --model runs/llcm/checkpoint --modality visible \\
      --engine openvino
  deen-zoo extract LLCM/ --layout llcm -o llcm.safetensors --model runs/llcm/checkpoint --raw
  torchrun --nproc-per-node 4 -m deen_zoo extract big/ -o big.safetensors --dtype float16 \\
      --model runs/llcm/checkpoint --modality auto

A CSV file has a header line path,identity,camera,modality; all but the path may be left out.
The layout "own" is ROOT/visible/IDENTITY/*.jpg and ROOT/infrared/IDENTITY/*.jpg, or these two
below ROOT/test."""


def add_model_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """The options of a FeatureExtractor, shared by the verbs that make one."""
    from ..data.images import check_intensity
    from ..training.settings import EXTRACTION, add_options

    add = parser.add_argument
    about = "a name, a checkpoint folder, or hf-hub:ORG/NAME; its weights are loaded"
    add("--model", required=required, help=about)
    add_options(parser, EXTRACTION)
    add("--project", metavar="HEAD", help="short descriptors, by a head of deen-zoo project")
    about = "16-bit images: full, minmax, percentile, or LOW,HIGH (default: as in training)"
    add("--intensity", type=check_intensity, metavar="RULE", help=about)


def extractor(args: argparse.Namespace, **options: Any) -> Any:
    """The FeatureExtractor of the options above."""
    from ..features.extractor import FeatureExtractor
    from ..training.settings import EXTRACTION

    names = (*EXTRACTION, "intensity", "project")
    common = {name: getattr(args, name) for name in names}
    return FeatureExtractor(args.model, **(common | options))


def name_unreadable(unreadable: dict[str, str]) -> int:
    """Name the images without a row on stderr; the exit code that says so."""
    from ..terminal import one_line

    for reason in unreadable.values():
        print(f"unreadable: {one_line(reason)}", file=sys.stderr)
    return 1 if unreadable else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..data.datasets import known_datasets, several_splits

    add = parser.add_argument
    add("source", nargs="+", metavar="SOURCE", help="images, folders (at any depth), CSV files")
    add("-o", "--output", required=True, metavar="FILE", help=".safetensors, .parquet, or .npz")
    add("--modality", choices=("visible", "infrared", "auto"), help="auto: grey is infrared")
    about = f"SOURCE is the root of such a tree: its test images, with labels; {known_datasets()}"
    add("--layout", metavar="DATASET", help=about)
    add("--split", type=int, default=1, metavar="N", help=f"one of {several_splits()}")
    add_model_arguments(parser, required=True)
    add("--descriptor", default="official", metavar="NAME", help="bn, pool, original, ...")
    add("--dtype", choices=("float32", "float16"), default="float32", help="type of the rows")
    add("--no-flip", action="store_true", help="half the time, without the mirrored image")
    about = "rows as the reference compares them, not L2-normalised: for evaluate"
    add("--raw", action="store_true", help=about)
    add("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    from ..device import choose_device
    from ..distributed import join
    from ..errors import UserError, plural
    from ..features.files import check_output

    check_output(args.output)
    if args.split != 1 and not args.layout:
        raise UserError("--split is one of a dataset: name its --layout, or leave it out")
    source = _samples(args) if args.layout else args.source
    with join(choose_device(args.device)) as world:
        make = extractor(
            args, device=str(world.device), flip=False if args.no_flip else None,
            descriptor=args.descriptor, dtype=args.dtype, normalize=not args.raw,
        )  # fmt: skip
        if world.main:
            print(f"extracting to {args.output} ...", file=sys.stderr, flush=True)
        table = make.write(source, args.output, args.modality, world)
        main = world.main
    if not main:
        return 0
    code = name_unreadable(table.unreadable)
    rows, dim = len(table), table.features.shape[1]
    if args.json:
        found = {"file": args.output, "rows": rows, "dim": dim, "unreadable": table.unreadable}
        print(json.dumps({**found, "provenance": table.provenance}))
    else:
        unreadable = plural(len(table.unreadable), "image")
        print(f"{args.output}: {plural(rows, 'row')} of {dim:,} numbers, {unreadable} unreadable")
    return code


def _samples(args: argparse.Namespace) -> Any:
    from ..data import open_dataset
    from ..errors import UserError

    if len(args.source) != 1:
        raise UserError(f"--layout {args.layout} takes one root, not {len(args.source)} sources")
    dataset = open_dataset(args.layout, args.source[0])
    return dataset.test(split=args.split)
