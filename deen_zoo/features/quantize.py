"""Post-training int8 quantization by NNCF, calibrated and checked on labelled images."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.cache import read_image
from ..data.protocols import Sample, as_label
from ..errors import UserError, check_least, plural, require
from ..evaluation.metrics import evaluate_ranking
from ..io import check_new_folder, whole_folder
from ..models.base import MODALITIES
from .engines import graph_facts, openvino, pixel_statistics, to_openvino
from .extractor import FeatureExtractor

__all__ = ["quantize"]


def quantize(
    model: str | os.PathLike[str],
    samples: Sequence[Sample],
    output: str | os.PathLike[str],
    images: int = 128,
    same_first_hit: float = 0.985,
    map_drop: float = 0.01,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write a checkpoint folder with int8 graphs for ``engine="openvino", precision="int8"``.

    Half of the identities calibrate. The infrared images of the others search their visible images
    twice, with float32 and with int8 descriptors.

    Args:
        model: A name or a checkpoint folder.
        samples: Labelled images of both modalities, like those that will be extracted.
        output: The folder to write, absent or empty; it loads wherever a checkpoint folder does.
        images: Calibration images of each modality, at most.
        same_first_hit: Least share of queries whose first hit stays the same image.
        map_drop: Largest loss of mAP, as a fraction of 1.
        threads: Threads that decode.

    Returns:
        ``same_first_hit``, ``mAP_float32``, ``mAP_int8``, ``queries`` and ``calibration_images``.

    Raises:
        UserError: Fewer than four identities have both modalities, or int8 is worse than a bound;
            or ``output`` holds something; then nothing is written.
    """
    from ..models import save_pretrained

    ov = openvino()
    nncf = require("nncf", extra="openvino")
    check_least("images", images, 8)
    check_new_folder(output)
    if strange := [s for s in samples if not isinstance(s, Sample)]:
        raise UserError(
            f"a {type(strange[0]).__name__} among the samples: give labelled ones, deen_zoo.data."
            "Sample, as open_dataset(...).test(...) does"
        )
    samples = [s._replace(identity=str(as_label(s.identity, "identity"))) for s in samples]
    people = [{str(s.identity) for s in samples if s.modality == kind} for kind in MODALITIES]
    both = sorted(people[0] & people[1])
    if len(both) < 4:
        raise UserError(
            f"images of both modalities: {plural(len(both), 'identity')}; give at least 4"
        )
    calibrating, tested = set(both[::2]), set(both[1::2])
    exact = FeatureExtractor(model, "cpu", "float32", threads=threads)
    options = dict(model=exact.model, flip=exact.flip, descriptor="official")
    options["transform"] = exact.transform
    held_out = [s for s in samples if str(s.identity) in tested]
    facts = graph_facts(options, exact.provenance["descriptor_sha256"])
    facts |= {"pixels": {}, "calibration_images": 0}
    read = partial(read_image, size=exact.transform.size, intensity=exact.intensity)
    with whole_folder(output) as folder:
        save_pretrained(exact.model, folder)
        for kind in MODALITIES:
            mine = [s for s in samples if s.modality == kind and str(s.identity) in calibrating]
            step = max(1, len(mine) // images)
            pixels = np.stack([read(s.path) for s in mine[::step][:images]])
            statistics = pixel_statistics(torch.from_numpy(pixels))
            facts["pixels"][kind] = [statistics.amin(0).tolist(), statistics.amax(0).tolist()]
            facts["calibration_images"] += len(pixels)
            graph = to_openvino(modality=kind, **options)
            with contextlib.redirect_stdout(sys.stderr):  # where progress belongs
                graph = _to_int8(nncf, graph, pixels)
            target = folder / "openvino" / kind
            target.mkdir(parents=True)
            ov.save_model(graph, target / "graph.xml", compress_to_fp16=False)
        record = folder / "openvino" / "quantization.json"
        record.write_text(json.dumps(facts))
        fast = FeatureExtractor(folder, "cpu", "int8", engine="openvino", threads=threads)
        report = _compare(exact, fast, held_out)
        if report["same_first_hit"] < same_first_hit or (
            report["mAP_float32"] - report["mAP_int8"] > map_drop
        ):
            raise UserError(
                f"int8 keeps the first hit of {report['same_first_hit']:.1%} of "
                f"{report['queries']} queries (bound {same_first_hit:.1%}) and takes mAP from "
                f"{report['mAP_float32']:.4f} to {report['mAP_int8']:.4f} (bound {map_drop}): "
                "nothing was written; give more images or other bounds, or use bfloat16"
            )
        report["calibration_images"] = facts["calibration_images"]
        record.write_text(json.dumps({**facts, **report}, indent=2))
    return report


def _to_int8(nncf: Any, graph: Any, pixels: NDArray[np.uint8]) -> Any:
    """Quantize a graph of one image by calibration images (n, H, W, 3).

    NNCF's usual choices cost descriptors much more: on the shipped model and drawn people they kept
    78 % of the first hits and a mean cosine of 0.981 with float32, these 92 % and 0.999. Its fast
    correction of biases is what harms; ranges of all values, not of most, are a little better.
    """
    ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
    advanced = nncf.AdvancedQuantizationParameters(
        disable_bias_correction=True, activations_range_estimator_params=ranges
    )
    return nncf.quantize(
        graph,
        nncf.Dataset(list(pixels[:, None])),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(pixels),
        advanced_parameters=advanced,
    )


def _compare(
    exact: FeatureExtractor, fast: FeatureExtractor, samples: Sequence[Sample]
) -> dict[str, Any]:
    """What changes when infrared images search visible ones."""
    sides = [[s for s in samples if s.modality == kind] for kind in MODALITIES]
    ids = [[str(s.identity) for s in side] for side in sides]
    hits, scores = [], []
    for extractor in (exact, fast):
        gallery, queries = (extractor(side) for side in sides)
        similarity = queries @ gallery.T
        hits.append(similarity.argmax(1))
        scores.append(evaluate_ranking(similarity.numpy(), ids[1], ids[0], rule="regdb").mAP)
    return {
        "same_first_hit": float((hits[0] == hits[1]).float().mean()),
        "mAP_float32": float(scores[0]),
        "mAP_int8": float(scores[1]),
        "queries": len(sides[1]),
    }
