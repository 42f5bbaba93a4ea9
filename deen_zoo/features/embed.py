"""Run a model over images, which a pool of threads decodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import safetensors.torch
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor
from tqdm import tqdm

from ..data.cache import DecodedCache
from ..data.loader import map_batches
from ..data.protocols import Sample
from ..data.transforms import eval_transform
from ..device import autocast
from ..distributed import Distributed
from ..errors import UserError, check_least
from ..models import DEEN
from .sources import Batch, Images, collate, gather

__all__ = ["data_config", "descriptor_width", "embed", "extract", "progress_bar", "run", "split"]
__all__ += ["weights_sha256"]


def data_config(model: DEEN) -> dict[str, Any]:
    """``input_size`` (3, H, W), ``mean``, ``std`` and the rest that the model's images need."""
    config: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
    }


def weights_sha256(model: DEEN) -> str:
    """SHA-256 of the ``model.safetensors`` that :func:`deen_zoo.save_pretrained` would write."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    return hashlib.sha256(safetensors.torch.save(tensors, {"format": "pt"})).hexdigest()


@torch.inference_mode()
def embed(
    model: DEEN,
    images: Images,
    batches: Sequence[range],
    device: torch.device,
    precision: str,
    flip: bool,
    original: bool,
    threads: int | None,
) -> Iterator[Batch]:
    """Descriptors of the images of each batch, on the CPU; threads decode the next ones."""
    training = model.training
    model.eval()
    try:
        for items in map_batches(images.__getitem__, batches, threads):
            batch = collate(items)
            if batch.indices:
                rows = run(model, batch.rows, batch.infrared, device, precision, flip, original)
                batch = batch._replace(rows=rows)
            yield batch
    finally:
        model.train(training)


def split(rows: range, size: int) -> list[range]:
    """``rows`` in runs of ``size``, the last one shorter."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def run(
    model: DEEN,
    images: Tensor,
    infrared: Tensor,
    device: torch.device,
    precision: str,
    flip: bool,
    original: bool,
) -> Tensor:
    """(n, 3, H, W) to (n, 2*B*C) float32 on the CPU; a batch of one modality needs one stem."""
    modality: Tensor | str = infrared
    if infrared.all() or not infrared.any():
        modality = "infrared" if infrared[0] else "visible"
    images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
    descriptor = "original" if original else "official"
    with autocast(device, precision):
        rows: Tensor = model.forward_embedding(images, modality, flip, descriptor)
    return rows.float().cpu()


def extract(
    model: DEEN,
    samples: Sequence[Sample],
    world: Distributed,
    precision: str = "auto",
    flip: bool = True,
    batch_size: int = 64,
    threads: int | None = None,
    cache: DecodedCache | None = None,
    progress: bool = False,
) -> Tensor:
    """The official descriptor of every sample, each image through its own modality's stem, once.

    The processes of ``world`` share the work, and all of them get all rows.

    Args:
        model: On the device of ``world``; left in the mode, training or not, that it was in.
        samples: N images; both modalities may be mixed.
        world: From :func:`deen_zoo.distributed.join`.
        precision: As for :func:`deen_zoo.device.autocast`.
        flip: Add the descriptor of the mirrored image, as the reference's test does.
        batch_size: Images at a time.
        threads: Threads that decode; None is the number of available cores.
        cache: Decoded images.
        progress: Show a bar where stderr is a terminal.

    Returns:
        (N, 2*B*C) float32 on the CPU, not normalised as a whole; row i is ``samples[i]``.

    Raises:
        UserError: A file is missing or broken; the message names it. Or there is no such batch.
    """
    check_least("batch_size", batch_size, 1)
    images = Images(gather(samples, None), eval_transform(data_config(model)), cache)
    mine = world.shard(len(samples))
    out = torch.empty(len(mine), descriptor_width(model))
    batches, done = split(mine, batch_size), 0
    results = embed(model, images, batches, world.device, precision, flip, False, threads)
    with progress_bar(len(mine), progress and world.main) as bar:
        for batch in results:
            if batch.unreadable:
                raise UserError(batch.unreadable[0][1])
            out[done : done + len(batch.indices)] = batch.rows
            done += len(batch.indices)
            bar.update(len(batch.indices))
    return world.gather_rows(out, len(samples))


def progress_bar(total: int, shown: bool) -> Any:
    """A bar on stderr where that is a terminal."""
    return tqdm(None, "extracting", total, unit="image", disable=None if shown else True)


def descriptor_width(model: DEEN) -> int:
    """Numbers of the official descriptor, 2*B*C."""
    return model.embed_dim
