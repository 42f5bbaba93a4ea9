"""Turn a checkpoint of the reference, YYDS, AGW, CAJ or TVI-LFM into a folder that timm loads."""

from __future__ import annotations

import argparse
import json

EXAMPLES = """  deen-zoo convert sysu_deen_p4_n4_lr_0.1_seed_0_best.t --install
  deen-zoo convert sysu_deen_best.t weights/sysu
  deen-zoo convert regdb_deen_trial_3_best.t weights/regdb-3 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..data.datasets import several_splits

    add = parser.add_argument
    add("file", help="the checkpoint, such as best.t; it is never executed")
    add("folder", nargs="?", help="where to write; it must be empty or absent")
    about = "put it where create_model(MODEL, pretrained=True) finds it, instead of a folder"
    add("--install", action="store_true", help=about)
    add("--model", default="", help="which model it is (default: found out)")
    about = "whose file it is: agw and caj have files of the same names (default: found out)"
    add("--source", default="", help=about)
    about = f"the one of {several_splits()} it was trained on (default: as the file's name says)"
    add("--split", type=int, help=about)
    add("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    from ..errors import UserError
    from ..models.convert import convert

    if args.install == (args.folder is not None):
        raise UserError("give either a folder to write to, or --install")
    report = convert(args.file, args.folder, args.model, args.source, args.split)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0
