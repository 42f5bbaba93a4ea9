"""Batches for training and evaluation, decoded by a pool of threads.

Pillow gives up the interpreter lock while it decodes and resizes, so threads use all cores, share
the memory, and end with the process. What is random depends on the seed and the position in the
epoch, never on the thread, so any number of threads gives the same batches.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import UserError, check_least
from ..io import cores
from .cache import DecodedCache
from .images import Intensity, check_intensity, read_image
from .protocols import Sample, label_order
from .sampler import BatchSlot, IdentitySampler, generator
from .transforms import ChannelTransform, EvalTransform, TrainTransform

__all__ = ["EvalBatch", "Loader", "TrainBatch", "TrainLoader", "TrainSet"]
__all__ += ["cores", "eval_loader", "map_batches", "train_loader"]

Batch = TypeVar("Batch")
T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # batches that are decoded while one is computed
Size = tuple[int, int]


class TrainBatch(NamedTuple):
    """One step: the visible images of P identities, then their infrared ones in the same order.

    N is 2*P*K, or more where the transform gives several views of an image, one after another.
    """

    images: Tensor  # (N, 3, H, W) float32
    labels: Tensor  # (N,) int64, 0..n-1 by sorted identity
    infrared: Tensor  # (N,) bool


class EvalBatch(NamedTuple):
    """Images in the order of the given list, and their indices in it."""

    images: Tensor  # (N, 3, H, W) float32
    indices: Tensor  # (N,) int64


class Item(NamedTuple):
    """One slot of a batch."""

    rows: list[tuple[Tensor, ...]]  # none if left out, several if the transform gives several views
    broken: list[tuple[str, str]]  # (path, message) of the files that were skipped


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


def _check_cache(size: Size, intensity: Intensity, cache: DecodedCache | None) -> None:
    if cache is not None and cache.size != size:
        raise UserError(
            f"the decoded cache holds {cache.size[0]}x{cache.size[1]} images and the model takes "
            f"{size[0]}x{size[1]}: open a cache of that size, or do without"
        )
    if cache is not None and cache.intensity != check_intensity(intensity):
        raise UserError(
            f"the decoded cache holds images of intensity {cache.intensity!r}, not {intensity!r}: "
            "open a cache of that intensity, or do without"
        )


class TrainSet:
    """Training images, visible ones first, each augmented by the random state of its slot.

    With ``skip_broken`` a broken file is replaced by the next image of its identity and modality.

    Attributes:
        identities: The dataset's own identities, sorted; an image's label is its index here.
        visible_ids: Identity of each visible image, for the sampler.
        infrared_ids: Identity of each infrared image.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: Size,
        transform: TrainTransform | ChannelTransform,
        seed: int = 0,
        cache: DecodedCache | None = None,
        skip_broken: bool = False,
        intensity: Intensity = "full",
    ) -> None:
        _check_cache(size, intensity, cache)
        visible = [s for s in samples if s.modality == "visible"]
        infrared = [s for s in samples if s.modality == "infrared"]
        self.visible_ids = [s.identity for s in visible]
        self.infrared_ids = [s.identity for s in infrared]
        self.identities = sorted({*self.visible_ids, *self.infrared_ids}, key=label_order)
        label = {identity: i for i, identity in enumerate(self.identities)}
        self.paths = [s.path for s in visible + infrared]
        self.labels = [label[s.identity] for s in visible + infrared]
        self.size, self.transform, self.seed = size, transform, seed
        self.cache, self.skip_broken, self.intensity = cache, skip_broken, intensity

    def __len__(self) -> int:
        return len(self.paths)

    def _substitutes(self, index: int) -> Iterator[int]:
        """This image, then the others of its identity and modality, starting after it."""
        yield index
        first = len(self.visible_ids)
        start, stop = (0, first) if index < first else (first, len(self.paths))
        for other in (*range(index + 1, stop), *range(start, index)):
            if self.labels[other] == self.labels[index]:
                yield other

    def __getitem__(self, slot: BatchSlot) -> Item:
        index, epoch, position = slot
        label, infrared = self.labels[index], index >= len(self.visible_ids)
        broken: list[tuple[str, str]] = []
        for i in self._substitutes(index):
            try:
                pixels = read_image(self.paths[i], self.size, self.cache, self.intensity)
            except UserError as error:
                if not self.skip_broken:
                    raise
                broken.append((self.paths[i], str(error)))
                continue
            rng = generator(self.seed, 1, epoch, position)
            if isinstance(self.transform, ChannelTransform):
                views = self.transform.views(pixels, rng, infrared)
            else:
                views = [self.transform(pixels, rng)]
            told = torch.tensor(label), torch.tensor(infrared)
            return Item([(view, *told) for view in views], broken)
        raise UserError(
            f"all {len(broken)} {'infrared' if infrared else 'visible'} images of identity "
            f"{self.identities[label]} are broken: repair them or leave it out ({broken[0][1]})"
        )


class Loader(Generic[Batch]):
    """Batches of what ``load`` gives for each slot, decoded by threads.

    Attributes:
        broken: The broken files skipped so far, path to message.
    """

    def __init__(
        self,
        load: Callable[[Any], Item],
        batches: Any,
        make: Callable[..., Batch],
        threads: int | None,
    ) -> None:
        if threads is not None:
            check_least("threads", threads, 1)
        self._load, self._batches, self._make, self._threads = load, batches, make, threads
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order.

        Raises:
            UserError: A broken file, by name; or, where those are skipped, nothing is left.
        """
        empty = True
        for items in map_batches(self._load, self._batches, self._threads):
            for path, message in (one for item in items for one in item.broken):
                if path not in self.broken:
                    self.broken[path] = message
                    count = len(self.broken)
                    warnings.warn(f"broken file {count} skipped: {message}", stacklevel=2)
            rows = [row for item in items for row in item.rows]
            if rows:
                empty = False
                yield self._make(*map(torch.stack, zip(*rows, strict=True)))
        if empty and self.broken:
            raise UserError(f"none of the images can be read: {next(iter(self.broken.values()))}")


class TrainLoader(Loader[TrainBatch]):
    """Training batches of one epoch; :meth:`set_epoch` chooses which, and where to enter it."""

    def __init__(self, dataset: TrainSet, sampler: IdentitySampler, threads: int | None) -> None:
        super().__init__(dataset.__getitem__, sampler, TrainBatch, threads)
        self.identities, self.sampler = dataset.identities, sampler

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Iterate over this epoch next; after k finished steps, go on from ``start_step=k``."""
        self.sampler.set_epoch(epoch, start_step)


def train_loader(
    samples: Sequence[Sample],
    size: Size,
    transform: TrainTransform | ChannelTransform,
    identities_per_batch: int = 6,
    images_per_modality: int = 4,
    seed: int = 0,
    threads: int | None = None,
    cache: DecodedCache | None = None,
    skip_broken: bool = False,
    rank: int = 0,
    world_size: int = 1,
    intensity: Intensity = "full",
) -> TrainLoader:
    """P x K batches of a training set, the same for any number of threads.

    Args:
        samples: Training images of both modalities.
        size: (height, width) of the model's input.
        transform: From :func:`~deen_zoo.data.transforms.train_transform`, or any function of a
            uint8 image (H, W, 3) and a NumPy generator that gives a float tensor (3, H, W); or a
            :class:`~deen_zoo.data.transforms.ChannelTransform`, which gives several views.
        identities_per_batch: P, in this process.
        images_per_modality: K.
        seed: Seed of the sampling and the augmentation.
        threads: Threads that decode and augment; None is the number of available cores.
        cache: Decoded images; those it lacks are read from their files.
        skip_broken: Replace a broken file by another image of its identity and modality, and warn,
            instead of raising.
        rank: This process among the ``world_size`` that train together.
        world_size: Number of processes; the seed must be the same in all of them.
        intensity: How 16-bit images become 8-bit, see :func:`~deen_zoo.data.open_image`.

    Raises:
        UserError: See :class:`~deen_zoo.data.sampler.IdentitySampler`; while iterating, a broken
            file.
    """
    dataset = TrainSet(samples, size, transform, seed, cache, skip_broken, intensity)
    sampler = IdentitySampler(
        dataset.visible_ids,
        dataset.infrared_ids,
        identities_per_batch,
        images_per_modality,
        seed,
        rank,
        world_size,
    )
    return TrainLoader(dataset, sampler, threads)


def eval_loader(
    images: Sequence[Sample | str | os.PathLike[str]],
    transform: EvalTransform,
    batch_size: int = 64,
    threads: int | None = None,
    cache: DecodedCache | None = None,
    skip_broken: bool = False,
    intensity: Intensity = "full",
) -> Loader[EvalBatch]:
    """Batches of images in their order, each image with its index in the list.

    With ``skip_broken``, broken files are missing from the batches, warned about, and listed in the
    loader's ``broken``; otherwise the first one is a UserError that names it. The other arguments
    are those of :func:`train_loader`.
    """
    _check_cache(transform.size, intensity, cache)
    paths = [image.path if isinstance(image, Sample) else os.fspath(image) for image in images]

    def load(index: int) -> Item:
        try:
            pixels = read_image(paths[index], transform.size, cache, intensity)
        except UserError as error:
            if not skip_broken:
                raise
            return Item([], [(paths[index], str(error))])
        return Item([(transform(pixels), torch.tensor(index))], [])

    batches = [
        range(len(paths))[start : start + batch_size] for start in range(0, len(paths), batch_size)
    ]
    return Loader(load, batches, EvalBatch, threads)
