"""Turn a checkpoint of the reference, YYDS, AGW, CAJ or TVI-LFM into a folder that timm loads."""

from __future__ import annotations

import argparse
import json

EXAMPLES = """  deen-zoo convert sysu_deen_p4_n4_lr_0.1_seed_0_best.t --install
  deen-zoo convert sysu_deen_best.t weights/sysu
  deen-zoo convert regdb_deen_trial_3_best.t weights/regdb-3 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..data.datasets import several_splits

    parser.add_argument("file", help="the checkpoint, such as best.t; it is never executed")
    parser.add_argument("folder", nargs="?", help="where to write; it must be empty or absent")
    parser.add_argument(
        "--install",
        action="store_true",
        help="put it where create_model(MODEL, pretrained=True) finds it, instead of a folder",
    )
    parser.add_argument("--model", default="", help="which model it is (default: found out)")
    parser.add_argument(
        "--source",
        default="",
        help="whose file it is, such as agw or caj, whose files have the same names "
        "(default: found out)",
    )
    parser.add_argument(
        "--split",
        type=int,
        help=f"of {several_splits()}, the one it was trained on (default: as the file's name says)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Convert, verify, report."""
    from ..errors import UserError
    from ..models.convert import convert

    if args.install == (args.folder is not None):
        raise UserError("give either a folder to write to, or --install")
    report = convert(args.file, args.folder, args.model, args.source, args.split)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0
