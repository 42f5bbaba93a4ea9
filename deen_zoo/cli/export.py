"""Write a model as ONNX, OpenVINO IR, TorchScript or torch.export, checked against torch."""

from __future__ import annotations

import argparse
import json
import sys

EXAMPLES = """\
  deen-zoo export runs/llcm/checkpoint night.onnx --modality infrared
  deen-zoo export runs/llcm/checkpoint day.xml --modality visible
  deen-zoo export test_deen_resnet tiny.pt --modality infrared --no-flip --raw
  deen-zoo export hf-hub:ORG/NAME deen.pt2 --modality input --output logits --json

The file takes "images" (N, 3, H, W), normalised, of any N, and gives the rows that "deen-zoo
extract" gives; its metadata say how images are prepared. Embeddings are compared by dot product."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name, a checkpoint folder, or hf-hub:ORG/NAME")
    add("path", metavar="OUT", help="OUT.onnx, OUT.xml (OpenVINO), OUT.pt (TorchScript), OUT.pt2")
    about = "that of the images, which leaves the other stem out; or a second input of the file"
    add("--modality", choices=("visible", "infrared", "input"), required=True, help=about)
    add("--output", choices=("embedding", "logits"), default="embedding")
    add("--descriptor", help="which embedding (default: official)")
    about = "without the mirrored image: half the time"
    add("--no-flip", dest="flip", action="store_const", const=False, help=about)
    about = "embeddings as the reference compares them, not scaled to length 1"
    add("--raw", dest="normalize", action="store_const", const=False, help=about)
    add("--size", nargs=2, type=int, metavar=("H", "W"), help="image size, if not the model's")
    add("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    from ..export import export_model
    from ..models import open_model

    model = open_model(args.model)
    print(f"exporting {args.model} to {args.path} ...", file=sys.stderr, flush=True)
    report = export_model(
        model, args.path, modality=args.modality, output=args.output, descriptor=args.descriptor,
        flip=args.flip, normalize=args.normalize,
        size=tuple(args.size) if args.size else None,
    )  # fmt: skip
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0
