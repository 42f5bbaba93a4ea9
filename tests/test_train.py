"""The task next to the reference, one step and its optimiser; the loop, killed and resumed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deen_zoo
from deen_zoo.data import Sample, TrainLoader, open_dataset
from deen_zoo.data.transforms import TrainTransform
from deen_zoo.distributed import Distributed
from deen_zoo.training.loop import Diverged, Totals, make_optimizer, train
from deen_zoo.training.recipes import RECIPES, override
from deen_zoo.training.state import Run, load_state
from deen_zoo.training.tasks import DEENTask

from . import forked, parity, seeded
from .reference import needs_official, official

GOLDEN = Path(__file__).parent / "golden" / "step.npz"
OFFICIAL = RECIPES["official"]
TERMS = ["identity", "triplet", "cpm", "orthogonality"]
SIZE = (64, 32)
LABELS = torch.tensor([2, 2, 5, 5, 0, 0]).repeat(2)
INFRARED = torch.arange(12) >= 6


def batch() -> torch.Tensor:
    return seeded.tensor("batch", (12, 3, 64, 32)) * np.sqrt(3 * 64 * 32)


def stacked(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms.values()))


def our_step(dataset: str) -> dict[str, torch.Tensor]:
    """Parts of the loss, gradients and updated weights of one step with the official recipe."""
    model = parity.ours(dataset, torch.float64)
    model.train()
    optimizer = make_optimizer(model, OFFICIAL)
    for group in optimizer.param_groups:
        group["lr"] = OFFICIAL.lr(3) * group["lr_factor"]
    parts = stacked(DEENTask(model, OFFICIAL)(batch(), LABELS, INFRARED))
    parts.sum().backward()
    out = {"parts": parts.detach()}
    out |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    optimizer.step()
    return out | {name: p.detach() for name, p in model.named_parameters()}


def reference_step(dataset: str) -> dict[str, torch.Tensor]:
    """The same as the reference's train.py makes it, under our names."""
    net, rename = parity.theirs(dataset, torch.float64)
    net.train()
    lr, loss = 0.1 * (3 + 1) / 10, official("loss")
    head = [*net.bottleneck.parameters(), *net.classifier.parameters()]
    rest = [p for p in net.parameters() if all(p is not h for h in head)]
    optimizer = torch.optim.SGD(
        [
            {"params": rest, "lr": 0.1 * lr},
            {"params": net.bottleneck.parameters(), "lr": lr},
            {"params": net.classifier.parameters(), "lr": lr},
        ],
        weight_decay=5e-4,
        momentum=0.9,
        nesterov=True,
    )
    x = batch()
    features, logits, ort = net(x[:6], x[6:])
    labels, cpm = LABELS, loss.CPMLoss(margin=0.2)
    one, two, three = features.chunk(3)
    pairs = cpm(torch.cat((one, two)), labels.repeat(2)) + cpm(
        torch.cat((one, three)), labels.repeat(2)
    )
    parts = [
        nn.CrossEntropyLoss()(logits, labels.repeat(3)),
        loss.OriTripletLoss(batch_size=6, margin=0.3)(features, labels.repeat(3)),
        0.8 * pairs,
        0.01 * ort,
    ]
    sum(parts).backward()
    ours = {name: p for name, p in net.named_parameters() if p.grad is not None}
    out = {"parts": torch.stack(parts).detach()}
    out |= {f"grad {rename[name]}": p.grad.clone() for name, p in ours.items()}
    optimizer.step()
    return out | {rename[name]: p.detach() for name, p in ours.items()}


def summary(step: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The parts; of every gradient and weight its norm and its product with a seeded direction."""
    rows = []
    for name in sorted(set(step) - {"parts"}):
        direction = seeded.tensor(name, tuple(step[name].shape))
        rows.append([step[name].norm(), (step[name] * direction).sum() / direction.norm()])
    return {"parts": step["parts"].numpy(), "rest": torch.tensor(rows).numpy()}


@needs_official
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This overload of addmm_:UserWarning")
@pytest.mark.parametrize("dataset", ["llcm", "regdb"])
def test_one_step_is_the_references(dataset):
    ours, theirs = our_step(dataset), reference_step(dataset)
    assert set(ours) == set(theirs)
    assert (theirs["parts"] > 1e-3).all()
    for name, tensor in theirs.items():
        scale = max(1.0, tensor.abs().max().item())
        assert (ours[name] - tensor).abs().max() < 1e-9 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["llcm", "regdb"])
def test_one_step_is_the_references_by_golden_numbers(dataset):
    golden, ours = np.load(GOLDEN), summary(our_step(dataset))
    for key, values in ours.items():
        assert values == pytest.approx(golden[f"{dataset}/{key}"], rel=1e-9, abs=1e-9), key


def tiny(seed: int = 0, ids: int = 6, **kwargs) -> deen_zoo.DEEN:
    torch.manual_seed(seed)
    return deen_zoo.create_model("test_deen_resnet", num_classes=ids, **kwargs)


def random_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.randn(12, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    return images, LABELS, INFRARED


@pytest.mark.parametrize(("dee", "cpm", "ort"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)])
def test_switched_off_terms_are_left_out(dee, cpm, ort):
    recipe = override(OFFICIAL, {"loss.cpm": 0.8 * cpm, "loss.orthogonality": 0.01 * ort})
    terms = DEENTask(tiny(dee=bool(dee)), recipe)(*random_batch())
    on = [True, True, bool(dee and cpm), bool(dee and ort)]
    assert list(terms) == [name for name, is_on in zip(TERMS, on, strict=True) if is_on]
    assert all(terms.values())


def test_weights_and_margins_are_the_recipes():
    parts = {}
    for name, change in {
        "plain": {},
        "weights": {"loss.cpm": 1.6, "loss.orthogonality": 0.1, "loss.triplet": 0.5},
        "margins": {"loss.triplet_margin": 9.0, "loss.cpm_margin": 9.0},
    }.items():
        torch.manual_seed(1)  # dropout
        parts[name] = stacked(
            DEENTask(tiny(), override(OFFICIAL, change))(*random_batch())
        ).detach()
    assert torch.allclose(parts["weights"], parts["plain"] * torch.tensor([1, 0.5, 2, 10]))
    assert parts["margins"][0] == parts["plain"][0]
    assert (parts["margins"][1:3] > parts["plain"][1:3] + 1).all()


def test_bfloat16_keeps_the_losses_in_float32():
    exact, mixed = (
        stacked(DEENTask(tiny(), OFFICIAL, p)(*random_batch())) for p in ("float32", "bfloat16")
    )
    assert mixed.dtype == torch.float32
    assert not torch.equal(exact, mixed) and torch.allclose(exact, mixed, rtol=0.2, atol=0.2)


def test_neck_and_classifier_learn_at_the_full_rate():
    model = tiny()
    rest, head = make_optimizer(model, OFFICIAL).param_groups
    assert {id(p) for p in head["params"]} == {
        id(model.bottleneck.weight),
        id(model.classifier.weight),
    }
    assert len(rest["params"]) + 2 == len(list(model.parameters()))
    assert (rest["lr_factor"], head["lr_factor"]) == (0.1, 1.0)
    assert (head["momentum"], head["nesterov"], head["weight_decay"]) == (0.9, True, 5e-4)


def start(root: Path, folder: Path, seed: int = 0, changes=None):
    """A run of three steps an epoch: the arguments of ``train`` but for the epochs."""
    folder.mkdir(exist_ok=True)
    batches = {"data.identities_per_batch": 3, "data.images_per_modality": 2}
    recipe = override(OFFICIAL, batches | (changes or {}))
    model = tiny(seed)
    transform = TrainTransform(4, erasing_area=(0.02, 0.4))
    of_each: dict[tuple[int, str], list[Sample]] = {}
    for sample in open_dataset("llcm", root).train():
        of_each.setdefault((sample.identity, sample.modality), []).append(sample)
    samples = [sample for images in of_each.values() for sample in images[:2]]
    loader = TrainLoader(samples, SIZE, transform, 3, 2, seed, threads=1)
    assert len(loader) == 3
    task = DEENTask(model, recipe)
    return task, make_optimizer(model, recipe), loader, Run(folder, {"seed": seed})


CPU = Distributed(torch.device("cpu"))


def test_a_loss_that_is_not_finite_stops_the_run(llcm_tree, tmp_path):
    task, optimizer, loader, run = start(llcm_tree, tmp_path)
    train(task, optimizer, loader, run, CPU, 1)
    good = run.newest
    seen = []

    def poison(module, args):
        seen.append(module)
        return (args[0] * (torch.nan if len(seen) == 3 else 1), *args[1:])

    task.register_forward_pre_hook(poison)
    with pytest.raises(Diverged) as error:
        train(task, optimizer, loader, run, CPU, 2)
    message = str(error.value)
    assert "epoch 2, step 3: identity nan, triplet nan, cpm nan, orthogonality nan" in message
    assert f"last good state is {good}" in message and good == run.newest
    assert "\n" not in message


class Rooted(DEENTask):
    """A finite loss whose gradient is not finite from the third step on."""

    calls = 0

    def losses(self, batch):
        Rooted.calls += 1
        terms = super().losses(batch)
        nothing = terms["identity"] * 0
        return {**terms, "root": (nothing + (Rooted.calls < 3)).sqrt()}


def test_a_gradient_that_is_not_finite_is_never_saved(llcm_tree, tmp_path):
    """A6: NaN weights were saved, and the message called that file the last good checkpoint."""
    task, optimizer, loader, run = start(llcm_tree, tmp_path)
    Rooted.calls = 0
    task = Rooted(task.model, task.recipe)
    with pytest.raises(Diverged) as error:
        train(task, optimizer, loader, run, CPU, 2, save_every=1)
    message, newest = str(error.value), run.newest
    assert "epoch 1, step 3" in message and "gradient norm nan" in message
    assert newest.name == "epoch-00000-step-0000002" and str(newest) in message
    weights = load_state(newest / "state.safetensors")["model"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


def test_weights_that_are_not_finite_are_never_saved(llcm_tree, tmp_path):
    """A6: running statistics can overflow while loss and gradient are finite."""
    task, optimizer, loader, run = start(llcm_tree, tmp_path)
    task.model.bottleneck.running_var.fill_(torch.inf)
    with pytest.raises(Diverged, match=r"bottleneck\.running_var"):
        train(task, optimizer, loader, run, CPU, 1)
    assert run.newest is None


def test_a_test_may_give_any_numbers(llcm_tree, tmp_path):
    """C13: a test that gave rank-1 alone ended in a traceback."""
    task, optimizer, loader, run = start(llcm_tree, tmp_path)
    answers = iter([{"r1": 0.5}, {"r1": 0.25, "mINP": 0.125}])
    train(task, optimizer, loader, run, CPU, 2, test=lambda: next(answers))
    head, one, two = (line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines())
    assert head[-3:] == ["r1", "mAP", "mINP"]
    assert one[-3:] == ["0.5", "", ""] and two[-3:] == ["0.25", "", "0.125"]


def test_a_task_must_keep_its_losses():
    totals, one = Totals(), torch.ones(())
    totals.add({"identity": one, "triplet": one}, one)
    with pytest.raises(deen_zoo.errors.UserError, match="every step"):
        totals.add({"identity": one}, one)


def test_the_log_has_a_row_an_epoch(llcm_tree, tmp_path):
    tests = iter([{"r1": 0.5, "mAP": 0.2}, {"r1": 0.75, "mAP": 0.3}, {"r1": 0.75, "mAP": 0.1}])
    task, optimizer, loader, run = start(llcm_tree, tmp_path, changes={"schedule.test_every": 2})
    train(task, optimizer, loader, run, CPU, 5, test=lambda: next(tests))
    head, *rows = (line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines())
    assert head == ["epoch", "lr", "loss", *TERMS, "seconds", "r1", "mAP"]
    assert [row[0] for row in rows] == list("12345")
    assert [row[-2] for row in rows] == ["", "0.5", "", "0.75", "0.75"]
    assert [float(row[1]) for row in rows] == [OFFICIAL.lr(epoch) for epoch in range(5)]
    loss = [float(row[2]) for row in rows]
    assert loss == pytest.approx([sum(map(float, row[3:7])) for row in rows])
    assert run.best["epoch"] == 4  # the first of equals
    assert list((tmp_path / "tensorboard").iterdir())
    run.publish_best()
    best = deen_zoo.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True)
    assert not torch.equal(best.classifier.weight, task.model.classifier.weight)


def test_clipping_bounds_the_gradient(llcm_tree, tmp_path):
    norms = []
    for clip in (None, 0.5):
        task, optimizer, loader, run = start(
            llcm_tree, tmp_path / str(clip), changes={"optimizer.clip": clip}
        )
        optimizer.register_step_pre_hook(
            lambda *_, task=task: norms.append(
                sum(p.grad.square().sum().item() for p in task.parameters()) ** 0.5
            )
        )
        train(task, optimizer, loader, run, CPU, 1)
        assert (max(norms) < 0.5001) == (clip is not None)
        norms.clear()


def test_compiled_training_is_the_same(llcm_tree, tmp_path, monkeypatch):
    """Traced as torch.compile does it, and then run by PyTorch: generating code takes minutes."""
    compiled, whole = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda task: compiled.append(task) or whole(task, backend="eager")
    )
    losses = []
    for flag in (False, True):
        task, optimizer, loader, run = start(llcm_tree, tmp_path / str(flag))
        train(task, optimizer, loader, run, CPU, 1, compile=flag)
        assert compiled == [task] * flag
        losses.append(run.history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


KILLED = '''
import json, os, signal, sys
from pathlib import Path
import torch
import torch.utils.tensorboard  # once, not in each child
from deen_zoo.training import loop as module
from deen_zoo.training.state import Run, load_state
from tests.test_train import CPU, start

torch.set_num_threads(1)
tree, folder = map(Path, sys.argv[1:])

def run(name, kill_at=None, kill_in_save=None, resume=False):
    """Train in a child, which kills itself before a step or between two files' bytes."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    steps, saves = [], []
    add, replace = module.Totals.add, os.replace
    def counted(self, *step):
        steps.append(0)
        if len(steps) == kill_at:
            die()
        add(self, *step)
    def replaced(source, target):
        saves.append(0)
        if len(saves) == kill_in_save:
            die()
        replace(source, target)
    module.Totals.add, os.replace = counted, replaced
    torch.manual_seed(0)
    arguments = start(tree, folder / name)
    if not resume:
        torch.manual_seed(7)
    def test():
        return {"r1": float(arguments[0].model.classifier.weight[0, 0]), "mAP": 0.5}
    module.train(*arguments, CPU, 3, test, resume=resume, save_every=2)
    os._exit(0)

assert run("whole") == 0
cases = [dict(kill_at=n) for n in (1, 3, 5, 9)]
cases += [dict(kill_in_save=n) for n in (2, 6, 7, 8, 9, 10)]
for n, case in enumerate(cases):
    assert run(f"killed-{n}", **case) == -signal.SIGKILL, case
    newest = Run(folder / f"killed-{n}").newest
    if newest and (history := load_state(newest / "state.safetensors")["history"]):  # B5
        best = max(history, key=lambda row: row["r1"])["epoch"]
        config = json.loads((newest / "best" / "config.json").read_text())
        assert config["deen_zoo"]["trained_on"]["epoch"] == best
    if not Run(folder / f"killed-{n}").newest:
        assert run(f"killed-{n}") == 0  # nothing to resume: from the start
    else:
        assert run(f"killed-{n}", resume=True) == 0
print(len(cases))
'''


@pytest.mark.slow
def test_killed_at_any_step_and_resumed_it_is_the_same_to_the_bit(llcm_tree, tmp_path):
    """B5: a kill between two files left results of one epoch and weights of another."""
    done = forked.run("-c", KILLED, llcm_tree, tmp_path)
    assert done.returncode == 0, done.stderr
    cases = int(done.stdout)
    newest = Run(tmp_path / "whole").newest
    whole = (newest / "best" / "model.safetensors").read_bytes()
    expected = load_state(newest / "state.safetensors")
    for n in range(cases):
        folder = Run(tmp_path / f"killed-{n}").newest
        state = load_state(folder / "state.safetensors")
        for kind in ("model", "optimizer"):
            flat = dict(_flat(state[kind]))
            for key, tensor in _flat(expected[kind]):
                assert torch.equal(tensor, flat[key]), (n, kind, key)
        assert torch.equal(state["random"][0]["torch"], expected["random"][0]["torch"])
        rows = [{**row, "seconds": 0} for row in state["history"]]
        assert rows == [{**row, "seconds": 0} for row in expected["history"]]
        assert (folder / "best" / "model.safetensors").read_bytes() == whole


def _flat(value, key=""):
    if isinstance(value, torch.Tensor):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}")


if __name__ == "__main__":  # writes the golden numbers; needs DEEN_OFFICIAL
    arrays = {}
    for dataset in ("llcm", "regdb"):
        for key, values in summary(reference_step(dataset)).items():
            arrays[f"{dataset}/{key}"] = values
    np.savez_compressed(GOLDEN, **arrays)
