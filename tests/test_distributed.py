"""Two gloo processes on the CPU: shared gradients, equal weights, every image once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deen_zoo.distributed import Distributed, join
from deen_zoo.training.state import Run

SCRIPT = """
import sys
from pathlib import Path
import torch
import deen_zoo
from deen_zoo.data import open_dataset, train_loader
from deen_zoo.data.transforms import TrainTransform
from deen_zoo.distributed import Distributed, join
from deen_zoo.features.extractor import extract
from deen_zoo.training.loop import make_optimizer, train
from deen_zoo.training.recipes import RECIPES, override
from deen_zoo.training.state import Run
from deen_zoo.training.tasks import DEENTask

torch.set_num_threads(1)
tree, folder = map(Path, sys.argv[1:])
with join(torch.device("cpu")) as world:
    dataset = open_dataset("llcm", tree)
    torch.manual_seed(world.rank)  # rank 0's weights are everyone's
    model = deen_zoo.create_model("test_deen_resnet", num_classes=6)
    recipe = override(RECIPES["official"], {"data.identities_per_batch": 3,
                                            "data.images_per_modality": 2})
    loader = train_loader(dataset.train(), (128, 64), TrainTransform(4), 3, 2, threads=1,
                          rank=world.rank, world_size=world.size)
    steps = []
    task = DEENTask(model, recipe)
    task.register_forward_hook(lambda module, args, out: steps.append(args[1].unique().tolist()))
    train(task, make_optimizer(model, recipe), loader, Run(folder), world, 1)
    counts = []
    stems = model.forward_stems
    def counted(images, modality=None):
        counts.append(len(images))
        return stems(images, modality)
    model.forward_stems = counted
    samples = (dataset.test("visible") + dataset.test("infrared"))[:-1]  # odd
    shared = extract(model, samples, world, threads=1)
    count = sum(counts) // 2  # each image and its mirror image
    sizes = []
    for n in (0, 1, 2, 5):
        rows = world.gather_rows(torch.arange(n)[world.rank :: world.size, None], n)
        sizes.append(rows.flatten().tolist())
    alone = extract(model, samples, Distributed(world.device), threads=1)
    torch.save({"state": model.state_dict(), "features": shared, "alone": alone, "count": count,
                "total": len(samples), "steps": steps, "sizes": sizes},
               folder / f"rank-{world.rank}.pt")
"""


def launch(script: str, *arguments: str, size: int = 2) -> None:
    """Run a script in ``size`` processes as torchrun does, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=280)[1] for process in started]
    assert not any(process.returncode for process in started), errors


@pytest.mark.slow
def test_two_processes_train_one_model_and_share_the_images(llcm_tree, tmp_path):
    launch(SCRIPT, str(llcm_tree), str(tmp_path))
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    for name, tensor in one["state"].items():
        assert torch.equal(tensor, two["state"][name]), name
    assert len(one["steps"]) == len(two["steps"]) > 2
    for mine, others in zip(one["steps"], two["steps"], strict=True):
        assert sorted(mine + others) == list(range(6))  # distinct identities on the two ranks
    assert one["sizes"] == two["sizes"] == [list(range(n)) for n in (0, 1, 2, 5)]
    assert one["count"] + two["count"] == one["total"] and one["count"] - two["count"] in (0, 1)
    assert torch.equal(one["features"], two["features"])
    assert torch.allclose(one["features"], one["alone"], atol=1e-5)
    assert Run(tmp_path).newest


def test_alone_there_is_nothing_to_join():
    assert "WORLD_SIZE" not in os.environ
    with join(torch.device("cpu")) as world:
        assert world == Distributed(torch.device("cpu")) and world.main
        assert list(world.shard(3)) == [0, 1, 2]
        rows = torch.arange(6).view(3, 2)
        assert world.gather_rows(rows, 3) is rows
        module = torch.nn.Linear(1, 1)
        assert world.wrap(module) is module
