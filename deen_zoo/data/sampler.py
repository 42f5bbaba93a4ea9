"""P x K identity sampling: a batch holds P identities, and K images of each in each modality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ..errors import UserError, check_least, plural
from .protocols import Label, label_order

__all__ = ["BatchSlot", "IdentitySampler", "generator"]


class BatchSlot(NamedTuple):
    """One slot of a batch: which image, and the place in the epoch that seeds its augmentation."""

    image: int
    epoch: int
    position: int


def generator(seed: int, *key: int) -> np.random.Generator:
    """A random generator of its own for every key, the same in any process.

    >>> bool(generator(0, 1, 2).random() == generator(0, 1, 2).random())
    True
    """
    # A spawn key, as SeedSequence pads a list with zeros: [0, 1] and [0, 1, 0] would be one stream.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


class IdentitySampler(Sampler[list[BatchSlot]]):
    """Batch sampler over visible images (indices 0..V-1) followed by infrared ones (V..V+I-1).

    A batch holds P distinct identities, drawn without replacement, and for each of them K visible
    and K infrared images, drawn with replacement; the P*K visible ones come first and the infrared
    ones follow in the same order of identities (the reference's ``IdentitySampler``). An epoch has
    ``max(V, I) // (P * K) + 1`` batches. With several processes a step draws world_size * P
    distinct identities, of which each rank takes its own P, and an epoch is that much shorter: the
    ranks together are one process with world_size * P identities a batch.

    A batch depends on (seed, epoch, step) alone, so an epoch can be entered at any step.

    Args:
        visible_ids: Identity of each visible image.
        infrared_ids: Identity of each infrared image.
        identities_per_batch: P, of one process.
        images_per_modality: K.
        seed: Not negative.
        rank: This process, 0..world_size-1.
        world_size: Number of processes.

    Raises:
        UserError: An identity lacks one modality, or there are fewer than world_size * P of them.

    >>> sampler = IdentitySampler([7, 7, 8], [8, 7], identities_per_batch=2, images_per_modality=1)
    >>> len(sampler), [draw.position for draw in next(iter(sampler))]
    (2, [0, 1, 2, 3])
    """

    def __init__(
        self,
        visible_ids: Sequence[Label],
        infrared_ids: Sequence[Label],
        identities_per_batch: int,
        images_per_modality: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.p, self.k = identities_per_batch, images_per_modality
        self.seed, self.rank, self.world_size = seed, rank, world_size
        check_least("identities_per_batch", self.p, 1)
        check_least("images_per_modality", self.k, 1)
        check_least("seed", seed, 0)
        visible, infrared = set(visible_ids), set(infrared_ids)
        if visible != infrared:
            lonely = sorted(visible ^ infrared, key=label_order)
            raise UserError(
                f"{plural(len(lonely), 'identity')} with images of one modality only, such as "
                f"{', '.join(map(str, lonely[:10]))}; training needs both: add the missing images "
                "or leave them out"
            )
        if len(visible) < self.p * world_size:
            most = len(visible) // world_size
            option = f" (--set data.identities_per_batch={most})" if most > 1 else ""
            raise UserError(
                f"{len(visible)} identities, and a batch needs {self.p * world_size} distinct ones "
                f"({self.p} in each of {world_size} processes): "
                f"use fewer identities per batch{option}, or more data"
            )
        # images[modality][i]: the indices of the i-th identity's images
        self.images: list[list[NDArray[np.int64]]] = []
        for ids, offset in ((visible_ids, 0), (infrared_ids, len(visible_ids))):
            groups: dict[Label, list[int]] = {i: [] for i in sorted(visible, key=label_order)}
            for n, identity in enumerate(ids, start=offset):
                groups[identity].append(n)
            self.images.append([np.array(group) for group in groups.values()])
        most = max(len(visible_ids), len(infrared_ids))
        self.steps = most // (world_size * self.p * self.k) + 1
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Iterate over this epoch next, from this step on (steps count from 0)."""
        if not 0 <= start_step <= self.steps or epoch < 0:
            raise UserError(
                f"epoch {epoch}, step {start_step}: epochs start at 0, and an epoch of this data "
                f"has {self.steps} steps; was the run saved with other data or another batch size?"
            )
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """Steps of a whole epoch, wherever the iteration starts."""
        return self.steps

    def __iter__(self) -> Iterator[list[BatchSlot]]:
        for step in range(self.start_step, self.steps):
            yield self.batch(self.epoch, step)

    def batch(self, epoch: int, step: int) -> list[BatchSlot]:
        """This rank's 2*P*K slots of one step."""
        rng = generator(self.seed, 0, epoch, step)
        everyone = self.world_size * self.p  # the identities of all ranks
        chosen = rng.choice(len(self.images[0]), everyone, replace=False)
        index = np.array(
            [rng.choice(images[i], self.k) for images in self.images for i in chosen]
        ).reshape(2, everyone, self.k)
        position = step * index.size + np.arange(index.size).reshape(index.shape)
        mine = slice(self.rank * self.p, (self.rank + 1) * self.p)
        return [
            BatchSlot(int(i), epoch, int(at))
            for i, at in zip(index[:, mine].flat, position[:, mine].flat, strict=True)
        ]
