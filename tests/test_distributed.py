"""Two gloo processes on the CPU are one with both their batches; the whole command in two."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deen_zoo.distributed import Distributed, join
from deen_zoo.synthetic import synthesize
from deen_zoo.training.state import Run, load_state

from . import forked

SCRIPT = """
import sys
from pathlib import Path
import torch
import deen_zoo
from deen_zoo.data import open_dataset, TrainLoader
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
    loader = TrainLoader(dataset.train(), (128, 64), TrainTransform(4), 3, 2, threads=1,
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks(*words: object, size: int = 2) -> list[forked.Program]:
    """A program in ``size`` processes, with the environment that torchrun gives them."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [
        forked.Program(
            *words, env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(size)
    ]


def launch(*words: object) -> None:
    """Run a program in two processes to its end, or until one of them fails."""
    started = ranks(*words)
    while None in (codes := [process.poll() for process in started]) and not any(codes):
        time.sleep(0.01)
    for process in started:
        process.kill()
    said = [process.communicate() for process in started]
    assert codes == [0, 0], said


@pytest.mark.slow
def test_two_processes_train_one_model_and_share_the_images(llcm_tree, tmp_path):
    launch("-c", SCRIPT, llcm_tree, tmp_path)
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


STEPS = """
import sys
import torch
import deen_zoo
from deen_zoo.distributed import Distributed, join
from deen_zoo.training.loop import make_optimizer
from deen_zoo.training.recipes import RECIPES
from deen_zoo.training.tasks import DEENTask

torch.set_num_threads(1)
labels, infrared = torch.arange(6).repeat_interleave(2).repeat(2), torch.arange(24) >= 12
images = torch.randn(24, 3, 128, 64, generator=torch.Generator().manual_seed(1)).double()

def steps(world, rows):
    torch.manual_seed(0)
    model = deen_zoo.create_model("test_deen_resnet", num_classes=6, drop_rate=0.0).double()
    recipe = RECIPES["official"]
    task, optimizer = DEENTask(model, recipe), make_optimizer(model, recipe)
    task.world = world
    shared = world.wrap(task)
    for _ in range(2):
        terms = shared(images[rows], labels[rows], infrared[rows])
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return {**model.state_dict(), **terms}

with join(torch.device("cpu")) as world:
    alone = steps(Distributed(world.device), range(24))
    mine = (labels // 3 == world.rank).nonzero()[:, 0]
    for name, value in steps(world, mine).items():
        assert torch.allclose(value, alone[name], rtol=1e-9, atol=1e-9), name
"""


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch():
    """A1: losses, gradients, batch statistics and weights of two steps, in float64 to 1e-9."""
    launch("-c", STEPS)


# Python runs a module of this name at its start. Without collections, imports take half the time.
NO_PICTURES = """
import gc, sys
from unittest.mock import MagicMock
gc.disable()
sys.modules["deen_zoo.visualize"] = MagicMock()
"""


def torchrun(*arguments: str, folder: Path) -> None:
    """``torchrun -m deen_zoo.reproduce`` itself, with two processes."""
    (folder / "sitecustomize.py").write_text(NO_PICTURES)
    path = os.pathsep.join([str(folder), str(forked.ROOT)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(free_port()), "-m", "deen_zoo.reproduce"]  # fmt: skip
    done = subprocess.run(
        [*command, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=forked.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("a random ranking") <= 1  # one of them prints the results


REPRODUCE = """
import sys
from deen_zoo.cli import main
from deen_zoo.training import report
report._draw = lambda *_: None  # no pictures
sys.exit(main(["reproduce", *sys.argv[1:]]))
"""


def in_two(*arguments: str) -> None:
    """The same without torchrun, and without pictures."""
    launch("-c", REPRODUCE, *arguments)


def kill_two(*arguments: str, when: Path) -> None:
    """Kill both processes once a file is there."""
    started = ranks("-c", REPRODUCE, *arguments)
    while not when.exists():
        assert all(process.poll() is None for process in started), started[0].communicate()
        time.sleep(0.01)
    for process in started:
        process.kill()
    for process in started:
        process.wait()


@pytest.fixture
def small_tree(llcm_tree, tmp_path) -> Path:
    """The same people: four training images of each in either modality, which are two steps an
    epoch, and one test image in each camera."""
    root = shutil.copytree(llcm_tree, tmp_path / "small")
    for index in root.glob("idx/train_*.txt"):
        of_each: dict[str, list[str]] = {}
        for line in index.read_text().splitlines():
            of_each.setdefault(line.split()[1], []).append(line)
        index.write_text("".join(f"{line}\n" for rows in of_each.values() for line in rows[:4]))
    for folder in root.glob("test_*/cam*/*"):
        for image in sorted(folder.iterdir())[1:]:
            image.unlink()
    return root


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def numbers(folder: Path) -> dict:
    return {name: entry["mean"] for name, entry in results(folder)["protocols"].items()}


def command(dataset: str, root: Path, output: Path, per_batch: int, *more: str) -> list[str]:
    """Without dropout, whose masks are drawn by each process for itself."""
    return [dataset, "--data-root", str(root), "--output", str(output), "--scratch",
            "--model", "test_deen_resnet", "--device", "cpu", "--threads", "1",
            "--set", f"data.identities_per_batch={per_batch}", "--set",
            "data.images_per_modality=2", "--set", "model.args.drop_rate=0.0",
            "--set", "data.image_size=[64, 32]", *more]  # fmt: skip


@pytest.mark.slow
def test_reproduce_in_two_processes(small_tree, tmp_path, no_pictures):
    """A1, A2: it ended without results, or hung when resumed; now fresh, and resumed after both
    processes were killed, it has the numbers of one process with the same global batch."""
    from deen_zoo.cli import main

    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    epochs = ("--epochs", "2", "--protocols", "llcm-ir2vis", "--set", "optimizer.lr=0.001")
    assert main(["reproduce", *command("llcm", small_tree, one, 6, *epochs)]) == 0
    torchrun(*command("llcm", small_tree, two, 3, *epochs), folder=tmp_path)
    saved = killed / "states" / "epoch-00001-step-0000000"
    kill_two(*command("llcm", small_tree, killed, 3, *epochs), when=saved)
    in_two(*command("llcm", small_tree, killed, 3, *epochs), "--resume")
    for name, mean in numbers(one).items():
        assert numbers(two)[name] == pytest.approx(mean, abs=0.005), name
    history = [[row["loss"] for row in results(f)["models"][0]["history"]] for f in (one, two)]
    assert history[1] == pytest.approx(history[0], rel=1e-3)
    assert numbers(killed) == numbers(two)
    states = [load_state(Run(f).newest / "state.safetensors")["model"] for f in (two, killed)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.slow
def test_regdbs_splits_in_two_processes(tmp_path, no_pictures):
    """A1, A2: killed between its splits and resumed, it has the numbers of one process; the
    finished split is not trained again."""
    from deen_zoo.cli import main

    root, one, two = (tmp_path / name for name in ("regdb", "one", "two"))
    synthesize("regdb", root, 12, images_per_camera=2, workers=1)
    options = ("--epochs", "1", "--splits", "1", "2", "--set", "optimizer.lr=0.001")
    assert main(["reproduce", *command("regdb", root, one, 6, *options)]) == 0
    kill_two(*command("regdb", root, two, 3, *options), when=two / "split-2" / "log.csv")
    finished = [path.stat().st_mtime_ns for path in (two / "split-1" / "states").rglob("*.*")]
    in_two(*command("regdb", root, two, 3, *options), "--resume")
    again = [path.stat().st_mtime_ns for path in (two / "split-1" / "states").rglob("*.*")]
    assert again == finished
    assert [model["split"] for model in results(two)["models"]] == [1, 2]
    trials = results(two)["protocols"]["regdb-vis2ir"]["trials"]
    assert [trial["trial"] for trial in trials] == [1, 2]
    for name, mean in numbers(one).items():
        assert numbers(two)[name] == pytest.approx(mean, abs=0.005), name


@pytest.mark.slow
def test_the_ablation_in_two_processes(small_tree, tmp_path, no_pictures):
    """A1, A2: killed in its third row and resumed, all seven are there; the finished ones are
    read back, and the first and the last have the numbers of one process."""
    from deen_zoo.cli import main

    options = ("--epochs", "1", "--protocols", "llcm-ir2vis", "--set", "optimizer.lr=0.001")
    both = [*command("llcm", small_tree, tmp_path, 3, *options), "--ablation"]
    folders = tmp_path / "ablation"
    kill_two(*both, when=folders / "dee+cpm" / "seed-0" / "log.csv")
    kept = folders / "baseline" / "seed-0" / "checkpoint" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    in_two(*both, "--resume")
    assert kept.stat().st_mtime_ns == before
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    assert len(rows) == 7
    nothing = ("model.dee=false", "model.mfa=false", "loss.cpm=0", "loss.orthogonality=0")
    for row, changes in ((rows[0], nothing), (rows[-1], ())):
        one = tmp_path / "one" / row["name"]
        sets = [word for change in changes for word in ("--set", change)]
        assert main(["reproduce", *command("llcm", small_tree, one, 6, *options), *sets]) == 0
        wanted = numbers(one)["llcm-ir2vis"]
        for key, values in row["measured"]["llcm-ir2vis"].items():
            assert values == [pytest.approx(wanted[key], abs=0.005)], (row["name"], key)


STOPS = """
import sys
from pathlib import Path
import torch
from deen_zoo.distributed import join
from deen_zoo.errors import UserError
from deen_zoo.training.loop import Diverged, Totals
from deen_zoo.training.state import Run

with join(torch.device("cpu")) as world:
    totals, told = Totals(), []
    totals.add({"loss": torch.tensor(float("nan") if world.rank else 1.0)}, torch.tensor(1.0))
    try:
        totals.collect(Run(Path(sys.argv[1])), world)
    except Diverged:
        told.append("diverged")
    try:
        world.once(lambda: open("/nowhere/file"))
    except OSError as error:
        told.append(type(error).__name__)
    Path(sys.argv[1], f"rank-{world.rank}").write_text(" ".join(told))
"""


@pytest.mark.slow
def test_all_processes_stop_together(tmp_path):
    """A6: one process found the loss infinite, or could not write, and the others waited."""
    launch("-c", STOPS, tmp_path)
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}").read_text() == "diverged FileNotFoundError"
