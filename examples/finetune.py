"""Fine-tune on your own two folders, and measure before and after on people kept aside.

    python examples/finetune.py
    python examples/finetune.py --data mine --output runs/mine --model local-dir:runs/llcm/best

The folder has visible/IDENTITY/*.jpg and infrared/IDENTITY/*.jpg, where IDENTITY is a number or a
word and both have images of the same people. Without --data, synthetic people in front of cameras
that the model has not seen are drawn. The result is a checkpoint folder, for ``local-dir:``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from deen_zoo import FeatureExtractor, create_model, save_pretrained
from deen_zoo.data import Sample, TrainLoader, open_dataset
from deen_zoo.data.protocols import label_order
from deen_zoo.data.transforms import TrainTransform
from deen_zoo.device import choose_device
from deen_zoo.distributed import Distributed
from deen_zoo.evaluation import Ranking, evaluate_ranking
from deen_zoo.features.extractor import data_config
from deen_zoo.models import ReidModel
from deen_zoo.synthetic import synthesize
from deen_zoo.training.loop import make_optimizer, train
from deen_zoo.training.recipes import Recipe, get_recipe, override
from deen_zoo.training.state import Run
from deen_zoo.training.tasks import DEENTask

WORLD = 4  # the shipped tiny model was trained on people of world 0


class Scores(NamedTuple):
    before: Ranking
    after: Ranking


def draw_people(root: Path) -> Path:
    """RegDB's layout is one of two folders, under other names."""
    synthesize("regdb", root, 32, seed=WORLD, images_per_camera=4)
    (root / "Visible").rename(root / "visible")
    (root / "Thermal").rename(root / "infrared")
    return root


def split(samples: list[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Training and test: no person is in both, or the numbers would mean nothing."""
    people = sorted({sample.identity for sample in samples}, key=label_order)
    kept = set(people[round(len(people) * (1 - share)) :])
    training = [sample for sample in samples if sample.identity not in kept]
    return training, [sample for sample in samples if sample.identity in kept]


def score(model: ReidModel, samples: list[Sample]) -> Ranking:
    """Every infrared image searches all visible ones."""
    table = FeatureExtractor(model, batch_size=32).table(samples)
    infrared, ids, cameras = (table.label(n) for n in ("infrared", "identity", "camera"))
    similarity = table.features[infrared] @ table.features[~infrared].T
    sides = ids[infrared], ids[~infrared], cameras[infrared], cameras[~infrared]
    return evaluate_ranking(similarity, *sides, rule="regdb")  # leaves no camera out


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The official recipe, shortened: one epoch of warm-up, the last third at a tenth."""
    steps = ((max(1, args.epochs * 2 // 3), 0.1),)
    changes = {"optimizer.lr": args.lr, "schedule.warmup": 1, "schedule.decay": steps}
    return override(get_recipe("official"), {**changes, "data.pad": 5})


def fit(model: ReidModel, samples: list[Sample], output: Path, args: argparse.Namespace) -> None:
    config, recipe = data_config(model), recipe_of(args)
    data = recipe.data
    transform = TrainTransform(
        data.pad, data.grayscale, erasing_area=(0.02, 0.4),
        mean=config["mean"], std=config["std"],
    )  # fmt: skip
    size = config["input_size"][1:]
    people = len({sample.identity for sample in samples})
    batch = min(data.identities_per_batch, people), data.images_per_modality
    loader = TrainLoader(samples, size, transform, *batch, threads=2)
    world = Distributed(choose_device())
    model.to(world.device).to(memory_format=torch.channels_last)
    task = DEENTask(model, recipe)
    train(task, make_optimizer(model, recipe), loader, Run(output), world, args.epochs)
    save_pretrained(model, output / "checkpoint")


def main(argv: list[str] | None = None) -> Scores:
    parser = argparse.ArgumentParser(description="Fine-tune on two folders of one's own.")
    parser.add_argument(
        "--data", type=Path, help="a folder of visible/IDENTITY/ and infrared/IDENTITY/"
    )
    parser.add_argument("--output", type=Path, help="of the run and its checkpoint; must be new")
    parser.add_argument("--model", default="test_deen_resnet", help="a name, or local-dir:FOLDER")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.1, help="of the classifier (default: 0.1)")
    parser.add_argument("--test-share", type=float, default=0.4, help="of the people (0.4)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        output = args.output or Path(scratch, "run")
        output.mkdir(parents=True)
        samples = open_dataset("own", args.data or draw_people(Path(scratch, "mine"))).test()
        training, test = split(samples, args.test_share)
        people = len({sample.identity for sample in training})
        model = create_model(args.model, pretrained=True, num_classes=people)  # a new classifier
        before = score(model, test)
        fit(model, training, output, args)
        after = score(model, test)
    print(
        f"\nlearnt from {len(training)} images of {people} people; tested on {len(test)} of others"
    )
    for name, ranking in (("before", before), ("after", after)):
        print(f"{name:7} rank-1 {ranking.cmc[0]:6.1%}   mAP {ranking.mAP:6.1%}")
    if args.output:
        print(f"load it: create_model('local-dir:{output}/checkpoint', pretrained=True)")
    return Scores(before, after)


if __name__ == "__main__":
    main()
