"""A run on disk: its saved states, its log, and what must be the same when it is resumed.

A saved state is one folder, written under a temporary name and renamed: everything that the next
step depends on, the log so far, and the weights of the best epoch. The previous state is removed
only after that, so whenever the process dies, the newest state is whole and of one piece.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..distributed import Distributed
from ..errors import UserError, plural
from ..io import whole_folder, write_atomically
from ..models import save_pretrained
from .sections import flatten

__all__ = ["Run", "load_state", "random_state", "save_state", "set_random_state"]

_TENSOR = "__tensor__"


@dataclass
class Run:
    """A run on disk, and how far it is. All processes hold the same one; rank 0 writes.

    Attributes:
        folder: ``states/`` and ``log.csv`` are kept in it, and ``tensorboard/`` where that is
            installed.
        record: Everything that changes the numbers; it must be the same when the run is resumed.
        trained_on: Whose images the weights come from, for the ``config.json`` of checkpoints.
        epoch: Number of finished epochs.
        step: Number of finished steps of the next epoch.
        history: One row of the log for each finished epoch; a row's ``epoch`` counts from 1.
    """

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    _board: Any = None

    @property
    def newest(self) -> Path | None:
        """The folder of the newest saved state."""
        return max(self._saved(), default=None)

    @property
    def best(self) -> dict[str, Any] | None:
        """The log's row with the best rank-1 on the test set, the first of equals."""
        tested = [row for row in self.history if row.get("r1") is not None]
        return max(tested, key=lambda row: row["r1"], default=None)

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sums: dict[str, float],
        world: Distributed,
    ) -> None:
        """Save all that the next step depends on; all processes call it together."""
        random_states = world.gather(random_state())

        def write() -> None:
            previous, states = self.newest, self.folder / "states"
            with whole_folder(states / f"epoch-{self.epoch:05d}-step-{self.step:07d}") as folder:
                state = {
                    "record": self.record,
                    "epoch": self.epoch,
                    "step": self.step,
                    "history": self.history,
                    "sums": sums,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random": random_states,
                }
                save_state(folder / "state.safetensors", state)
                if self.step == 0 and self.history and self.best is self.history[-1]:
                    self.write_checkpoint(model, folder / "best")
                elif previous is not None and (previous / "best").is_dir():
                    shutil.copytree(previous / "best", folder / "best", copy_function=_link)
            for old in self._saved():
                if old != self.newest:
                    shutil.rmtree(old, ignore_errors=True)
            self.write_log()

        world.once(write)

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, world: Distributed
    ) -> dict[str, float]:
        """Continue from the newest state, as rank 0 reads it; the sums of the epoch's losses.

        Raises:
            UserError: The run was made with other settings; the message names them.
        """
        state = world.share(world.once(self._read))
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        set_random_state(state["random"][world.rank])
        sums: dict[str, float] = state["sums"]
        return sums

    def check(self, epochs: int) -> None:
        """Raise UserError unless :meth:`resume` can continue to so many epochs, or starts."""
        if self.newest is not None:
            replace(self, epoch=self._read(tensors=False)["epoch"]).check_epochs(epochs)

    def check_epochs(self, epochs: int) -> None:
        """Raise UserError if more epochs are finished."""
        if self.epoch > epochs:
            raise UserError(
                f"{self.folder} holds a run of {plural(self.epoch, 'epoch')}: give --epochs "
                f"{self.epoch} or more"
            )

    def write_log(self) -> None:
        """Write ``log.csv``, and the last row to TensorBoard where that is installed."""
        if not self.history:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(k for row in self.history for k in row)))
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(self.folder / "log.csv", text.getvalue())
        row = self.history[-1]
        if self._board is None:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(self.folder / "tensorboard", purge_step=row["epoch"])
        if self._board is not None and self.step == 0:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self._board.add_scalar(name, value, row["epoch"])
            self._board.flush()

    def write_checkpoint(self, model: nn.Module, folder: Path) -> None:
        """A checkpoint folder of the weights as they are, which says what they were trained on."""
        with whole_folder(folder) as partial:
            save_pretrained(model, partial)
            config = json.loads((partial / "config.json").read_text())
            config["deen_zoo"]["trained_on"] = {**self.trained_on, "epoch": self.epoch}
            write_atomically(partial / "config.json", json.dumps(config, indent=2) + "\n")

    def publish_best(self) -> None:
        """Make ``best/`` the best epoch's checkpoint, as the newest state has it."""
        assert self.newest is not None
        with whole_folder(self.folder / "best") as folder:
            shutil.copytree(self.newest / "best", folder, copy_function=_link, dirs_exist_ok=True)

    def _saved(self) -> list[Path]:
        names = self.folder.glob("states/epoch-*")
        return sorted(path for path in names if re.fullmatch(r"epoch-\d+-step-\d+", path.name))

    def _read(self, tensors: bool = True) -> dict[str, Any]:
        folder = self.newest
        if folder is None:
            raise UserError(f"{self.folder} holds no saved state: run without --resume")
        state = load_state(folder / "state.safetensors", tensors)
        if not isinstance(state, dict) or not isinstance(state.get("record"), dict):
            raise UserError(f"{folder} is not a state of a run: choose another --output")
        now = flatten(json.loads(json.dumps(self.record)))  # as it is when read back
        before = flatten(state["record"])
        differ = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        if differ:
            shown = [f"{k} {before.get(k)!r}, now {now.get(k)!r}" for k in differ]
            raise UserError(
                f"{self.folder} holds a run with other settings ({'; '.join(shown)}): "
                "resume with the same ones, or choose another --output"
            )
        return state


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Save nested dicts and lists of tensors, numbers, strings, bools and None.

    Dicts may have int keys, which come back as ints (an optimiser's state has them).
    """
    tensors: dict[str, torch.Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {_TENSOR: name}
        if isinstance(value, dict):
            return {
                "keys": list(value),
                "values": [pack(item) for item in value.values()],
            }
        return [pack(item) for item in value] if isinstance(value, list | tuple) else value

    structure = json.dumps(pack(state))
    write_atomically(path, save(tensors, metadata={"state": structure}))


def load_state(path: str | os.PathLike[str], tensors: bool = True) -> dict[str, Any]:
    """What :func:`save_state` saved, on the CPU; tuples have become lists.

    Without ``tensors`` these are not read, and None stands in their place.

    Raises:
        UserError: The file is missing or damaged, or is no training state.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file; a run writes one after each epoch")
    try:
        with safe_open(str(path), framework="pt") as file:
            structure = json.loads((file.metadata() or {})["state"])

            def unpack(value: Any) -> Any:
                if isinstance(value, list):
                    return [unpack(item) for item in value]
                if not isinstance(value, dict):
                    return value
                if _TENSOR in value:
                    return file.get_tensor(value[_TENSOR]) if tensors else None
                return dict(zip(value["keys"], map(unpack, value["values"]), strict=True))

            state: dict[str, Any] = unpack(structure)
            return state
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a training state of this package, or is damaged ({error}): "
            "remove it and train again, or restore it from a copy"
        ) from error


def random_state() -> dict[str, Any]:
    """The states of this process's random generators: Python, NumPy, torch, its CUDA device."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from a :func:`random_state`, before or after it went through a file."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
