"""Other people's checkpoints, recognised by names and shapes, to folders that timm loads.

The key maps of every known source are here and nowhere else. This is also the only place that
opens a pickle, and it opens it with ``weights_only``: tensors, numbers and NumPy values are read,
anything that would run code is refused.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import math
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from ..errors import UserError
from ..io import sha256, whole_folder
from . import create_model, save_pretrained
from .catalog import weights_home
from .pretrained import WEIGHTS

__all__ = ["SOURCES", "ConversionReport", "Source", "convert", "read_checkpoint", "recognise"]

StateDict = dict[str, torch.Tensor]
Rules = tuple[tuple[str, str], ...]

# Their name -> ours. Stage and branch numbers start at 1 there, at 0 here: "{0-1}" is group 0 less
# one. "{last}" is the number of the last stage, before which DEE sits.
_STEMS_IN_RESNETS: Rules = (
    (r"thermal_module\.thermal\.((?:conv1|bn1)\..+)", "infrared_stem.{0}"),
    (r"visible_module\.visible\.((?:conv1|bn1)\..+)", "visible_stem.{0}"),
)
_BARE_STEMS: Rules = (
    (r"thermal_module\.((?:conv1|bn1)\..+)", "infrared_stem.{0}"),
    (r"visible_module\.((?:conv1|bn1)\..+)", "visible_stem.{0}"),
)
_TRUNK: Rules = ((r"base_resnet\.base\.layer(\d)\.(.+)", "stages.{0-1}.blocks.{1}"),)
_DEEN: Rules = (
    *_TRUNK,
    (r"DEE\.FC(\d)(\d)\.(.+)", "stages.{last}.dee.reduce.{0-1}.{1-1}.{2}"),
    (r"DEE\.FC(\d)\.(.+)", "stages.{last}.dee.expand.{0-1}.{1}"),
    (r"MFA(\d)\.CNL\.W\.0\.(.+)", "stages.{0-1}.cnl.proj.conv.{1}"),
    (r"MFA(\d)\.CNL\.W\.1\.(.+)", "stages.{0-1}.cnl.proj.bn.{1}"),
    (r"MFA(\d)\.CNL\.(.+)", "stages.{0-1}.cnl.{1}"),
    (r"MFA(\d)\.PNL\.W\.0\.(.+)", "stages.{0-1}.pnl.proj.conv.{1}"),
    (r"MFA(\d)\.PNL\.W\.1\.(.+)", "stages.{0-1}.pnl.proj.bn.{1}"),
    (r"MFA(\d)\.PNL\.(.+)", "stages.{0-1}.pnl.{1}"),
)
_AGW: Rules = (
    *_STEMS_IN_RESNETS,
    *_TRUNK,
    (r"NL_(\d)\.(\d)\.g\.0\.(.+)", "stages.{0-1}.non_local.{1}.g.{2}"),
    (r"NL_(\d)\.(\d)\.W\.0\.(.+)", "stages.{0-1}.non_local.{1}.proj.conv.{2}"),
    (r"NL_(\d)\.(\d)\.W\.1\.(.+)", "stages.{0-1}.non_local.{1}.proj.bn.{2}"),
    (r"NL_(\d)\.(\d)\.(.+)", "stages.{0-1}.non_local.{1}.{2}"),
)
_TVI_STEM = r"base_model\.visual\.{}_model\.resnet_conv\.{}\.(.+)"
_TVI: Rules = (
    (_TVI_STEM.format("rgb", 0), "visible_stem.conv1.{0}"),
    (_TVI_STEM.format("rgb", 1), "visible_stem.bn1.{0}"),
    (_TVI_STEM.format("ir", 0), "infrared_stem.conv1.{0}"),
    (_TVI_STEM.format("ir", 1), "infrared_stem.bn1.{0}"),
    (r"base_model\.visual\.shared_model\.resnet_conv\.(\d)\.(.+)", "stages.{0}.blocks.{1}"),
    (r"base_model\.visual\.GEM\.p", "gem.p"),
    (r"classifier\.BN\.(.+)", "bottleneck.{0}"),
    (r"classifier\.classifier\.weight", "classifier.weight"),
)
# Three whole ResNets are saved; two serve as stems and one as the stages.
_UNUSED_RESNETS = (
    r"(thermal_module\.thermal|visible_module\.visible)\.layer\d\..+|"
    r"base_resnet\.base\.(conv1|bn1)\..+"
)


@dataclass(frozen=True)
class Source:
    """Files of one origin: how their names map to ours, and which of our models they are.

    Attributes:
        tag: Short name, the tag of installed weights, as in ``deen_resnet50_sysu.yyds``.
        title: In words.
        family: Models are ``<family>_resnet50_<dataset>``.
        rules: (pattern, our name), tried in order; names without a rule stay as they are.
        unused: Pattern of names that the network never runs.
        args: Model arguments that differ from the defaults of the family.
        regdb_args: The same, for RegDB alone.
        file_name: Pattern that tells this source from others whose files have the same names.
    """

    tag: str
    title: str
    family: str
    rules: Rules
    unused: str = "(?!)"
    args: Mapping[str, Any] = field(default_factory=dict)
    regdb_args: Mapping[str, Any] = field(default_factory=dict)
    file_name: str = "(?!)"

    def models(self) -> list[str]:
        """The models that its files can be of."""
        return [f"{self.family}_resnet50_{dataset}" for dataset in ("sysu", "llcm", "regdb")]

    def arguments(self, model: str) -> dict[str, Any]:
        """Model arguments of one of its files."""
        return {**self.args, **(self.regdb_args if model.endswith("regdb") else {})}

    def names(self, theirs: Iterable[str]) -> dict[str, str]:
        """Of all names of a file, {theirs: ours}, without those that its network never runs."""
        theirs = list(theirs)
        three_stages = "MFA2.CNL.g.weight" in theirs and "MFA3.CNL.g.weight" not in theirs
        # The reference's RegDB files keep the stage that RegDB does without.
        unused = self.unused + (r"|base_resnet\.base\.layer4\..+" if three_stages else "")
        last = "2" if three_stages else "3"
        return {n: self._ours(n, last) for n in theirs if not re.fullmatch(unused, n)}

    def translate(self, state: Mapping[str, torch.Tensor]) -> StateDict:
        """The tensors of a file under our names; names without a rule stay as they are."""
        return {ours: state[theirs] for theirs, ours in self.names(state).items()}

    def _ours(self, name: str, last: str) -> str:
        for pattern, ours in self.rules:
            if match := re.fullmatch(pattern, name):
                for i, part in enumerate(match.groups()):
                    ours = ours.replace(f"{{{i}}}", part)
                    if part.isdigit():
                        ours = ours.replace(f"{{{i}-1}}", str(int(part) - 1))
                return ours.replace("{last}", last)
        return name


SOURCES = {
    source.tag: source
    for source in (
        Source(
            "llcm-official",
            "DEEN of the reference (ZYK100/LLCM)",
            "deen",
            (*_STEMS_IN_RESNETS, *_DEEN),
            _UNUSED_RESNETS,
        ),
        Source(
            "yyds",
            "DEEN baseline of YYDS (dyhBUPT/YYDS)",
            "deen",
            (*_BARE_STEMS, *_DEEN),
            regdb_args={"flip": False},  # its test of RegDB, unlike its others
        ),
        Source(
            "agw",
            "AGW (mangye16/Cross-Modal-Re-ID-baseline)",
            "agw",
            _AGW,
            _UNUSED_RESNETS,
            file_name="agw|awg",
        ),
        Source(
            "caj",
            "CAJ (mangye16/Cross-Modal-Re-ID-baseline, ICCV21_CAJ)",
            "agw",
            _AGW,
            _UNUSED_RESNETS,
            args={"flip": True},
            file_name="adp|caj",
        ),
        Source(
            "agw-base",
            "AGW's --method base (mangye16/Cross-Modal-Re-ID-baseline)",
            "agw",
            _AGW,
            _UNUSED_RESNETS,
            args={"non_local": False, "pool": "avg"},
        ),
        Source(
            "tvilfm",
            "visible-infrared base model of TVI-LFM (WHU-HZY/TVI-LFM)",
            "tvilfm",
            _TVI,
            r"logit_scale|base_model\.(transformer\..+|token_embedding\.weight|"
            r"positional_embedding|text_projection|ln_final\..+)",  # CLIP's text encoder
        ),
    )
}


@dataclass(frozen=True)
class Recognised:
    """What a file turned out to be: its source, our model and the weights under our names."""

    source: Source
    model: str
    state: StateDict
    ambiguous: tuple[str, ...] = ()  # sources whose files have the same names and shapes


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did and verified.

    ``sha256`` is the digest of ``model.safetensors``; ``epoch``, ``rank1`` and ``mAP`` are what the
    file says of itself.
    """

    folder: str
    source: str
    title: str
    same_names: tuple[str, ...]
    model: str
    dataset: str
    split: int | None
    identities: int
    source_keys: int
    source_megabytes: float
    keys: int
    megabytes: float
    parameters: int
    tensors_equal: int
    half_precision: int
    sha256: str
    epoch: int | None
    rank1: float | None
    mAP: float | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        split = "" if self.split is None else f", split {self.split}"
        lines = [
            f"recognised        {self.title}",
            f"model             {self.model}: {self.dataset}{split}, {self.identities} identities",
            f"file              {self.source_keys} tensors, {self.source_megabytes:.1f} MB",
            f"model.safetensors {self.keys} tensors, {self.megabytes:.1f} MB, "
            f"{self.parameters / 1e6:.1f} M parameters",
            f"verified          {self.tensors_equal} of {self.keys} tensors equal bit for bit "
            f"after loading the folder with timm",
            f"sha256            {self.sha256}",
            f"written to        {self.folder}",
        ]
        if self.same_names:
            lines.insert(
                1,
                f"                  files of {', '.join(self.same_names)} have the same names "
                f"and shapes: if it is one of those, give --source",
            )
        if self.dataset == "regdb" and self.split is None:
            lines.append(
                "split             unknown, and a RegDB model must be tested on its own split: "
                "give --split 1 to 10"
            )
        if self.half_precision:
            lines.append(f"half precision    {self.half_precision} tensors, stored as float32")
        if self.rank1 is not None:
            mean = "" if self.mAP is None else f", mAP {self.mAP:.4f}"
            lines.append(
                f"recorded in it    epoch {self.epoch}, rank-1 {self.rank1:.4f}{mean} "
                f"(its source's own test, chosen as its best epoch; not measured here)"
            )
        return "\n".join(lines)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint: ``{net, cmc, mAP, mINP, epoch}``, or a bare state dict as ``{net}``.

    ``module.`` of DataParallel is taken off the names.

    Raises:
        UserError: No such file, not a checkpoint, cut off, or a pickle that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}; give a checkpoint file, such as best.t")
    try:
        with _numpy_values_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = str(error).partition("GLOBAL ")[2].split(" ")[0]
        if wanted:
            raise UserError(
                f"{path} is refused: unpickling it would run {wanted}, which a checkpoint of "
                f"tensors does not need; get the file from a source that you trust"
            ) from error
        raise UserError(
            f"{path} is refused: it is not a torch checkpoint of tensors and numbers alone, and "
            f"opening it any other way could run code"
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch raises what its readers raise: struct.error, EOFError, ...
        raise UserError(f"{path} is not a whole torch checkpoint: {_brief(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    content = dict(content)
    for key in ("net", "state_dict", "model", "model_state_dict"):
        if isinstance(content.get(key), dict):
            content["net"] = content[key]
            break
    else:
        content = {"net": content}
    net = content["net"]
    odd = [name for name, value in net.items() if not isinstance(value, torch.Tensor)]
    if odd or not net:
        raise UserError(
            f"{path} holds no network: expected a state dict of tensors, "
            + (f"found {odd[0]!r} of type {type(net[odd[0]]).__name__}" if odd else "found none")
        )
    content["net"] = {str(name).removeprefix("module."): value for name, value in net.items()}
    return content


@contextlib.contextmanager
def _numpy_values_allowed() -> Iterator[None]:
    """The official file stores its scores as NumPy values, by old and new module names."""
    core = "numpy._core" if hasattr(np, "_core") else "numpy.core"
    multiarray = importlib.import_module(f"{core}.multiarray")
    scalar, reconstruct = multiarray.scalar, multiarray._reconstruct
    allowed: list[Any] = [np.ndarray, np.dtype, codecs.encode]  # torch 2.4 lacks the last
    allowed += [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")]
    for name, function in (("scalar", scalar), ("_reconstruct", reconstruct)):
        for home in ("numpy.core", "numpy._core"):
            named: Any = functools.partial(function)  # torch before 2.6 takes no (function, name)
            named.__module__, named.__name__ = f"{home}.multiarray", name
            named.__qualname__ = name
            allowed.append(named)
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(allowed)  # torch 2.4 has no ``safe_globals`` context yet
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def recognise(
    state: Mapping[str, torch.Tensor], name: str = "", model: str = "", source: str = ""
) -> Recognised:
    """Find the source and the model whose names and shapes a state dict has, all of them.

    Args:
        state: Names without ``module.``.
        name: File name, which tells sources with equal networks apart.
        model: Only this model; any if empty.
        source: Only this source; any if empty.

    Raises:
        UserError: There is none; the message names the nearest source and what differs first. Or
            it could be of several models.
    """
    if source not in ("", *SOURCES):
        raise UserError(f"source {source!r}: choose from {', '.join(SOURCES)}")
    nearest: tuple[int, str] | None = None
    fits: list[Recognised] = []
    for candidate in [SOURCES[source]] if source else list(SOURCES.values()):
        ours = candidate.translate(state)
        for known in _models(candidate, ours, model):
            faults = _faults(ours, _expected(known, _identities(ours), candidate.tag))
            if not any(faults.values()):
                fits.append(Recognised(candidate, known, ours))
                continue
            misfits = sum(map(len, faults.values()))
            if nearest is None or misfits < nearest[0]:
                named = "; ".join(f"{kind}: {_some(n)}" for kind, n in faults.items() if n)
                nearest = misfits, f"nearest is {candidate.title} as {known}, with {named}"
    if not fits:
        if nearest is None:
            models = sorted({m for known in SOURCES.values() for m in known.models()})
            raise UserError(f"model {model!r}: files are converted to {', '.join(models)}")
        raise UserError(f"{name or 'the checkpoint'} is of no known source: {nearest[1]}")
    best = next((f for f in fits if re.search(f.source.file_name, name.lower())), fits[0])
    models = sorted({fit.model for fit in fits if fit.source == best.source})
    if len(models) > 1:
        raise UserError(
            f"{name or 'the checkpoint'} was trained on {_identities(best.state)} identities, "
            f"which is none of the datasets' counts: give --model, one of {', '.join(models)}"
        )
    told = source or re.search(best.source.file_name, name.lower())
    others = () if told else tuple(f.source.tag for f in fits if f.source != best.source)
    return Recognised(best.source, best.model, best.state, others)


def _models(source: Source, state: StateDict, model: str) -> list[str]:
    """The models to compare with: the one asked for, or those with as many identities."""
    models = source.models()
    if model:
        return [name for name in models if name == model]
    configs = {name: timm.get_pretrained_cfg(name) for name in models}
    identities = _identities(state)
    same = [name for name, cfg in configs.items() if cfg and cfg.num_classes == identities]
    return same or models


def _identities(state: StateDict) -> int:
    weight = state.get("classifier.weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else 0


@functools.lru_cache(maxsize=32)
def _expected(model: str, identities: int, tag: str) -> dict[str, torch.Size]:
    """Names and shapes of one of our models, without its memory."""
    with torch.device("meta"):
        net = create_model(model, num_classes=identities, **SOURCES[tag].arguments(model))
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    return {"classifier.weight": torch.Size((0, 0))} | shapes


def _faults(state: StateDict, expected: dict[str, torch.Size]) -> dict[str, list[str]]:
    counters = "num_batches_tracked"  # of no use to any network here; some files lack them
    return {
        "missing": [n for n in expected if n not in state and not n.endswith(counters)],
        "surplus": [n for n in state if n not in expected],
        "misshapen": [
            f"{name} {tuple(state[name].shape)} for {tuple(shape)}"
            for name, shape in expected.items()
            if name in state and state[name].shape != shape
        ],
    }


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def convert(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    model: str = "",
    source: str = "",
    split: int | None = None,
) -> ConversionReport:
    """Write ``config.json`` and ``model.safetensors`` for a known file, and verify them.

    Args:
        file: The checkpoint.
        folder: Where to write, absent or empty; None installs it, so that
            ``create_model(model, pretrained=True)`` finds it from then on.
        model: Which model it is; found out if empty.
        source: Which source it is of, a key of :data:`SOURCES`; found out if empty.
        split: Of RegDB's ten, the one it was trained on; read off the file's name if None.

    Raises:
        UserError: The file is refused; nothing has been written.
    """
    file = Path(file)
    content = read_checkpoint(file)
    found = recognise(content["net"], file.name, model, source)
    weights, half = _sound(found.state, file)
    scores = _scores(content, file)
    dataset = found.model.rpartition("_")[2]
    if split is None and dataset == "regdb" and (match := re.search(r"trial_(\d+)", file.name)):
        split = int(match[1])
    if split is not None and (dataset != "regdb" or not 1 <= split <= 10):
        raise UserError(f"split {split} of {dataset}: only RegDB has splits, 1 to 10")
    tag = found.source.tag + (f"-split{split}" if split else "")
    target = Path(folder) if folder is not None else weights_home() / f"{found.model}.{tag}"
    if folder is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already: choose another folder, or remove it")

    identities = _identities(found.state)
    net = create_model(found.model, num_classes=identities, **found.source.arguments(found.model))
    counters = {n: t for n, t in net.state_dict().items() if n.endswith("num_batches_tracked")}
    weights = {**counters, **weights}
    net.load_state_dict(weights)
    net.trained_on = {"source": found.source.tag, "dataset": dataset}
    if split is not None:
        net.trained_on["split"] = split
    with whole_folder(target) as partial:
        save_pretrained(net, partial)
        loaded = timm.create_model(f"local-dir:{partial}", pretrained=True).state_dict()
        equal = sum(torch.equal(loaded[name], weights[name]) for name in loaded)
        if equal != len(loaded) or len(loaded) != len(weights):
            raise RuntimeError(f"{len(loaded) - equal} tensors of {target} differ from {file}")
    return ConversionReport(
        folder=str(target),
        source=found.source.tag,
        title=found.source.title,
        same_names=found.ambiguous,
        model=found.model,
        dataset=dataset,
        split=split,
        identities=identities,
        source_keys=len(content["net"]),
        source_megabytes=file.stat().st_size / 1e6,
        keys=len(loaded),
        megabytes=(target / WEIGHTS).stat().st_size / 1e6,
        parameters=sum(p.numel() for p in net.parameters()),
        tensors_equal=equal,
        half_precision=half,
        sha256=sha256(target / WEIGHTS),
        **scores,
    )


def _sound(state: StateDict, file: Path) -> tuple[StateDict, int]:
    """The weights in float32, and how many were not.

    Raises:
        UserError: A weight is not finite.
    """
    out, converted = {}, 0
    for name, tensor in state.items():
        if tensor.is_floating_point():
            converted += tensor.dtype != torch.float32
            tensor = tensor.float()
            if not tensor.isfinite().all():
                raise UserError(
                    f"{file} is of a run that diverged: {name} holds values that are not finite; "
                    f"choose an earlier checkpoint"
                )
        out[name] = tensor.contiguous()
    return out, converted


def _scores(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Epoch, rank-1 and mAP that a checkpoint says of itself, None where it says nothing.

    Raises:
        UserError: One of them is not a number.
    """
    cmc = content.get("cmc")
    said = {"epoch": content.get("epoch"), "rank1": cmc, "mAP": content.get("mAP")}
    out: dict[str, Any] = {}
    for key, value in said.items():
        try:
            number = None if value is None else float(np.asarray(value).reshape(-1)[0])
        except (TypeError, ValueError, IndexError, RuntimeError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise UserError(
                f"{file} gives {key} as {str(value)[:40]!r}, not as a number: it is not what the "
                f"training scripts save; to convert its weights alone, save the state dict"
            )
        out[key] = int(number) if key == "epoch" and number is not None else number
    return out
