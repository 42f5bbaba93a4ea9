"""A model as one file for other runtimes: ONNX, OpenVINO IR, TorchScript or torch.export.

Nothing is written unless the file, read back and run, gives the numbers that torch gives.
"""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError, brief, check_choice, require
from .features.engines import traced
from .features.extractor import data_config
from .io import check_target, reserved, whole_file
from .models import ReidModel
from .models.base import MODALITIES
from .models.pretrained import VALID

__all__ = ["FORMATS", "OUTPUTS", "ExportReport", "export_model"]

FORMATS = {
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
    ".xml": ("openvino",),
    ".pt": (),
    ".pt2": (),
}  # and what writing it needs
OUTPUTS = ("embedding", "logits")
BATCHES = (1, 3)
TOLERANCE = 1e-4  # relative where outputs exceed 1

Inputs = dict[str, Tensor]
Note = dict[str, Any]
Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_model` wrote, and how closely it agrees with torch.

    Attributes:
        path: The file.
        metadata: What the file says about itself: model, output, modality, flip, preprocessing.
        size_bytes: Size of the file; of OpenVINO's both files.
        differences: Greatest difference from torch in each check, relative where outputs exceed 1.
    """

    path: str
    metadata: Note
    size_bytes: int
    differences: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        channels, height, width = self.metadata["preprocessing"]["input_size"]
        modality = self.metadata["modality"]
        told = ", modality [batch]" if modality == "input" else f", {modality} only"
        shape = f"[batch, {channels}, {height}, {width}]{told}"
        return (
            f"{self.path}: {self.size_bytes / 1e6:.1f} MB, images {shape} -> "
            f"{self.metadata['output']}\ndiffers from torch by at most "
            f"{max(self.differences.values()):.1e} (batches: {', '.join(self.differences)})"
        )


class _Function(nn.Module):
    """A function of ``images``, and of ``modality`` where it is an input."""

    def __init__(self, model: ReidModel, note: Note) -> None:
        super().__init__()
        self.model, self.note = model, note

    def forward(self, images: Tensor, modality: Tensor | None = None) -> Tensor:
        note, told = self.note, self.note["modality"] if modality is None else modality
        if note["output"] == "logits":
            return self.model.forward(images, told)
        rows = self.model.forward_embedding(images, told, note["flip"], note["descriptor"])
        return nn.functional.normalize(rows) if note["normalize"] else rows


def export_model(
    model: ReidModel,
    path: str | os.PathLike[str],
    *,
    modality: str,
    output: str = "embedding",
    descriptor: str | None = None,
    flip: bool | None = None,
    normalize: bool | None = None,
    size: tuple[int, int] | None = None,
) -> ExportReport:
    """Write a model as ONNX, OpenVINO IR, TorchScript or a ``torch.export`` program.

    The file takes ``images`` (N, 3, H, W) float32, normalised, of any N, and gives the rows that
    :class:`deen_zoo.FeatureExtractor` gives. Its metadata, under ``deen_zoo``, say how images are
    prepared. It is run on batches of 1 and 3 before it gets its name; its numbers may differ from
    those of ``model`` by :data:`TOLERANCE`.

    Args:
        model: It is left as it is; the file is in float32.
        path: Ends in ``.onnx``, ``.xml`` (OpenVINO; a ``.bin`` is written next to it), ``.pt``
            (TorchScript) or ``.pt2`` (``torch.export``).
        modality: ``"visible"`` or ``"infrared"``, which leaves the other stem out; or ``"input"``:
            the file takes a second input ``modality`` (N,) bool, True for infrared.
        output: ``"embedding"`` or ``"logits"``, to which the next three do not apply.
        descriptor: Which embedding, one of ``model.descriptors``; ``"official"`` when None.
        flip: Add the descriptor of the mirrored images; None as the model's results were measured.
        normalize: Scale each embedding to length 1, also when None.
        size: (H, W) of the images; the model's own when None.

    Raises:
        UserError: An argument is none of the above; or the file's numbers are not torch's.
        MissingExtraError: What the format needs is not installed.
    """
    path = Path(path)
    options: Note = {"descriptor": descriptor, "flip": flip, "normalize": normalize}
    _check(model, path, output, modality, options)
    if output == "embedding":
        usual: Note = {"descriptor": "official", "flip": model.flip, "normalize": True}
        options = {k: usual[k] if value is None else value for k, value in options.items()}
    config = data_config(model)
    height, width = size or config["input_size"][1:]
    if not VALID["input_size"]((1, int(height), int(width))):
        raise UserError(f"size {height} {width}: give a height and a width from 1 to 4096")
    checks = _checks(modality, (int(model.in_chans), height, width))
    note = {
        "model": getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__),
        "output": output,
        "modality": modality,
        **options,
        "preprocessing": {**config, "input_size": (model.in_chans, height, width)},
    }
    function = _Function(copy.deepcopy(model).cpu().float(), note).eval()
    try:
        with torch.inference_mode():
            wanted = {name: function(**inputs) for name, inputs in checks.items()}
    except (ValueError, RuntimeError) as error:  # not every size fits the network
        raise UserError(f"size {height} {width}: {brief(error)}") from error
    with reserved(path), whole_file(path) as partial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporters' own internals
            example = list(checks.values())[-1]
            run = WRITERS[path.suffix](function, example, partial, note)
        with torch.inference_mode():
            differences = {k: _difference(run(x), wanted[k]) for k, x in checks.items()}
        worst = max(differences, key=lambda check: differences[check])
        if differences[worst] > TOLERANCE:
            raise UserError(
                f"{path} was not written: its numbers differ from torch's by up to "
                f"{differences[worst]:.1e} (batch of {worst}), more than {TOLERANCE:.0e}: report "
                "it with your versions of torch and the runtime"
            )
        size_bytes = sum(file.stat().st_size for file in partial.parent.iterdir())
    return ExportReport(str(path), note, size_bytes, differences)


def _check(model: ReidModel, path: Path, output: str, modality: str, options: Note) -> None:
    check_choice("output", output, OUTPUTS)
    check_choice("modality", modality, (*MODALITIES, "input"))
    check_choice("descriptor", options["descriptor"] or "official", model.descriptors)
    check_choice("ending", path.suffix, FORMATS)
    check_target(path)
    for module in FORMATS[path.suffix]:
        require(module, "openvino" if module == "openvino" else "export")
    if output == "logits" and not model.num_classes:
        raise UserError("this model has no classifier: export the embedding")
    given = [f"{name} {value}" for name, value in options.items() if value is not None]
    if output == "logits" and given:
        raise UserError(
            f"{', '.join(given)} with output 'logits': these options are of embeddings alone; "
            "leave them out, or export the embedding"
        )


def _checks(modality: str, shape: tuple[int, int, int]) -> dict[str, Inputs]:
    """Inputs by name of the check. Noise reaches every operation, as pictures do."""
    generator = torch.Generator().manual_seed(0)
    checks = {}
    for batch in BATCHES:
        x = {"images": torch.randn((batch, *shape), generator=generator)}
        if modality != "input":
            checks[f"{batch} {modality}"] = x
            continue
        mixed = torch.arange(batch) % 2 == 0
        checks[f"{batch} visible"] = {**x, "modality": torch.zeros_like(mixed)}
        checks[f"{batch} infrared"] = {**x, "modality": torch.ones_like(mixed)}
        if batch > 1:
            checks[f"{batch} mixed"] = {**x, "modality": mixed}
    return checks


def _difference(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return math.inf
    difference = float(((got - wanted).abs() / wanted.abs().clamp(min=1)).max())
    return math.inf if math.isnan(difference) else difference


def _shapes(example: Inputs) -> Any:
    """Batches of any size, the same for all inputs."""
    batch = torch.export.Dim("batch")
    return {name: {0: batch} for name in example}


def _write_program(function: nn.Module, example: Inputs, path: Path, note: Note) -> Run:
    program = torch.export.export(function, (), example, dynamic_shapes=_shapes(example))
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={"deen_zoo": json.dumps(note)})
    with open(path, "rb") as file:
        module = torch.export.load(file).module()
    return lambda inputs: module(**inputs)


def _write_torchscript(function: nn.Module, example: Inputs, path: Path, note: Note) -> Run:
    frozen = torch.jit.freeze(traced(function, tuple(example.values())))  # forward alone
    torch.jit.save(frozen, path, _extra_files={"deen_zoo": json.dumps(note)})
    module: Any = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return lambda inputs: module(*inputs.values())


def _write_openvino(function: nn.Module, example: Inputs, path: Path, note: Note) -> Run:
    import openvino

    inputs = tuple(example.values())
    model = openvino.convert_model(traced(function, inputs), example_input=inputs)
    for port, name in zip([*model.inputs, *model.outputs], [*example, note["output"]], strict=True):
        port.get_tensor().set_names({name})
    model.set_rt_info(json.dumps(note), ["deen_zoo"])
    openvino.save_model(model, path, compress_to_fp16=False)
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", hint)
    return lambda inputs: torch.from_numpy(
        compiled({name: x.numpy() for name, x in inputs.items()})[0]
    )


def _write_onnx(function: nn.Module, example: Inputs, path: Path, note: Note) -> Run:
    import onnxruntime

    try:
        program: Any = torch.onnx.export(
            function, (), kwargs=example, input_names=list(example), output_names=[note["output"]],
            dynamic_shapes=_shapes(example), dynamo=True, verbose=False,
        )  # fmt: skip
    except Exception as error:  # older torch lacks arguments, or fits no current onnxscript
        raise UserError(
            f"{path.stem}: the ONNX exporter of torch {torch.__version__} failed "
            f"({type(error).__name__}): upgrade torch and onnxscript, or write OUT.pt2"
        ) from error
    program.model.metadata_props["deen_zoo"] = json.dumps(note)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        rows = session.run(None, {name: x.numpy() for name, x in inputs.items()})[0]
        return torch.from_numpy(rows)

    return run


WRITERS = {
    ".onnx": _write_onnx,
    ".xml": _write_openvino,
    ".pt": _write_torchscript,
    ".pt2": _write_program,
}
