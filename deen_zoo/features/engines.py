"""What turns a batch of pixels into descriptors: plain PyTorch, or OpenVINO on a CPU."""

from __future__ import annotations

import json
import sys
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import __version__
from ..data.transforms import EvalTransform
from ..device import autocast
from ..errors import UserError, check_choice, require
from ..io import exclusive, sha256_of, whole_folder
from ..models.base import MODALITIES
from ..models.catalog import weights_home

__all__ = ["ENGINES", "OpenVINOEngine", "TorchEngine", "pixel_statistics", "to_openvino"]

ENGINES = ("torch", "openvino")
HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


def openvino() -> ModuleType:
    """OpenVINO, without the reports of each conversion that it and NNCF send to their makers."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return require("openvino", extra="openvino")


class TorchEngine:
    """The model itself, in PyTorch; safe to call from several threads.

    Args:
        model: In eval mode, on ``device``.
        device: Device of the model.
        precision: As for :func:`deen_zoo.device.autocast`.
        flip: Add the descriptor of the mirrored image.
        descriptor: One of ``model.descriptors``.
        transform: The model's, whose normalisation is done on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: str,
        flip: bool,
        descriptor: str,
        transform: EvalTransform,
    ) -> None:
        self.model, self.device, self.precision = model, device, precision
        self.flip, self.descriptor = flip, descriptor
        # Tensors on the device: a GPU multiplies by the inverse of a plain number, which rounds.
        self._scale, self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device)
            for values in ((255.0,), transform.mean, transform.std)
        )

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, infrared: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) and bool (n,) to float32 (n, D) on the CPU, not normalised."""
        images = pixels.to(self.device).float()
        images = images.div_(self._scale).sub_(self._mean).div_(self._std)
        return self.embed(images.permute(0, 3, 1, 2), infrared)

    @torch.inference_mode()
    def embed(self, images: Tensor, infrared: Tensor) -> Tensor:
        """The same for normalised images (n, 3, H, W); a batch of one modality runs one stem.

        Raises:
            UserError: The model is in training mode.
        """
        if self.model.training:  # batch norms would mix the images, and learn from them
            raise UserError("the model is in training mode: call model.eval() before extracting")
        modality: Tensor | str = infrared
        if infrared.all() or not infrared.any():
            modality = "infrared" if infrared[0] else "visible"
        images = images.to(self.device, memory_format=torch.channels_last)
        with autocast(self.device, self.precision):
            rows: Tensor = self.model.forward_embedding(  # type: ignore[operator]
                images, modality, self.flip, self.descriptor
            )
        return rows.float().cpu()


@torch.no_grad()
def traced(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """A TorchScript trace: OpenVINO converts it in half the time of a ``torch.export`` program."""
    return torch.jit.trace(module, example, check_trace=False)  # type: ignore[no-untyped-call]


def to_openvino(
    model: Any, modality: str, flip: bool, descriptor: str, transform: EvalTransform
) -> Any:
    """An OpenVINO model of one stem: a uint8 image (1, H, W, 3) to its descriptor (1, D).

    The normalisation is part of the graph, and so is the mirrored image. It takes one image, as
    OpenVINO's CPU plugin fails on these graphs with a dynamic batch and is no faster with larger
    ones: it computes several images at once in streams.
    """
    ov = openvino()
    preprocess = require("openvino.preprocess", extra="openvino")
    module = model.for_modality(modality, flip, normalize=False, descriptor=descriptor)
    example = (torch.zeros(2, 3, *transform.size),)
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants, as they should
        graph = ov.convert_model(traced(module, example), example_input=example)
    graph.reshape([1, 3, *transform.size])
    steps = preprocess.PrePostProcessor(graph)
    image = steps.input()
    image.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    image.model().set_layout(ov.Layout("NCHW"))
    scaled = image.preprocess().convert_element_type(ov.Type.f32)
    mean, std = ([255 * value for value in values] for values in (transform.mean, transform.std))
    scaled.mean(mean).scale(std)
    return steps.build()


def pixel_statistics(pixels: Tensor) -> Tensor:
    """Brightness and contrast of uint8 images (n, H, W, 3): (n, 2)."""
    values = pixels.float().flatten(1)
    return torch.stack([values.mean(1), values.std(1)], dim=1)


class OpenVINOEngine:
    """OpenVINO on the CPU, one graph per stem; safe to call from several threads.

    Graphs are converted once for the same model and options, and kept in ``openvino`` next to the
    folder of installed weights (``DEEN_ZOO_HOME``, or ``~/.cache/deen_zoo``) in compiled form. int8
    graphs come from the checkpoint folder that ``deen-zoo quantize`` has written.

    Args:
        options: The arguments of :func:`to_openvino` but for the modality.
        precision: ``"auto"`` (float32), ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        key: A digest of the weights.
        folder: The checkpoint folder, for int8.

    Raises:
        UserError: No such precision; or int8 graphs are missing or of other options.
    """

    def __init__(
        self, options: dict[str, Any], precision: str, key: str, folder: Path | None
    ) -> None:
        ov = openvino()
        self.precision = "float32" if precision == "auto" else precision
        check_choice("precision", precision, ("auto", *HINTS))
        self._core, self._options = ov.Core(), options
        if self.precision == "bfloat16" and "BF16" not in self._core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            print("this CPU has no bfloat16: OpenVINO computes in float32", file=sys.stderr)
        facts = graph_facts(options, key)
        told = sha256_of(json.dumps([facts, __version__], sort_keys=True))
        name = f"{key[:16]}-{told[:16]}"
        self._home = weights_home().parent / "openvino" / name
        self._ranges: dict[str, Tensor] = {}
        if self.precision == "int8":
            self._home = self._quantized(folder, facts)
        self._compiled: dict[tuple[str, str], Any] = {}
        self._lock, self._queues = threading.Lock(), threading.local()
        self._warned = False

    def _quantized(self, folder: Path | None, wanted: dict[str, Any]) -> Path:
        graphs = (folder or Path()) / "openvino"
        try:
            facts = json.loads((graphs / "quantization.json").read_bytes())
            pixels = {kind: torch.tensor(facts["pixels"][kind]) for kind in MODALITIES}
            if any(bounds.shape != (2, 2) for bounds in pixels.values()):
                raise ValueError("not the lowest and highest of two statistics")
        except (OSError, ValueError, TypeError, LookupError, RuntimeError):
            raise UserError(
                "precision int8 needs calibrated weights: make a folder of them with "
                "'deen-zoo quantize MODEL IMAGES FOLDER', and give that folder as the model"
            ) from None
        for name, value in wanted.items():
            if facts.get(name) != value:
                raise UserError(
                    f"{graphs} was quantized with {name} {facts.get(name)}, not {value}: quantize "
                    "again, or extract with that"
                )
        self._ranges = pixels
        return graphs

    def __call__(self, pixels: Tensor, infrared: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) and bool (n,) to float32 (n, D) on the CPU, not normalised."""
        out: Tensor | None = None
        for kind, rows in zip(MODALITIES, (~infrared, infrared), strict=True):
            if not rows.any():
                continue
            images = pixels[rows]
            self._notice(kind, images)
            found = self._describe(kind, images.numpy())
            out = torch.empty(len(pixels), found.shape[1]) if out is None else out
            out[rows] = found
        assert out is not None  # a batch has an image
        return out

    def _describe(self, kind: str, images: NDArray[np.uint8]) -> Tensor:
        """The rows of images of one modality, several at once in streams of their own."""
        queue = self._queue(kind, "LATENCY" if len(images) == 1 else "THROUGHPUT")
        queue.wait_all()  # what an interrupted call has left
        rows: dict[int, NDArray[np.float32]] = {}

        def keep(request: Any, place: int) -> None:
            rows[place] = request.get_output_tensor(0).data[0].copy()

        queue.set_callback(keep)
        for place, image in enumerate(images):
            queue.start_async([image[None]], place)
        queue.wait_all()
        return torch.from_numpy(np.stack([rows[place] for place in range(len(images))]))

    def embed(self, images: Tensor, infrared: Tensor) -> Tensor:
        """Raise UserError: the graph normalises by itself."""
        raise UserError(
            "engine 'openvino' takes images, not preprocessed tensors: give uint8 arrays, or use "
            "engine='torch'"
        )

    def _queue(self, kind: str, hint: str) -> Any:
        """This thread's inference requests of a graph that is compiled for LATENCY, all cores for
        one image, or for THROUGHPUT, a few cores for each of several."""
        mine: dict[Any, Any] = self._queues.__dict__
        if (kind, hint) not in mine:
            with self._lock:
                if (kind, hint) not in self._compiled:
                    self._compiled[kind, hint] = self._compile(kind, hint)
            ov = openvino()
            mine[kind, hint] = ov.AsyncInferQueue(self._compiled[kind, hint])
        return mine[kind, hint]

    def _compile(self, kind: str, hint: str) -> Any:
        file = self._home / kind / "graph.xml"
        if not file.exists():
            self._convert(kind, file)
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "PERFORMANCE_HINT": hint,
            "CACHE_DIR": str(self._home / "compiled"),
        }
        return self._core.compile_model(file, "CPU", settings)

    def _convert(self, kind: str, file: Path) -> None:
        """Write a graph; of several processes that want it the others wait."""
        ov = openvino()
        with exclusive(self._home / f"{kind}.lock", f"the graphs in {self._home}", wait=True):
            if not file.exists():
                with whole_folder(self._home / kind) as folder:
                    graph = to_openvino(modality=kind, **self._options)
                    ov.save_model(graph, folder / file.name, compress_to_fp16=False)

    def _notice(self, kind: str, pixels: Tensor) -> None:
        """Warn once if most images are unlike the calibration images."""
        if kind not in self._ranges or self._warned:
            return
        low, high = self._ranges[kind]
        margin = (high - low) / 2
        found = pixel_statistics(pixels)
        far = ((found < low - margin) | (found > high + margin)).any(1)
        if far.float().mean() > 0.5:
            self._warned = True
            print(
                f"{int(far.sum())} of {len(far)} {kind} images are darker, brighter, flatter or "
                "more contrasted than those of the int8 calibration: quantize again with such "
                "images, or use another precision",
                file=sys.stderr,
            )


def graph_facts(options: dict[str, Any], key: str) -> dict[str, Any]:
    """All that a graph depends on besides the modality, as JSON has it.

    Args:
        options: The arguments of :func:`to_openvino` but for the modality.
        key: A digest of the weights.
    """
    model = options["model"]
    facts = {"flip": options["flip"], "descriptor": options["descriptor"]}
    facts |= asdict(options["transform"])
    facts |= {"descriptor_sha256": key, "network": type(model).__qualname__}
    facts["model_args"] = getattr(model, "model_args", {})
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain
