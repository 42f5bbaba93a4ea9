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
        """The module, trained by all processes as if by one with their batches put together.

        Batch norms share their statistics, and gradients are averaged; with losses of
        :meth:`gather_batch` on every process, that average is the gradient of one process.
        """
        if self.size == 1:
            return module
        for norm in [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
            kind = type(norm)
            norm.__class__ = type(kind.__name__, (_SharedStatistics, kind), {})
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)

    def gather_batch(self, rows: Tensor, images: int = 0) -> Tensor:
        """Rows of this process's batch to those of all processes' batches; gradients flow back.

        Args:
            rows: (B*N, ...), for each of B branches the N images.
            images: N; 0 when there is one branch.

        Returns:
            (B*size*N, ...), for each branch the images of rank 0, then those of rank 1, ...
        """
        if self.size == 1:
            return rows
        mine = rows.view(-1, images or len(rows), *rows.shape[1:])  # (B, N, ...)
        slots = [mine if rank == self.rank else torch.zeros_like(mine) for rank in range(self.size)]
        everyone: Tensor = _Sum.apply(torch.cat(slots, dim=1))
        return everyone.flatten(0, 1)

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


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.to(torch.uint8, copy=True) if x.dtype == torch.bool else x.clone()
        dist.all_reduce(total)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _SharedStatistics(nn.modules.batchnorm._BatchNorm):
    """A batch norm whose batch is that of all processes, on any device.

    torch's SyncBatchNorm is for GPUs alone. All processes must call it equally often, with the
    same number of rows.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        count = dist.get_world_size() * x.numel() / x.shape[1]
        mean = _Sum.apply(x.sum(dims)) / count
        centred = x - mean.view(shape)
        squares = centred.square().sum(dims)
        variance = _Sum.apply(squares) / count
        if self.track_running_stats and self.running_mean is not None:
            assert self.running_var is not None and self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
            unbiased = variance.detach() * (count / max(count - 1, 1))
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        out: Tensor = centred * scale.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(input.dtype)


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
