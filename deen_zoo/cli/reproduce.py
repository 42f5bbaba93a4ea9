"""Check a dataset, train, evaluate all its protocols, write a report and a checkpoint.

"synthetic" needs no data: it draws people in LLCM's layout and trains a tiny model on them. With
several GPUs, start it by torchrun: torchrun --nproc-per-node 4 -m deen_zoo.reproduce ...
"""

from __future__ import annotations

import argparse
import json
import os

from . import seed

EXAMPLES = """\
  deen-zoo reproduce synthetic
  deen-zoo reproduce llcm --data-root /data/LLCM --output runs/llcm
  deen-zoo reproduce llcm --data-root /data/LLCM --output runs/llcm --resume
  deen-zoo reproduce regdb --data-root /data/RegDB --splits 1 2 3
  deen-zoo reproduce sysu --data-root /data/SYSU-MM01 --recipe paper
  deen-zoo reproduce sysu --data-root /data/SYSU-MM01 --set optimizer.lr=0.05 --set loss.cpm=0.5
  deen-zoo reproduce sysu --data-root /data/SYSU-MM01 --recipe my.toml --task mine:MyTask
  deen-zoo reproduce sysu --data-root /data/SYSU-MM01 --eval-only runs/sysu/checkpoint \\
      --output runs/sysu-again --protocols sysu-all
  deen-zoo reproduce own --data-root people/ --output runs/people
  deen-zoo reproduce synthetic --ablation --seed 0 1 2 --output runs/ablation
"""


STOPPED = "; the same command with --resume continues a training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..training.settings import add_options, add_recipe_changes

    add_options(parser)
    add_recipe_changes(parser)
    add = parser.add_argument
    add("--ablation", action="store_true", help="the seven rows of the paper's Table 4")
    about = "seed of the weights, the batches and the augmentation; several with --ablation"
    add("--seed", type=seed, nargs="+", default=[0], help=about)
    add("--json", action="store_true", help="results.json on stdout")


def run(args: argparse.Namespace) -> int:
    from ..data.datasets import get_dataset
    from ..errors import UserError
    from ..evaluation import terminal_table
    from ..training.ablation import ablate, table
    from ..training.report import summary
    from ..training.reproduce import reproduce
    from ..training.settings import Settings

    options = vars(args).copy()
    ablation, as_json, seeds = (options.pop(key) for key in ("ablation", "json", "seed"))
    output = options.pop("output") or f"runs/{get_dataset(args.dataset).name}"
    if ablation and args.eval_only:
        raise UserError("--ablation trains seven models: it does not go with --eval-only")
    if len(set(seeds)) < len(seeds) or (len(seeds) > 1 and not ablation):
        raise UserError(
            f"--seed {' '.join(map(str, seeds))}: several seeds go with --ablation, each once"
        )
    settings = Settings.create(output=output, seed=seeds[0], **options)
    if ablation:
        results = ablate(settings, seeds)
        text = table(results)
    else:
        results = reproduce(settings)
        table_of = terminal_table(results["protocols"].values())
        text = f"{table_of}\n\n{summary(settings.output, results)}"
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun one prints
        print(json.dumps(results, indent=2) if as_json else text)
    return 0
