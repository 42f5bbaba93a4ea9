"""Images to descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor
from tqdm import tqdm

from .data.cache import DecodedCache
from .data.datasets import Sample
from .data.loading import eval_loader
from .data.transforms import eval_transform
from .device import autocast
from .distributed import World
from .models import DEEN

__all__ = ["data_config", "extract"]


def data_config(model: DEEN) -> dict[str, Any]:
    """``input_size`` (3, H, W), ``mean``, ``std`` and the rest that the model's images need."""
    config: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
    }


@torch.inference_mode()
def extract(
    model: DEEN,
    samples: Sequence[Sample],
    world: World,
    precision: str = "auto",
    flip: bool = True,
    batch_size: int = 64,
    workers: int = 4,
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
        workers: Processes that decode.
        cache: Decoded images.
        progress: Show a bar where stderr is a terminal.

    Returns:
        (N, 2*B*C) float32 on the CPU; row i is ``samples[i]``.
    """
    training = model.training
    model.eval()
    transform = eval_transform(data_config(model))
    width: int = 2 * model.num_branches * model.branch_features  # type: ignore[assignment]
    out = torch.empty(len(samples), width)
    for modality in ("visible", "infrared"):
        rows = [i for i, sample in enumerate(samples) if sample.modality == modality]
        mine = [samples[rows[i]] for i in world.shard(len(rows))]
        shard = torch.empty(len(mine), width)
        loader = eval_loader(mine, transform, batch_size, workers if mine else 0, cache)
        hidden = None if progress and world.main else True
        for images, indices in tqdm(loader, f"extracting {modality}", disable=hidden):
            with autocast(world.device, precision):
                images = images.to(
                    world.device, memory_format=torch.channels_last, non_blocking=True
                )
                shard[indices] = model.forward_embedding(images, modality, flip).float().cpu()
        out[rows] = world.gather_rows(shard, len(rows))
    model.train(training)
    return out
