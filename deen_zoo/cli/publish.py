"""Publish a checkpoint folder on the Hugging Face Hub, with a card and its measured results.

Only config.json, model.safetensors, results.json and the card are uploaded, in one commit with a
version tag. Log in first: hf auth login, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

EXAMPLES = """\
  deen-zoo publish runs/llcm/checkpoint my-lab/deen_resnet50_llcm --dry-run preview
  deen-zoo publish runs/llcm/checkpoint my-lab/deen_resnet50_llcm --tag v1
  deen-zoo publish runs/regdb/split-1/checkpoint my-lab/deen_resnet50_regdb --private
  deen-zoo publish converted my-lab/deen-official --results runs/official/results.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", help="a checkpoint folder of a run, or of deen-zoo convert")
    add("repo", metavar="ORG/NAME", help="the repository; created if it does not exist")
    about = "results.json measured with these weights (default: DIR/results.json)"
    add("--results", metavar="FILE", help=about)
    add("--tag", help="name of this version (default: the next free of v1, v2, ...)")
    add("--private", action="store_true", help="create the repository as a private one")
    add("--dry-run", metavar="FOLDER", help="write what would be uploaded there; no network")
    add("--json", action="store_true", help="what was done, as JSON")


def run(args: argparse.Namespace) -> int:
    from ..hub import publish

    print(f"{args.folder}: loading and checking ...", file=sys.stderr, flush=True)
    options = {name: getattr(args, name) for name in ("results", "tag", "private", "dry_run")}
    done = publish(args.folder, args.repo, **options)
    if args.json:
        print(json.dumps(asdict(done), indent=2))
        return 0
    for name, size in done.files.items():
        print(f"{size:>12,}  {name}")
    if done.left_out:
        print(f"left out: {', '.join(done.left_out)}")
    if done.folder:
        print(f"nothing uploaded; {done.repo} {done.tag} would be {done.folder}")
    else:
        print(f"{done.repo} {done.tag}: {done.url}")
    return 0
