"""A model to ONNX or torch.export, checked against torch before it says done."""

from __future__ import annotations

import argparse
import json
import os
import sys

EXAMPLES = """\
  deen-zoo export runs/llcm/checkpoint deen.onnx
  deen-zoo export test_deen_resnet tiny.onnx --modality infrared --flip
  deen-zoo export hf-hub:ORG/NAME deen.pt2 --output logits --form plain --json

The file takes "images" (N, 3, H, W), normalised, of any N, and "modality" (N,) bool, True for
infrared; what the images need stands in its metadata. Embeddings are compared by dot product."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..export import FORMS, MODALITIES, OUTPUTS

    add = parser.add_argument
    add("model", metavar="MODEL", help="a name, a checkpoint folder, or hf-hub:ORG/NAME")
    add("path", metavar="OUT", help="OUT.onnx, or OUT.pt2 for torch.export")
    add("--output", choices=OUTPUTS, default="embedding")
    add(
        "--modality",
        choices=MODALITIES,
        default="input",
        help="an input of the file (default), or baked in, without the other stem",
    )
    add("--form", choices=FORMS, default="deploy", help="deploy: same numbers, fewer operations")
    add("--flip", action="store_true", help="add the mirrored image's embedding, as extract does")
    add("--size", nargs=2, type=int, metavar=("H", "W"), help="of the images, if not the model's")
    add("--json", action="store_true", help="the report as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    from ..export import export_model
    from ..models import create_model

    folder = os.path.isdir(args.model)
    model = create_model(f"local-dir:{args.model}" if folder else args.model, pretrained=True)
    print(f"exporting {args.model} to {args.path}", file=sys.stderr)
    report = export_model(
        model, args.path, output=args.output, modality=args.modality, flip=args.flip,
        form=args.form, size=tuple(args.size) if args.size else None,
    )  # fmt: skip
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0
