"""Check a dataset, train, evaluate all its protocols, write results and a checkpoint.

"synthetic" needs no data: it draws people in LLCM's layout and trains a tiny model on them. With
several GPUs, start it by torchrun: torchrun --nproc-per-node 4 -m deen_zoo.reproduce ...
"""

from __future__ import annotations

import argparse
import json

from . import seed

EXAMPLES = """\
  deen-zoo reproduce synthetic
  deen-zoo reproduce llcm --data-root /data/LLCM --output runs/llcm
  deen-zoo reproduce llcm --data-root /data/LLCM --output runs/llcm --resume
  deen-zoo reproduce regdb --data-root /data/RegDB --trials 1 2 3
  deen-zoo reproduce sysu --data-root /data/SYSU-MM01 --recipe paper
  deen-zoo reproduce sysu --data-root /data/SYSU-MM01 --eval-only runs/sysu/checkpoint \\
      --output runs/sysu-again --protocols sysu-all
  deen-zoo reproduce own --data-root people/ --output runs/people
  deen-zoo reproduce synthetic --ablation --seed 0 1 2 --output runs/ablation
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..device import PRECISIONS
    from ..training.recipes import RECIPES

    parser.add_argument("dataset", choices=("sysu", "regdb", "llcm", "own", "synthetic"))
    parser.add_argument("--data-root", metavar="FOLDER", help="of the dataset")
    parser.add_argument("--output", metavar="FOLDER", help="of the run (default: runs/DATASET)")
    parser.add_argument(
        "--recipe", choices=RECIPES, help="default: official; synthetic has its own"
    )
    parser.add_argument("--model", help="default: the deen_resnet50 of the dataset")
    parser.add_argument("--epochs", type=int, help="stop after so many (default: the recipe's)")
    parser.add_argument(
        "--trials", type=int, nargs="+", metavar="N", help="RegDB's splits, 1 to 10"
    )
    parser.add_argument(
        "--protocols", nargs="+", metavar="NAME", help="of the dataset (default: all of them)"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out broken images, with a counted warning"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument(
        "--eval-only", metavar="CHECKPOINT", help="a checkpoint folder or hf-hub: id; no training"
    )
    parser.add_argument(
        "--ablation", action="store_true", help="the seven rows of the paper's Table 4"
    )
    parser.add_argument(
        "--seed", type=seed, nargs="+", default=[0], help="several: with --ablation"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads that decode (default: one per core)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="in evaluation (default: 64)")
    parser.add_argument("--cache", metavar="FOLDER", help="keep decoded images there")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="less memory and a little slower: compute the first stages' maps twice",
    )
    parser.add_argument("--scratch", action="store_true", help="no ImageNet weights to start from")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="save within epochs too")
    parser.add_argument(
        "--identities", type=int, default=96, help="people in a synthetic world (default: 96)"
    )
    parser.add_argument("--json", action="store_true", help="results.json on stdout")


def run(args: argparse.Namespace) -> int:
    from ..errors import UserError
    from ..evaluation import terminal_table
    from ..training.reproduce import reproduce
    from ..training.settings import Settings

    options = vars(args).copy()
    ablation, as_json, seeds = (options.pop(key) for key in ("ablation", "json", "seed"))
    output = options.pop("output") or f"runs/{args.dataset}"
    settings = Settings.create(output=output, seed=seeds[0], **options)
    if ablation:
        if settings.eval_only:
            raise UserError("--ablation trains seven models: it does not go with --eval-only")
        from ..training.ablation import ablate, table

        results = ablate(settings, seeds)
        text = table(results)
    elif len(seeds) > 1:
        raise UserError(f"--seed {' '.join(map(str, seeds))}: several seeds go with --ablation")
    else:
        results = reproduce(settings)
        text = terminal_table(results["protocols"].values())
    print(json.dumps(results, indent=2) if as_json else f"{text}\n\n{settings.output}")
    return 0
