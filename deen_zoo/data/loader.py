"""Batches for training, decoded by a pool of threads.

Pillow gives up the interpreter lock while it decodes and resizes, so threads use all cores, share
the memory, and end with the process. What is random depends on the seed and the position in the
epoch, never on the thread, so any number of threads gives the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import UserError, check_least
from ..io import cores
from .cache import DecodedCache, read_image
from .images import Intensity, check_intensity
from .protocols import Sample, as_label, label_order
from .sampler import BatchSlot, IdentitySampler, generator
from .transforms import TrainTransform

__all__ = ["TrainBatch", "TrainLoader", "map_batches"]

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # batches that are decoded while one is computed


class TrainBatch(NamedTuple):
    """One step: the visible images of P identities, then their infrared ones in the same order.

    N is 2*P*K, or more where the transform gives several views of an image, one after another.
    """

    images: Tensor  # (N, 3, H, W) float32
    labels: Tensor  # (N,) int64, 0..n-1 by sorted identity
    infrared: Tensor  # (N,) bool


def map_batches(
    function: Callable[[T], R], batches: Iterable[Sequence[T]], threads: int | None = None
) -> Iterator[list[R]]:
    """Apply ``function`` to every item of every batch, in order, in a pool of threads.

    The pool works on the next two batches while the caller uses one. It stops when the iterator is
    closed, exhausted, or raises; the first exception in the order of the items is raised.

    Args:
        function: Called from the threads.
        batches: Read in the caller's thread.
        threads: At least 1; None is the number of available cores.

    >>> list(map_batches(lambda x: x * x, [[1, 2], [3]]))
    [[1, 4], [9]]
    """
    pool = ThreadPoolExecutor(cores() if threads is None else threads, "decode")
    pending: deque[list[Future[R]]] = deque()
    try:
        for batch in batches:
            pending.append([pool.submit(function, item) for item in batch])
            if len(pending) > AHEAD:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


class TrainLoader:
    """P x K batches of a training set; :meth:`set_epoch` chooses the epoch, and where to enter it.

    Args:
        samples: Training images of both modalities.
        size: (height, width) of the model's input.
        transform: The augmentation.
        identities_per_batch: P, in this process.
        images_per_modality: K.
        seed: Seed of the sampling and the augmentation.
        threads: Threads that decode and augment; None is the number of available cores.
        cache: Decoded images; those it lacks are read from their files.
        rank: This process among the ``world_size`` that train together.
        world_size: Number of processes; the seed must be the same in all of them.
        intensity: How 16-bit images become 8-bit, see :func:`~deen_zoo.data.open_image`.

    Raises:
        UserError: See :class:`~deen_zoo.data.sampler.IdentitySampler`; while iterating, a broken
            file.

    Attributes:
        identities: The dataset's own identities, sorted; an image's label is its index here.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: tuple[int, int],
        transform: TrainTransform,
        identities_per_batch: int,
        images_per_modality: int,
        seed: int = 0,
        threads: int | None = None,
        cache: DecodedCache | None = None,
        rank: int = 0,
        world_size: int = 1,
        intensity: Intensity = "full",
    ) -> None:
        if threads is not None:
            check_least("threads", threads, 1)
        for what, held, wanted in (
            ("size", cache and cache.size, size),
            ("intensity", cache and cache.intensity, check_intensity(intensity)),
        ):
            if cache is not None and held != wanted:
                raise UserError(f"the decoded cache has {what} {held}, not {wanted}: open another")
        visible = [s for s in samples if s.modality == "visible"]
        self.samples = visible + [s for s in samples if s.modality == "infrared"]
        ids = [as_label(s.identity, "identity") for s in self.samples]
        self.identities = sorted(set(ids), key=label_order)
        self.size, self.transform, self.seed = size, transform, seed
        self.threads, self.cache, self.intensity = threads, cache, intensity
        pk = identities_per_batch, images_per_modality
        split = ids[: len(visible)], ids[len(visible) :]
        self.sampler = IdentitySampler(*split, *pk, seed, rank, world_size)
        self._label = {identity: label for label, identity in enumerate(self.identities)}

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Iterate over this epoch next; after k finished steps, go on from ``start_step=k``."""
        self.sampler.set_epoch(epoch, start_step)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[TrainBatch]:
        for slots in map_batches(self._load, self.sampler, self.threads):
            rows = [row for views in slots for row in views]
            yield TrainBatch(*map(torch.stack, zip(*rows, strict=True)))

    def _load(self, slot: BatchSlot) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The views of an image, each with its label and modality."""
        sample = self.samples[slot.image]
        pixels = read_image(sample.path, self.size, self.cache, self.intensity)
        rng = generator(self.seed, 1, slot.epoch, slot.position)
        infrared = sample.modality == "infrared"
        told = torch.tensor(self._label[as_label(sample.identity)]), torch.tensor(infrared)
        return [(view, *told) for view in self.transform.views(pixels, rng, infrared)]
