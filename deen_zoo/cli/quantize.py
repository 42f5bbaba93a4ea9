"""Write a checkpoint folder with int8 graphs for OpenVINO, calibrated and checked on images.

Half of the people calibrate; on the others int8 is compared with float32, and nothing is written
where it is worse than the bounds.
"""

from __future__ import annotations

import argparse
import json
import sys

EXAMPLES = """\
  deen-zoo quantize runs/llcm/checkpoint LLCM/ llcm-int8 --layout llcm
  deen-zoo quantize test_deen_resnet my-people/ tiny-int8 --same-first-hit 0.9
  deen-zoo extract night/ -o night.safetensors --model llcm-int8 --modality infrared \\
      --engine openvino --precision int8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..data.datasets import known_datasets, several_splits
    from ..training.settings import add_options

    add = parser.add_argument
    add("model", metavar="MODEL", help="a name or a checkpoint folder")
    add("images", metavar="FOLDER", help="labelled images of both modalities")
    add("output", metavar="OUT", help="the checkpoint folder to write")
    about = f"layout of FOLDER: {known_datasets()}"
    add("--layout", metavar="DATASET", default="own", help=about)
    add("--split", type=int, default=1, metavar="N", help=f"one of {several_splits()}")
    add("--calibration-images", type=int, default=128, metavar="N", help="images of each modality")
    about = "least share of queries whose first hit stays"
    add("--same-first-hit", type=float, default=0.985, metavar="SHARE", help=about)
    add("--map-drop", type=float, default=0.01, metavar="DROP", help="largest loss of mAP, of 1")
    add_options(parser, ["threads"])
    add("--json", action="store_true", help="print the comparison as JSON")


def run(args: argparse.Namespace) -> int:
    from ..data import open_dataset
    from ..features.quantize import quantize

    dataset = open_dataset(args.layout, args.images)
    samples = dataset.test(split=args.split)
    print(f"quantizing {args.model} ...", file=sys.stderr, flush=True)
    options = (args.calibration_images, args.same_first_hit, args.map_drop, args.threads)
    report = quantize(args.model, samples, args.output, *options)
    if args.json:
        print(json.dumps({"folder": args.output, **report}))
    else:
        print(
            f"{args.output}: the first hit of {report['same_first_hit']:.1%} of "
            f"{report['queries']} queries is the same, mAP {report['mAP_float32']:.4f} became "
            f"{report['mAP_int8']:.4f}; calibrated on {report['calibration_images']} images"
        )
    return 0
