"""Whether the faster forms of a model find the same people."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import create_model
from ..data import open_dataset, synthesize
from ..data.draws import Sample
from ..data.files import open_image
from ..data.transforms import eval_transform
from ..distributed import World
from ..extraction import data_config, extract
from ..models import DEEN
from ..models.inference import optimize_for_inference

__all__ = ["same_first_hits"]


def same_first_hits(
    precisions: Sequence[str], identities: int = 120
) -> tuple[dict[str, float], int]:
    """Share of queries whose first hit is the plain model's, by precision; and how many they are.

    Of ``test_deen_resnet``, over drawn people that it was not trained on: every infrared image
    among all visible ones and the other way round, by the official descriptor with mirrored images.
    int8 is calibrated on images of other people than these.
    """
    model: DEEN = create_model("test_deen_resnet", pretrained=True).eval()
    world = World(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "people")
        synthesize("llcm", root, identities, seed=7, test_fraction=0.9, progress=False)
        dataset = open_dataset("llcm", root)
        samples = dataset.test("visible") + dataset.test("infrared")
        calibration = [
            (_images(model, [s for s in dataset.train() if s.modality == modality][:32]), modality)
            for modality in ("visible", "infrared")
        ]
        wanted = _first_hits(extract(model, samples, world, "float32"), samples)
        shares = {}
        for precision in precisions:
            fast = optimize_for_inference(model, precision, calibration)
            found = _first_hits(extract(fast, samples, world, "float32"), samples)
            shares[precision] = float((found == wanted).float().mean())
    return shares, len(samples)


def _first_hits(rows: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    infrared = torch.tensor([sample.modality == "infrared" for sample in samples])
    similarity = rows[infrared] @ rows[~infrared].T
    return torch.cat([similarity.argmax(dim=1), similarity.argmax(dim=0)])


def _images(model: DEEN, samples: Sequence[Sample]) -> torch.Tensor:
    transform = eval_transform(data_config(model))
    return torch.stack([transform(open_image(sample.path)) for sample in samples])
