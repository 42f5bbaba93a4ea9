"""A model as one file for other runtimes: ONNX, or a ``torch.export`` program.

Nothing is written unless the file, read back and run, gives the numbers that torch gives.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from .errors import UserError, require
from .features.extractor import data_config
from .models import DEEN
from .models.fuse import is_deployed

__all__ = ["FORMS", "MODALITIES", "OUTPUTS", "ExportReport", "export_model"]

FORMS = ("deploy", "plain")
OUTPUTS = ("embedding", "logits")
MODALITIES = ("input", "visible", "infrared")
BATCHES = (1, 7)

Run = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_model` wrote, and how it was found to agree.

    Attributes:
        path: The file.
        form: ``"deploy"`` or ``"plain"``.
        metadata: What stands in the file: model, output, modality, flip, preprocessing.
        size_bytes: Of the file.
        differences: Greatest difference from torch of each check, relative where outputs exceed 1.
    """

    path: str
    form: str
    metadata: dict[str, Any]
    size_bytes: int
    differences: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        channels, height, width = self.metadata["preprocessing"]["input_size"]
        modality = self.metadata["modality"]
        told = ", modality [batch]" if modality == "input" else f", {modality} alone"
        return (
            f"{self.path}: {self.form} form, {self.size_bytes / 1e6:.1f} MB, "
            f"images [batch, {channels}, {height}, {width}]{told} -> {self.metadata['output']}\n"
            f"differs from torch by at most {max(self.differences.values()):.1e} "
            f"(batches: {', '.join(self.differences)})"
        )


class _Function(nn.Module):
    """One of the model's calls as a function of tensors alone."""

    def __init__(self, model: DEEN, output: str, modality: str, flip: bool) -> None:
        super().__init__()
        self.model, self.output, self.modality, self.flip = model, output, modality, flip

    def forward(self, images: Tensor, modality: Tensor | None = None) -> Tensor:
        told = self.modality if modality is None else modality
        if self.output == "logits":
            logits: Tensor = self.model(images, told)
            return logits
        return self.model.forward_embedding(images, told, self.flip)


def export_model(
    model: DEEN,
    path: str | os.PathLike[str],
    *,
    output: str = "embedding",
    modality: str = "input",
    flip: bool = False,
    form: str = "deploy",
    size: tuple[int, int] | None = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write a model as ONNX (``.onnx``) or as a ``torch.export`` program (``.pt2``).

    The file takes ``images`` (N, 3, H, W) float32, normalised, of any N, and, unless one modality
    is baked in, ``modality`` (N,) bool, True for infrared. What the images need stands in its
    metadata, under ``deen_zoo``. It is run on batches of 1 and 7 of either modality, and of both at
    once, and its numbers compared with those of ``model`` before it gets its name.

    Args:
        model: It is left as it is; the file is in float32.
        path: Ends in ``.onnx`` or ``.pt2``.
        output: ``"embedding"``, the official descriptor of :meth:`DEEN.forward_embedding`, or
            ``"logits"``.
        modality: ``"input"``; or ``"visible"`` or ``"infrared"``, which leaves the other stem out.
        flip: Add the descriptor of the mirrored images, as the reference's test does.
        form: ``"deploy"``, the same numbers from fewer operations, or ``"plain"``.
        size: (H, W) of the images; the model's own when None.
        tolerance: Greatest difference from torch that passes, relative where outputs exceed 1.

    Raises:
        UserError: An argument is none of the above; or the file's numbers are not torch's.
        MissingExtraError: ONNX is asked for, and the ``export`` extra is not installed.
    """
    path = Path(path)
    _check(model, path, output, modality, flip, form)
    config = data_config(model)
    height, width = size or config["input_size"][1:]
    checks = _checks(modality, (int(model.in_chans), height, width))
    note = {
        "model": getattr(model, "pretrained_cfg", {}).get("architecture", "DEEN"),
        "output": output,
        "modality": modality,
        "flip": flip,
        "preprocessing": {**config, "input_size": (model.in_chans, height, width)},
    }
    plain = copy.deepcopy(model).cpu().float().eval()
    exported: Any = plain if form == "plain" else reparameterize_model(plain)
    function = _Function(exported, output, modality, flip).eval()
    reference = _Function(plain, output, modality, flip).eval()
    try:
        with torch.inference_mode():
            wanted = {name: reference(**inputs) for name, inputs in checks.items()}
    except ValueError as error:  # MFA does not take every size
        raise UserError(f"size {height} {width}: {error}") from error
    partial = path.with_name(f"{path.name}.partial")
    write = _write_onnx if path.suffix == ".onnx" else _write_program
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporters' own internals
            run = write(function, list(checks.values())[-1], partial, output, json.dumps(note))
        with torch.inference_mode():
            differences = {k: _difference(run(x), wanted[k]) for k, x in checks.items()}
        _judge(path, differences, tolerance)
        size_bytes = partial.stat().st_size
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return ExportReport(str(path), form, note, size_bytes, differences)


def _check(model: DEEN, path: Path, output: str, modality: str, flip: bool, form: str) -> None:
    for name, value, valid in (
        ("output", output, OUTPUTS),
        ("modality", modality, MODALITIES),
        ("form", form, FORMS),
        ("ending", path.suffix, (".onnx", ".pt2")),
    ):
        if value not in valid:
            raise UserError(f"{name} {value!r}: choose from {', '.join(valid)}")
    if path.suffix == ".onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, "export")
    if output == "logits" and (flip or not model.num_classes):
        what = "flip adds descriptors, not logits" if flip else "this model has no classifier"
        raise UserError(f"logits cannot be exported: {what}; export the embedding")
    if form == "plain" and is_deployed(model):
        raise UserError("this model is in the deploy form already: give the one it was made from")


def _checks(modality: str, shape: tuple[int, int, int]) -> dict[str, dict[str, Tensor]]:
    """Inputs by name of check. Noise is as good as pictures: it reaches every operation."""
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


def _judge(path: Path, differences: dict[str, float], tolerance: float) -> None:
    worst = max(differences, key=lambda check: differences[check])
    if not all(difference <= tolerance for difference in differences.values()):  # NaN fails
        raise UserError(
            f"{path} was not written: its numbers differ from torch's by up to "
            f"{differences[worst]:.1e} (batch of {worst}), more than {tolerance:.0e}: try "
            f"form='plain', or report it with your versions of torch and onnxruntime"
        )


def _difference(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    return float(((got - wanted).abs() / wanted.abs().clamp(min=1)).max())


def _write_program(
    function: _Function, example: dict[str, Tensor], path: Path, output: str, note: str
) -> Run:
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        function, (), example, dynamic_shapes={name: {0: batch} for name in example}
    )
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={"deen_zoo": note})
    with open(path, "rb") as file:
        module = torch.export.load(file).module()
    return lambda inputs: module(**inputs)


def _write_onnx(
    function: _Function, example: dict[str, Tensor], path: Path, output: str, note: str
) -> Run:
    import onnxruntime

    batch = torch.export.Dim("batch")
    try:
        program: Any = torch.onnx.export(
            function, (), kwargs=example, input_names=list(example), output_names=[output],
            dynamic_shapes={name: {0: batch} for name in example}, dynamo=True, verbose=False,
        )  # fmt: skip
    except Exception as error:  # older torch lacks arguments, or fits no current onnxscript
        raise UserError(
            f"{path.stem}: the ONNX exporter of torch {torch.__version__} failed "
            f"({type(error).__name__}): upgrade torch and onnxscript, or write OUT.pt2"
        ) from error
    program.model.metadata_props["deen_zoo"] = note
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        rows = session.run([output], {name: x.numpy() for name, x in inputs.items()})[0]
        return torch.from_numpy(rows)

    return run
