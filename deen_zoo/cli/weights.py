"""List the public weights of real people: where they are, their licence, and what is installed."""

from __future__ import annotations

import argparse
import json
from typing import Any

EXAMPLES = """  deen-zoo weights
  deen-zoo weights agw_resnet50_sysu --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="only weights of this model (default: all)")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    from ..errors import UserError
    from ..evaluation.published import published_by
    from ..models.catalog import entries, installed, weights_home

    rows = [e for e in entries() if args.model in (None, e["model"])]
    local = installed(args.model or "")
    if args.model and not rows and not local:
        models = ", ".join(sorted({entry["model"] for entry in entries()}))
        raise UserError(f"no public weights of {args.model!r} are known: choose from {models}")
    listing: list[dict[str, Any]] = [
        {
            **entry,
            "published": published_by(entry["source"], entry["model"].rpartition("_")[2]),
            "installed": [str(local[n]) for n in local if _is_of(n, entry)],
        }
        for entry in rows
    ]
    known = {n for n in local if any(_is_of(n, entry) for entry in rows)}
    others = {name: str(path) for name, path in local.items() if name not in known}
    if args.json:
        print(json.dumps({"weights": listing, "other_installed": others}, indent=2))
        return 0
    for entry in listing:
        numbers = ", ".join(
            f"{p['protocol']} {100 * p['r1']:.2f} / {100 * p['mAP']:.2f}"
            for p in entry["published"]
        )
        print(f"{entry['model']}.{entry['source']}: {entry['network']}")
        split = f", split {entry['split']}" if entry["split"] else ""
        print(f"  dataset    {entry['dataset']}{split}")
        print(f"  file       {entry['file']}")
        print(f"  where      {entry['repository']}: {entry['where']}")
        print(f"  licence    {entry['licence']}")
        print(f"  published  {numbers or 'see its paper'}{' (rank-1 / mAP)' if numbers else ''}")
        print(f"  installed  {', '.join(entry['installed']) or 'no'}")
    for name, path in others.items():
        print(f"{name}: installed in {path}")
    print(
        f"\nDownload a file yourself, then 'deen-zoo convert FILE --install' puts it below "
        f"{weights_home()}; 'create_model(MODEL, pretrained=True)' finds it there."
    )
    return 0


def _is_of(name: str, entry: dict[str, str]) -> bool:
    model, _, tag = name.partition(".")
    return model == entry["model"] and tag.partition("-split")[0] == entry["source"]
