"""Convert an official .t checkpoint to a folder with config.json and model.safetensors.

The folder loads with timm.create_model("local-dir:DIR", pretrained=True) after import deen_zoo.
"""

from __future__ import annotations

import argparse
import json

EXAMPLES = """\
  deen-zoo convert llcm_deen_p4_n6_lr_0.1_seed_0_best.t weights/llcm --model deen_resnet50_llcm
  deen-zoo convert sysu_best.t weights/sysu --model deen_resnet50_sysu --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..models import list_models

    parser.add_argument("source", metavar="OFFICIAL.t", help="what the official train.py saved")
    parser.add_argument("folder", metavar="DIR", help="folder to write")
    parser.add_argument(
        "--model", required=True, choices=list_models("deen_*"), help="which model it is"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    from ..models.convert import convert_official

    report = convert_official(args.source, args.folder, args.model)
    print(json.dumps(report.to_dict()) if args.json else report)
    return 0
