"""The training loop: a task, an optimiser, batches, and a run on disk."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.loader import TrainLoader
from ..distributed import Distributed
from ..errors import UserError
from .recipes import Recipe
from .state import Run
from .tasks import Task

__all__ = ["Diverged", "make_optimizer", "train"]


class Diverged(UserError):
    """The loss, its gradient or the weights are NaN or infinite."""


def make_optimizer(model: Any, recipe: Recipe) -> torch.optim.SGD:
    """SGD with the model's parameter groups: the head at the full rate, the rest at a fraction.

    Each group's ``lr_factor`` multiplies the recipe's learning rate.
    """
    factors = {"head": 1.0, "rest": recipe.optimizer.backbone_lr}
    return torch.optim.SGD(
        [
            {"params": group["params"], "lr_factor": factors[group["name"]]}
            for group in model.param_groups()
        ],
        lr=recipe.optimizer.lr,
        momentum=recipe.optimizer.momentum,
        nesterov=recipe.optimizer.nesterov,
        weight_decay=recipe.optimizer.weight_decay,
    )


class Totals:
    """Sums the terms of the loss over an epoch; reads them from the device only when asked to."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.pending: list[Tensor] = []

    def add(self, terms: dict[str, Tensor], norm: Tensor) -> None:
        """Note one step: its terms, and the norm of its gradient."""
        if self.sums and list(self.sums) != list(terms):
            raise UserError(
                f"the task gave the losses {', '.join(terms)} after {', '.join(self.sums)}: "
                "give the same ones in every step"
            )
        self.sums = self.sums or dict.fromkeys(terms, 0.0)
        self.pending.append(torch.stack([*terms.values(), norm]).detach())

    def collect(self, run: Run, world: Distributed) -> None:
        """Fetch what was noted since the last call.

        Raises:
            Diverged: A term or a gradient is not finite, in any process; the message names the
                step, the values, and the last good state (one is saved only after this check).
        """
        if not self.pending:
            return
        rows = torch.stack(self.pending).double().cpu()  # the loop's only wait for the device
        self.pending.clear()
        finite = rows.isfinite().all(1).tolist()
        bad = None if all(finite) else finite.index(False)
        found = [step for step in world.gather(bad) if step is not None]
        if found:
            first = min(found)
            names = [*self.sums, "gradient norm"]
            values = ", ".join(
                f"{name} {value:.6g}"
                for name, value in zip(names, rows[first].tolist(), strict=True)
            )
            step = run.step - len(rows) + first + 1
            raise Diverged(_diverged(f"in epoch {run.epoch + 1}, step {step}: {values}", run))
        for name, value in zip(self.sums, rows.sum(0).tolist(), strict=False):
            self.sums[name] += value

    def finish(self, steps: int) -> dict[str, float]:
        """Means over an epoch of so many steps; the sums start again."""
        means = {name: total / steps for name, total in self.sums.items()}
        self.sums = {}
        return {"loss": sum(means.values()), **means}


def _diverged(what: str, run: Run) -> str:
    good = "there is no saved state yet"
    if run.newest:
        good = f"the last good state is {run.newest}, from which --resume continues"
    return (
        f"the loss, its gradient or the weights are not finite {what}; {good}; "
        "try --precision float32, a lower optimizer.lr, or another seed"
    )


LOOK_EVERY = 50  # steps between looks at the loss, each of which waits for the device


def train(
    task: Task,
    optimizer: torch.optim.Optimizer,
    loader: TrainLoader,
    run: Run,
    world: Distributed,
    epochs: int,
    test: Callable[[], dict[str, float]] | None = None,
    resume: bool = False,
    compile: bool = False,
    save_every: int | None = None,
) -> None:
    """Train to ``epochs`` epochs; the model ends with the last one's weights.

    After each epoch the model is tested as the recipe says, and the state is saved. A run that is
    killed at any point and resumed ends, on a CPU, in the very same weights.

    Args:
        task: On the device of ``world``.
        optimizer: From :func:`make_optimizer`.
        loader: Batches of this process.
        run: Where to write.
        world: From :func:`deen_zoo.distributed.join`.
        epochs: Number of epochs, including those already finished.
        test: Gives ``r1``, which chooses the best epoch, and any other numbers for the log; all
            processes call it.
        resume: Continue from the newest state of ``run``, if there is one.
        compile: Compile the task with ``torch.compile``.
        save_every: Steps between saves within an epoch; None saves at its end only.

    Raises:
        Diverged: The loss, its gradient or the weights are NaN or infinite. Nothing of that is
            saved.
    """
    model, recipe, totals = task.model, task.recipe, Totals()
    if resume and world.share(run.newest) is not None:
        totals.sums = run.resume(model, optimizer, world)
    run.check_epochs(epochs)
    limit = math.inf if recipe.optimizer.clip is None else recipe.optimizer.clip
    task.world = world
    step_of: Callable[..., dict[str, Tensor]] = world.wrap(task)
    if compile:
        step_of = torch.compile(step_of)

    def save() -> None:
        bad = [name for name, t in model.state_dict().items() if not t.isfinite().all()]
        bad = [name for names in world.gather(bad[:1]) for name in names]
        if bad:
            raise Diverged(_diverged(f"at the end of epoch {run.epoch}: {bad[0]}", run))
        run.save(model, optimizer, totals.sums, world)

    while run.epoch < epochs:
        start, first = time.monotonic(), run.step
        lr = recipe.lr(run.epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        loader.set_epoch(run.epoch, first)
        model.train()
        progress = tqdm(total=len(loader), initial=first, desc=f"epoch {run.epoch + 1}/{epochs}",
                        disable=None if world.main else True)  # fmt: skip
        for images, labels, infrared in loader:
            images = images.to(world.device, memory_format=torch.channels_last, non_blocking=True)
            terms = step_of(images, labels, infrared)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            totals.add(terms, norm)
            run.step += 1
            saving = save_every is not None and run.step % save_every == 0
            if saving or run.step % LOOK_EVERY == 0:
                totals.collect(run, world)
            if saving:
                save()
            progress.update()
        progress.close()
        totals.collect(run, world)
        row: dict[str, Any] = {"epoch": run.epoch + 1, "lr": lr, **totals.finish(len(loader))}
        row["seconds"] = round(time.monotonic() - start, 3)
        row |= dict.fromkeys(("r1", "mAP"))
        last = run.epoch + 1 == epochs
        if test is not None and (last or (run.epoch + 1) % recipe.schedule.test_every == 0):
            row |= test()
        run.epoch, run.step = run.epoch + 1, 0
        run.history.append(world.share(row))
        save()
        if world.main:
            print(_line(row, epochs), file=sys.stderr, flush=True)
        world.barrier()


def _line(row: dict[str, Any], epochs: int) -> str:
    names = list(row)
    terms = names[names.index("loss") : names.index("seconds")]
    parts = " ".join(f"{name} {row[name]:.3f}" for name in terms)
    tests = {"rank-1": row["r1"], "mAP": row["mAP"]}
    tested = "".join(f", {name} {value:.1%}" for name, value in tests.items() if value is not None)
    return f"epoch {row['epoch']}/{epochs}: {parts}, lr {row['lr']:g}{tested}, {row['seconds']} s"
