"""Batches for training and evaluation, decoded in worker processes.

A dataset holds names, never pixels. What is random depends on the seed and the place in the epoch,
never on the worker, so any number of workers gives the same batches.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import UserError
from .cache import DecodedCache
from .datasets import Sample
from .images import open_image
from .sampler import Draw, IdentitySampler, generator
from .transforms import EvalTransform, Pixels, TrainTransform, resize

__all__ = ["EvalBatch", "EvalSet", "Loader", "TrainBatch", "TrainLoader", "TrainSet"]
__all__ += ["check_workers", "eval_loader", "read_image", "train_loader"]

Batch = TypeVar("Batch")
DEFAULT_WORKERS = min(4, os.cpu_count() or 1)
Size = tuple[int, int]


class TrainBatch(NamedTuple):
    """One step: the visible images of P identities, then their infrared ones in the same order."""

    images: Tensor  # (2*P*K, 3, H, W) float32
    labels: Tensor  # (2*P*K,) int64, 0..n-1 by sorted identity
    infrared: Tensor  # (2*P*K,) bool


class EvalBatch(NamedTuple):
    """Images in the order of the list that was given, and their places in it."""

    images: Tensor  # (N, 3, H, W) float32
    indices: Tensor  # (N,) int64


class Item(NamedTuple):
    """What a worker makes of one slot of a batch."""

    row: tuple[Tensor, ...] | None  # None: left out
    broken: list[tuple[str, str]]  # (path, message) of the files that were skipped


def read_image(path: str, size: Size, cache: DecodedCache | None = None) -> Pixels:
    """Read an image at size = (height, width), from the cache if it has it: uint8 (H, W, 3).

    Raises:
        UserError: The file is missing or broken; the message names it.
    """
    cached = cache.read(path) if cache is not None else None
    return resize(open_image(path), size) if cached is None else cached


def _check_size(size: Size, cache: DecodedCache | None) -> None:
    if cache is not None and cache.size != size:
        raise UserError(
            f"the decoded cache holds {cache.size[0]}x{cache.size[1]} images and the model takes "
            f"{size[0]}x{size[1]}: open a cache of that size, or go without"
        )


class TrainSet(Dataset[Item | UserError]):
    """Training images, visible ones first, each augmented by the random state of its draw.

    With ``skip_broken`` a broken file gives way to the next image of its identity and modality.

    Attributes:
        identities: The dataset's own identities, sorted; an image's label is its place here.
        visible_ids: Identity of each visible image, for the sampler.
        infrared_ids: Identity of each infrared image.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: Size,
        transform: TrainTransform,
        seed: int = 0,
        cache: DecodedCache | None = None,
        skip_broken: bool = False,
    ) -> None:
        _check_size(size, cache)
        visible = [s for s in samples if s.modality == "visible"]
        infrared = [s for s in samples if s.modality == "infrared"]
        self.visible_ids = [s.identity for s in visible]
        self.infrared_ids = [s.identity for s in infrared]
        self.identities = sorted({*self.visible_ids, *self.infrared_ids})
        label = {identity: i for i, identity in enumerate(self.identities)}
        self.paths = [s.path for s in visible + infrared]
        self.labels = [label[s.identity] for s in visible + infrared]
        self.size, self.transform, self.seed = size, transform, seed
        self.cache, self.skip_broken = cache, skip_broken

    def __len__(self) -> int:
        return len(self.paths)

    def _substitutes(self, index: int) -> Iterator[int]:
        """This image, then those of its identity and modality, from the next one round."""
        yield index
        first = len(self.visible_ids)
        start, stop = (0, first) if index < first else (first, len(self.paths))
        for other in (*range(index + 1, stop), *range(start, index)):
            if self.labels[other] == self.labels[index]:
                yield other

    def __getitem__(self, draw: Draw) -> Item | UserError:
        index, epoch, position = draw
        label, infrared = self.labels[index], index >= len(self.visible_ids)
        broken: list[tuple[str, str]] = []
        for i in self._substitutes(index):
            try:
                pixels = read_image(self.paths[i], self.size, self.cache)
            except UserError as error:
                if not self.skip_broken:
                    return error
                broken.append((self.paths[i], str(error)))
                continue
            image = self.transform(pixels, generator(self.seed, 1, epoch, position))
            return Item((image, torch.tensor(label), torch.tensor(infrared)), broken)
        return UserError(
            f"all {len(broken)} {'infrared' if infrared else 'visible'} images of identity "
            f"{self.identities[label]} are broken: mend them or leave it out ({broken[0][1]})"
        )


class EvalSet(Dataset[Item | UserError]):
    """Images in a fixed order, each with its place in the list."""

    def __init__(
        self,
        paths: Sequence[str],
        transform: EvalTransform,
        cache: DecodedCache | None = None,
        skip_broken: bool = False,
    ) -> None:
        _check_size(transform.size, cache)
        self.paths, self.transform = list(paths), transform
        self.cache, self.skip_broken = cache, skip_broken

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item | UserError:
        path = self.paths[index]
        try:
            pixels = read_image(path, self.transform.size, self.cache)
        except UserError as error:
            return Item(None, [(path, str(error))]) if self.skip_broken else error
        return Item((self.transform(pixels), torch.tensor(index)), [])


def check_workers(workers: int) -> None:
    """Check that so many workers of a ``DataLoader`` can hand their batches over.

    They do so by a socket below the temporary folder; where its name would be too long for the
    system (107 bytes on Linux, 103 on macOS), they would wait for ever.

    Raises:
        UserError: It is too long.
    """
    limit = 107 if sys.platform == "linux" else 103
    folder = tempfile.gettempdir()
    longest = limit - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
    if workers and os.name == "posix" and len(os.fsencode(folder)) > longest:
        raise UserError(
            f"workers={workers}: the temporary folder's name has {len(os.fsencode(folder))} bytes "
            f"and at most {longest} work ({folder}): set TMPDIR to a shorter one, or workers=0"
        )


def _collate(items: list[Item | UserError]) -> Item | UserError:
    """One item of stacked rows, or the first error."""
    rows, broken = [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        broken += item.broken
        if item.row is not None:
            rows.append(item.row)
    # default_collate stacks straight into shared memory when it runs in a worker.
    return Item(tuple(default_collate(rows)) if rows else None, broken)


class Loader(Generic[Batch]):
    """A ``DataLoader`` whose workers report broken files as values, not as exceptions.

    An exception would reach the user wrapped in the worker's traceback.

    Attributes:
        broken: The broken files skipped so far, path to message.
    """

    def __init__(
        self,
        dataset: Dataset[Item | UserError],
        make: Callable[..., Batch],
        workers: int,
        pin_memory: bool | None,
        **options: Any,
    ) -> None:
        check_workers(workers)
        self.make = make
        self.broken: dict[str, str] = {}
        self.loader: DataLoader[Item | UserError] = DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            # Its own: each iteration draws a number from it, which must not move the global state.
            generator=torch.Generator(),
            **options,
        )

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order.

        Raises:
            UserError: A broken file, by name; or, where those are skipped, nothing is left.
        """
        empty = True
        for result in self.loader:
            if isinstance(result, UserError):
                # A new one: raising ``result`` would tie this frame, and so the workers, in a cycle
                # that torch's queues do not survive: it would wait 5 seconds for each worker.
                raise UserError(str(result))
            row, broken = result
            for path, message in broken:
                if path not in self.broken:
                    self.broken[path] = message
                    count = len(self.broken)
                    warnings.warn(f"broken file {count} skipped: {message}", stacklevel=2)
            if row is not None:
                empty = False
                yield self.make(*row)
        if empty and self.broken:
            raise UserError(f"none of the images can be read: {next(iter(self.broken.values()))}")


class TrainLoader(Loader[TrainBatch]):
    """Training batches of one epoch; :meth:`set_epoch` chooses which, and where to enter it."""

    def __init__(
        self, dataset: TrainSet, sampler: IdentitySampler, workers: int, pin_memory: bool | None
    ) -> None:
        super().__init__(
            dataset,
            TrainBatch,
            workers,
            pin_memory,
            batch_sampler=sampler,
            persistent_workers=workers > 0,
        )
        self.identities, self.sampler = dataset.identities, sampler

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Iterate over this epoch next; after k finished steps, go on from ``start_step=k``."""
        self.sampler.set_epoch(epoch, start_step)


def train_loader(
    samples: Sequence[Sample],
    size: Size,
    transform: TrainTransform,
    identities_per_batch: int = 6,
    images_per_modality: int = 4,
    seed: int = 0,
    workers: int = DEFAULT_WORKERS,
    cache: DecodedCache | None = None,
    skip_broken: bool = False,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool | None = None,
) -> TrainLoader:
    """P x K batches of a training set, the same for any number of workers.

    Args:
        samples: Training images of both modalities.
        size: (height, width) of the model's input.
        transform: From :func:`~deen_zoo.data.transforms.train_transform`.
        identities_per_batch: P, of this process.
        images_per_modality: K.
        seed: Of the sampling and the augmentation.
        workers: Processes that decode; 0 decodes in this one.
        cache: Decoded images; those it lacks are read from their files.
        skip_broken: Replace a broken file by another image of its identity and modality, and warn,
            instead of raising.
        rank: This process, of ``world_size`` that train together.
        world_size: Number of them; the seed must be the same in all.
        pin_memory: None is yes where there is a CUDA device.

    Raises:
        UserError: See :class:`~deen_zoo.data.sampler.IdentitySampler`; while iterating, a broken
            file.
    """
    dataset = TrainSet(samples, size, transform, seed, cache, skip_broken)
    sampler = IdentitySampler(
        dataset.visible_ids,
        dataset.infrared_ids,
        identities_per_batch,
        images_per_modality,
        seed,
        rank,
        world_size,
    )
    return TrainLoader(dataset, sampler, workers, pin_memory)


def eval_loader(
    images: Sequence[Sample | str | os.PathLike[str]],
    transform: EvalTransform,
    batch_size: int = 64,
    workers: int = DEFAULT_WORKERS,
    cache: DecodedCache | None = None,
    skip_broken: bool = False,
    pin_memory: bool | None = None,
) -> Loader[EvalBatch]:
    """Batches of images in their order, each image with its place in the list.

    With ``skip_broken``, broken files are missing from the batches, warned about, and listed in the
    loader's ``broken``; otherwise the first one is a UserError that names it. The other arguments
    are those of :func:`train_loader`.
    """
    paths = [image.path if isinstance(image, Sample) else os.fspath(image) for image in images]
    dataset = EvalSet(paths, transform, cache, skip_broken)
    return Loader(dataset, EvalBatch, workers, pin_memory, batch_size=batch_size)
