"""Training: the task (a model and its losses) and the loop."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.loader import TrainLoader
from ..device import autocast
from ..distributed import Distributed
from ..errors import UserError
from ..io import write_atomically
from ..models import DEEN, save_pretrained
from .losses import batch_hard_triplet_loss, cpm_loss, identity_loss, orthogonality_loss
from .recipes import Recipe
from .state import load_state, random_state, save_state, set_random_state

__all__ = ["PARTS", "Diverged", "Run", "Task", "make_optimizer", "train"]

PARTS = ("identity", "triplet", "cpm", "orthogonality")


class Diverged(UserError):
    """The loss is NaN or infinite."""


class Task(nn.Module):
    """A model and the losses it is trained by.

    Args:
        model: With a classifier of as many identities as the labels have.
        recipe: Gives the margins, forms and weights. Without generated branches (``dee=False``)
            there is nothing for the CPM and orthogonality losses to act on, and they are 0.
        precision: As for :func:`deen_zoo.device.autocast`; the losses are never below float32.
    """

    def __init__(self, model: DEEN, recipe: Recipe, precision: str = "float32") -> None:
        super().__init__()
        self.model, self.recipe, self.precision = model, recipe, precision

    def forward(self, images: Tensor, labels: Tensor, infrared: Tensor) -> Tensor:
        """Weighted parts of the loss, (4,) in the order of :data:`PARTS`; their sum is the loss.

        ``labels`` (N,) and ``infrared`` (N,) may stay on the CPU, which saves the device a wait.
        """
        recipe, branches = self.recipe, self.model.num_branches
        with autocast(images.device, self.precision):
            out = self.model.forward_train(images, infrared)
            pool, logits = out["pool"], out["logits"]  # (B*N, C), (B*N, ids)
        if pool.dtype != torch.float64:
            pool, logits = pool.float(), logits.float()
        triplet = batch_hard_triplet_loss(pool, labels.repeat(branches), recipe.triplet_margin)
        cpm = ort = pool.new_zeros(())
        if branches > 1 and recipe.cpm_weight:
            original, generated = pool[: len(images)], pool[len(images) :]
            cpm = cpm_loss(
                original, generated, labels, infrared, recipe.cpm_margin, recipe.cpm_form
            )
        if branches > 1 and recipe.ort_weight:
            ort = orthogonality_loss(pool, branches)
        return torch.stack(
            [
                identity_loss(logits, labels),
                recipe.triplet_weight * triplet,
                recipe.cpm_weight * cpm,
                recipe.ort_weight * ort,
            ]
        )


def make_optimizer(model: DEEN, recipe: Recipe) -> torch.optim.SGD:
    """SGD with two groups: BN neck and classifier at the full rate, the rest at a fraction of it.

    Each group's ``lr_factor`` multiplies the recipe's learning rate.
    """
    rest, head = model.param_groups()
    return torch.optim.SGD(
        [{**rest, "lr_factor": recipe.backbone_lr}, {**head, "lr_factor": 1.0}],
        lr=recipe.base_lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


@dataclass
class Run:
    """A run on disk, and where it stands.

    Attributes:
        folder: ``last.safetensors`` (the whole state), ``best/`` (a checkpoint folder),
            ``log.csv`` and ``tensorboard/`` are kept in it.
        config: What has to be the same when it is resumed.
        epoch: Epochs done.
        step: Steps done of the next one.
        history: One row of the log for each epoch done.
        board: TensorBoard's writer, where that is installed, once there is a row.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    board: Any = None

    @property
    def state_file(self) -> Path:
        return self.folder / "last.safetensors"

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch with the best rank-1 on the test set, the first of equals."""
        tested = [row for row in self.history if row.get("r1") is not None]
        return max(tested, key=lambda row: row["r1"], default=None)

    def save(self, model: DEEN, optimizer: torch.optim.Optimizer, losses: Losses) -> None:
        """Write all that the next step depends on; a run goes on from it bit for bit."""
        state = {
            "config": self.config,
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "losses": losses.sums,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": random_state(),
        }
        save_state(self.state_file, state)

    def resume(self, model: DEEN, optimizer: torch.optim.Optimizer, losses: Losses) -> None:
        """Go on from the saved state.

        Raises:
            UserError: It is of a run with other settings; the message names them.
        """
        state = load_state(self.state_file)
        theirs = state["config"]
        differ = [k for k in {**theirs, **self.config} if theirs.get(k) != self.config.get(k)]
        if differ:
            was = ", ".join(f"{k}={theirs.get(k)!r} (now {self.config.get(k)!r})" for k in differ)
            raise UserError(
                f"{self.state_file} is of a run with {was}: "
                "resume it with the same settings, or choose another output folder"
            )
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        losses.sums = state["losses"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        set_random_state(state["random"])

    def log(self, row: dict[str, Any]) -> None:
        """Add a row to the log, on disk and to TensorBoard where that is installed."""
        self.history.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.history[0]))
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(self.folder / "log.csv", text.getvalue())
        if self.board is None:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.folder / "tensorboard", purge_step=row["epoch"])
        if self.board is not None:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self.board.add_scalar(name, value, row["epoch"])
            self.board.flush()


class Losses:
    """Sums the parts of the loss over an epoch; reads them from the device only when asked to."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(PARTS), dtype=torch.float64)
        self.pending: list[Tensor] = []

    def add(self, parts: Tensor) -> None:
        self.pending.append(parts.detach())

    def collect(self, run: Run) -> None:
        """Fetch what was added since.

        Raises:
            Diverged: A part is not finite; the message names the step, the parts and the last
                good checkpoint (a state is saved only after this check).
        """
        if not self.pending:
            return
        parts = torch.stack(self.pending).double().cpu()  # the step's only wait for the device
        finite = parts.isfinite().all(1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            values = ", ".join(
                f"{name} {value:.6g}"
                for name, value in zip(PARTS, parts[first].tolist(), strict=True)
            )
            good = "there is no good checkpoint yet"
            if run.state_file.exists():
                good = f"the last good checkpoint is {run.state_file}, which --resume goes on from"
            raise Diverged(
                f"the loss is not finite in epoch {run.epoch}, step "
                f"{run.step - len(parts) + first}: {values}; {good}; "
                "try --precision float32 or another recipe or seed"
            )
        self.sums += parts.sum(0)
        self.pending.clear()

    def finish(self, steps: int) -> dict[str, float]:
        """Means over an epoch of so many steps, and start again."""
        means = (self.sums / steps).tolist()
        self.sums.zero_()
        return {"loss": sum(means), **dict(zip(PARTS, means, strict=True))}


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
    log_every: int = 50,
    save_every: int | None = None,
) -> None:
    """Train to ``epochs`` epochs; the model ends on the last one's weights.

    After each epoch the model is tested as the recipe says, and the state saved. A run that is
    killed at any point and resumed ends, on a CPU, in the very same weights.

    Args:
        task: On the device of ``world``.
        optimizer: From :func:`make_optimizer`.
        loader: Of this process; its images are placed as ``task`` wants them.
        run: Where to write.
        world: From :func:`deen_zoo.distributed.join`.
        epochs: In all, counting those already done.
        test: Gives at least ``r1``, which chooses the best epoch; all processes call it.
        resume: Go on from the state of ``run``, if there is one.
        compile: Compile the task with ``torch.compile``.
        log_every: Steps between looks at the loss, each of which waits for the device.
        save_every: Steps between saves within an epoch; None is at its end only.

    Raises:
        Diverged: The loss is NaN or infinite.
    """
    model, recipe, losses = task.model, task.recipe, Losses()
    if resume and run.state_file.exists():
        run.resume(model, optimizer, losses)
    step_of: Callable[..., Tensor] = world.wrap(task)
    if compile:
        step_of = torch.compile(step_of)
    while run.epoch < epochs:
        start, first = time.monotonic(), run.step
        lr = recipe.lr(run.epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        loader.set_epoch(run.epoch, first)
        model.train()
        progress = tqdm(total=len(loader), initial=first, desc=f"epoch {run.epoch}",
                        disable=None if world.main else True)  # fmt: skip
        for images, labels, infrared in loader:
            images = images.to(world.device, memory_format=torch.channels_last, non_blocking=True)
            parts = step_of(images, labels, infrared)
            optimizer.zero_grad(set_to_none=True)
            parts.sum().backward()  # type: ignore[no-untyped-call]
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            losses.add(parts)
            run.step += 1
            saving = save_every is not None and run.step % save_every == 0
            if saving or run.step % log_every == 0:
                losses.collect(run)
            if saving and world.main:
                run.save(model, optimizer, losses)
            progress.update()
        progress.close()
        losses.collect(run)
        world.share_buffers(model)
        row: dict[str, Any] = {"epoch": run.epoch, "lr": lr, **losses.finish(len(loader))}
        row["seconds"] = round(time.monotonic() - start, 3)
        last = run.epoch + 1 == epochs
        tested = test is not None and (last or (run.epoch + 1) % recipe.test_every == 0)
        row |= dict.fromkeys(("r1", "mAP"))
        if test is not None and tested:
            row |= test()
        run.epoch, run.step = run.epoch + 1, 0
        if world.main:
            run.log(row)
            if run.best is row:
                save_pretrained(model, run.folder / "best")
            run.save(model, optimizer, losses)
            print(_line(row, epochs), file=sys.stderr, flush=True)
        world.barrier()


def _line(row: dict[str, Any], epochs: int) -> str:
    done = f"epoch {row['epoch'] + 1}/{epochs}"
    parts = " ".join(f"{name} {row[name]:.3f}" for name in ("loss", *PARTS))
    tested = "" if row["r1"] is None else f", rank-1 {row['r1']:.1%}, mAP {row['mAP']:.1%}"
    return f"{done}: {parts}, lr {row['lr']:g}{tested}, {row['seconds']:.1f} s"
