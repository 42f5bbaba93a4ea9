"""Several processes, as ``torchrun`` starts them; without it, one process and no overhead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError

__all__ = ["Distributed", "join"]

T = TypeVar("T")


@dataclass(frozen=True)
class Distributed:
    """This process among those that work together.

    Attributes:
        device: The device of this process.
        rank: 0..size-1; rank 0 writes the files and prints.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over all processes."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process rank 0's buffers: each has its own BN statistics while training."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def shard(self, total: int) -> range:
        """The rows of ``total`` that are this process's: every ``size``-th from its rank on."""
        return range(self.rank, total, self.size)

    def gather_rows(self, rows: Tensor, total: int) -> Tensor:
        """All processes' shards put together: rows of :meth:`shard` to (total, ...), on the CPU."""
        if self.size == 1:
            return rows.cpu()
        most = -(-total // self.size)
        mine = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        mine[: len(rows)] = rows.to(self.device)
        shards = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(shards, mine)
        out = torch.stack([shard.cpu() for shard in shards], dim=1).flatten(0, 1)
        return out[:total]  # row i of shard r is row i * size + r

    def share(self, value: T) -> T:
        """Rank 0's value, in every process."""
        if self.size == 1:
            return value
        box = [value if self.main else None]
        dist.broadcast_object_list(box, 0)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def once(self, work: Callable[[], T]) -> T:
        """Do something in rank 0 alone; every process gets its result.

        Raises:
            UserError: ``work`` raised it; every process does, so that all of them stop.
            OSError: The same.
        """
        if self.size == 1:
            return work()
        outcome: tuple[Any, Exception | None] = None, None
        if self.main:
            try:
                outcome = work(), None
            except (UserError, OSError) as error:
                outcome = None, error
        value, failure = self.share(outcome)
        if failure is not None:
            raise failure
        return value  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(device: torch.device) -> Iterator[Distributed]:
    """Join the processes that ``torchrun`` started, each on its own GPU (nccl), or the CPU (gloo).

    Without ``torchrun`` this process is the only one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Distributed(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Distributed(device, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
