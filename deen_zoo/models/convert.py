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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from ..data.datasets import get_dataset, several_splits
from ..data.reader import ReidDataset
from ..errors import UserError, brief, check_choice, plural
from ..io import check_new_folder, whole_folder
from . import create_model, list_models, save_pretrained
from .catalog import weights_home
from .pretrained import in_words, misfits, read_config

__all__ = ["SOURCES", "ConversionReport", "Source", "convert", "read_checkpoint", "recognise"]

StateDict = dict[str, torch.Tensor]
Rules = dict[str, str]  # their name: ours, of which the first that fits counts

# What stands for the names in braces. The stages, branches and dilations of the files are counted
# from 1, ours from 0; "last" is our last stage, before which DEE sits.
_NUMBERS = ("stage", "branch", "dilation")
_PARTS = {
    **dict.fromkeys((*_NUMBERS, "index"), r"\d"),
    "stem": r"(?:conv1|bn1)\..+",
    "rest": ".+",
}

_STEMS_IN_RESNETS: Rules = {
    "visible_module.visible.{stem}": "visible_stem.{stem}",
    "thermal_module.thermal.{stem}": "infrared_stem.{stem}",
}
_BARE_STEMS: Rules = {
    "visible_module.{stem}": "visible_stem.{stem}",
    "thermal_module.{stem}": "infrared_stem.{stem}",
}
_DEEN: Rules = {
    "base_resnet.base.layer{stage}.{rest}": "stages.{stage}.blocks.{rest}",
    "DEE.FC{branch}{dilation}.{rest}": "stages.{last}.dee.reduce.{branch}.{dilation}.{rest}",
    "DEE.FC{branch}.{rest}": "stages.{last}.dee.expand.{branch}.{rest}",
    "MFA{stage}.CNL.W.0.{rest}": "stages.{stage}.cnl.proj.conv.{rest}",
    "MFA{stage}.CNL.W.1.{rest}": "stages.{stage}.cnl.proj.bn.{rest}",
    "MFA{stage}.CNL.{rest}": "stages.{stage}.cnl.{rest}",
    "MFA{stage}.PNL.W.0.{rest}": "stages.{stage}.pnl.proj.conv.{rest}",
    "MFA{stage}.PNL.W.1.{rest}": "stages.{stage}.pnl.proj.bn.{rest}",
    "MFA{stage}.PNL.{rest}": "stages.{stage}.pnl.{rest}",
}
_AGW: Rules = {
    **_STEMS_IN_RESNETS,
    "base_resnet.base.layer{stage}.{rest}": "stages.{stage}.blocks.{rest}",
    "NL_{stage}.{index}.W.0.{rest}": "stages.{stage}.non_local.{index}.proj.conv.{rest}",
    "NL_{stage}.{index}.W.1.{rest}": "stages.{stage}.non_local.{index}.proj.bn.{rest}",
    "NL_{stage}.{index}.g.0.{rest}": "stages.{stage}.non_local.{index}.g.{rest}",
    "NL_{stage}.{index}.{rest}": "stages.{stage}.non_local.{index}.{rest}",
}
_TVI: Rules = {
    "base_model.visual.rgb_model.resnet_conv.0.{rest}": "visible_stem.conv1.{rest}",
    "base_model.visual.rgb_model.resnet_conv.1.{rest}": "visible_stem.bn1.{rest}",
    "base_model.visual.ir_model.resnet_conv.0.{rest}": "infrared_stem.conv1.{rest}",
    "base_model.visual.ir_model.resnet_conv.1.{rest}": "infrared_stem.bn1.{rest}",
    "base_model.visual.shared_model.resnet_conv.{index}.{rest}": "stages.{index}.blocks.{rest}",
    "base_model.visual.GEM.p": "gem.p",
    "classifier.BN.{rest}": "bottleneck.{rest}",
    "classifier.classifier.weight": "classifier.weight",
}
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
        family: Models are ``<family>_resnet50_<dataset>``, of every dataset that has one.
        rules: Names of parts of the network; those without a rule stay as they are.
        unused: Pattern of names that the network never runs.
        args: Model arguments that differ from the defaults of the family.
        args_of: The same, for some of the models alone, by their names.
        file_name: Pattern that tells this source from others whose files have the same names.
    """

    tag: str
    title: str
    family: str
    rules: Rules
    unused: str = "(?!)"
    args: Mapping[str, Any] = field(default_factory=dict)
    args_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    file_name: str = "(?!)"

    @property
    def models(self) -> list[str]:
        """The models that its files can be of."""
        return list_models(f"{self.family}_resnet50_*")

    def arguments(self, model: str) -> dict[str, Any]:
        """Model arguments of one of its files."""
        return {**self.args, **self.args_of.get(model, {})}

    def names(self, theirs: Iterable[str]) -> dict[str, str]:
        """{theirs: ours} for all names of a file but those that its network never runs."""
        theirs = list(theirs)
        three_stages = "MFA2.CNL.g.weight" in theirs and "MFA3.CNL.g.weight" not in theirs
        # The reference's files of three stages keep the fourth, which they do without.
        unused = self.unused + (r"|base_resnet\.base\.layer4\..+" if three_stages else "")
        last = "2" if three_stages else "3"
        return {n: self._ours(n, last) for n in theirs if not re.fullmatch(unused, n)}

    def translate(self, state: Mapping[str, torch.Tensor]) -> StateDict:
        """The tensors of a file under our names; names without a rule stay as they are."""
        return {ours: state[theirs] for theirs, ours in self.names(state).items()}

    def _ours(self, name: str, last: str) -> str:
        for theirs, ours in self.rules.items():
            if match := re.fullmatch(_pattern(theirs), name):
                parts = match.groupdict()
                numbers = {key: int(parts[key]) - 1 for key in _NUMBERS if key in parts}
                return ours.format(**parts | numbers, last=last)
        return name


@functools.cache
def _pattern(name: str) -> str:
    """A name with braces as a regular expression."""
    parts = re.split(r"\{(\w+)\}", name)  # between, name in braces, between, ...
    return "".join(
        f"(?P<{part}>{_PARTS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts)
    )


SOURCES = {
    source.tag: source
    for source in (
        Source(
            "llcm-official", "DEEN of the reference (ZYK100/LLCM)", "deen",
            _STEMS_IN_RESNETS | _DEEN, _UNUSED_RESNETS,
        ),
        Source(
            "yyds", "DEEN baseline of YYDS (dyhBUPT/YYDS)", "deen", _BARE_STEMS | _DEEN,
            args_of={"deen_resnet50_regdb": {"flip": False}},  # its test there, unlike its others
        ),
        Source(
            "agw", "AGW (mangye16/Cross-Modal-Re-ID-baseline)", "agw", _AGW, _UNUSED_RESNETS,
            file_name="agw|awg",
        ),
        Source(
            "caj", "CAJ (mangye16/Cross-Modal-Re-ID-baseline, ICCV21_CAJ)", "agw", _AGW,
            _UNUSED_RESNETS, args={"flip": True}, file_name="adp|caj",
        ),
        Source(
            "agw-base", "AGW's --method base (mangye16/Cross-Modal-Re-ID-baseline)", "agw", _AGW,
            _UNUSED_RESNETS, args={"non_local": False, "pool": "avg"},
        ),
        Source(
            "tvilfm", "visible-infrared base model of TVI-LFM (WHU-HZY/TVI-LFM)", "tvilfm", _TVI,
            r"logit_scale|base_model\.(transformer\..+|token_embedding\.weight|"
            r"positional_embedding|text_projection|ln_final\..+)",  # CLIP's text encoder
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Recognised:
    """What a file turned out to be: its source, our model and the weights under our names."""

    source: Source
    model: str
    state: StateDict
    ambiguous: tuple[str, ...] = ()  # sources whose files have the same names and shapes


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did.

    ``same_names`` are other sources whose files have the same names and shapes; ``source_keys`` and
    ``keys`` count the tensors of the file and of ``model.safetensors``, whose digest is ``sha256``;
    ``half_precision`` counts those that were not float32. ``epoch``, ``rank1`` and ``mAP`` are what
    the file says of itself.
    """

    folder: str
    source: str
    same_names: tuple[str, ...]
    model: str
    dataset: str
    split: int | None
    identities: int
    source_keys: int
    keys: int
    half_precision: int
    sha256: str
    epoch: int | None
    rank1: float | None
    mAP: float | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kind = _dataset(self.model)
        unknown = len(kind.splits) > 1 and self.split is None
        split = f", split {self.split}" if self.split else ""
        mean = "" if self.mAP is None else f", mAP {self.mAP:.4f}"
        rows = {
            "recognised": SOURCES[self.source].title,
            "or": self.same_names
            and f"{', '.join(self.same_names)}, whose files have the same "
            "names and shapes: if it is one of those, give --source",
            "model": f"{self.model}: {self.dataset}{split}, {plural(self.identities, 'identity')}",
            "tensors": f"{self.source_keys} in the file, {self.keys} in model.safetensors, equal "
            "bit for bit after loading the folder with timm",
            "sha256": self.sha256,
            "written to": self.folder,
            "split": unknown
            and f"unknown, and a {kind.title} model must be tested on its own split: give --split "
            f"{kind.splits[0]} to {kind.splits[-1]}",
            "half precision": self.half_precision
            and f"{self.half_precision} tensors, stored as float32",
            "recorded in it": self.rank1 is not None
            and f"epoch {self.epoch}, rank-1 {self.rank1:.4f}{mean} (its source's own test, chosen "
            "as its best epoch; not measured here)",
        }
        return "\n".join(f"{name:<18}{text}" for name, text in rows.items() if text)


def _dataset(model: str) -> type[ReidDataset]:
    """The dataset that a model's name ends with."""
    return get_dataset(model.rpartition("_")[2])


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint: ``{net, cmc, mAP, mINP, epoch}``, or a bare state dict as ``{net}``.

    ``module.`` of DataParallel is taken off the names.

    Raises:
        UserError: No such file, not a checkpoint, cut off, or a pickle that wants to run code.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the checkpoint file in it, such as best.t")
    if not path.is_file():
        raise UserError(f"no such file: {path}; give a checkpoint file, such as best.t")
    if path.suffix == ".safetensors":
        raise UserError(
            f"{path} is no pickle: where a config.json is next to it, give create_model "
            f"'local-dir:{path.parent}'"
        )
    try:
        with _numpy_values_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = str(error).partition("GLOBAL ")[2].split(" ")[0]
        raise UserError(
            f"{path} is refused: "
            + (
                f"unpickling it would run {wanted}, which a checkpoint of tensors does not need; "
                f"get the file from a source that you trust"
                if wanted
                else "it is not a torch checkpoint of tensors and numbers alone, and opening it "
                "any other way could run code"
            )
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch raises what its readers raise: struct.error, EOFError, ...
        raise UserError(
            f"{path} is no torch checkpoint, or not all of one ({type(error).__name__}: "
            f"{brief(error)}): give the file as its repository has it, such as best.t"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    wrappers = ("net", "state_dict", "model", "model_state_dict")
    net = next((content[key] for key in wrappers if isinstance(content.get(key), dict)), content)
    odd = [name for name, value in net.items() if not isinstance(value, torch.Tensor)]
    if odd or not net:
        raise UserError(
            f"{path} holds no network: expected a state dict of tensors, "
            + (f"found {odd[0]!r} of type {type(net[odd[0]]).__name__}" if odd else "found none")
        )
    scores = {} if net is content else content
    return {**scores, "net": {str(n).removeprefix("module."): value for n, value in net.items()}}


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
    if source:
        check_choice("source", source, SOURCES)
    sources = [SOURCES[source]] if source else list(SOURCES.values())
    models = sorted({name for candidate in sources for name in candidate.models})
    if model:
        check_choice("model", model, models)
    fits: list[Recognised] = []
    others: list[tuple[int, str]] = []  # how many names or shapes differ, and what to say
    for candidate in sources:
        ours = candidate.translate(state)
        for known in _models(candidate, ours, model):
            expected = _expected(known, _identities(ours), candidate.tag)
            differing = _differing(ours, expected)
            if not any(differing.values()):
                fits.append(Recognised(candidate, known, ours))
            said = f"nearest is {candidate.title} as {known}, with {in_words(differing)}"
            if set(ours) & set(expected) - {"classifier.weight"}:
                others.append((sum(map(len, differing.values())), said))
    if not fits:
        alien = 0, "none of its names are those of a known network"
        nearest = min(others, key=lambda other: other[0], default=alien)[1]
        raise UserError(
            f"{name or 'the checkpoint'} is of no known source: {nearest}; 'deen-zoo weights' "
            "lists the known ones"
        )
    named = [fit for fit in fits if re.search(fit.source.file_name, name.lower())]
    best = (named or fits)[0]
    models = sorted({fit.model for fit in fits if fit.source == best.source})
    if len(models) > 1:
        raise UserError(
            f"{name or 'the checkpoint'} was trained on {_identities(best.state)} identities, "
            f"which is none of the datasets' counts: give --model, one of {', '.join(models)}"
        )
    others_too = tuple(fit.source.tag for fit in named or fits if fit.source != best.source)
    same = others_too if len(named) != 1 else ()
    return replace(best, ambiguous=same)


def _models(source: Source, state: StateDict, model: str) -> list[str]:
    """The models to compare with: the one asked for, or those with as many identities."""
    if model:
        return [name for name in source.models if name == model]
    configs = {name: timm.get_pretrained_cfg(name) for name in source.models}
    identities = _identities(state)
    same = [name for name, cfg in configs.items() if cfg and cfg.num_classes == identities]
    return same or source.models


def _identities(state: StateDict) -> int:
    weight = state.get("classifier.weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else 0


@functools.lru_cache(maxsize=32)
def _expected(model: str, identities: int, tag: str) -> dict[str, torch.Size]:
    """Names and shapes of one of our models, built without memory for its weights."""
    with torch.device("meta"):
        net = create_model(model, num_classes=identities, **SOURCES[tag].arguments(model))
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    return {"classifier.weight": torch.Size((0, 0))} | shapes


def _differing(state: StateDict, expected: dict[str, torch.Size]) -> dict[str, list[str]]:
    """:func:`misfits`, but for batch norms' counters, which are of no use and which some lack."""
    lacking = [n for n in expected if n not in state and n.endswith("num_batches_tracked")]
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return misfits(shapes, {n: s for n, s in expected.items() if n not in lacking})


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
        split: The split that it was trained on, where a dataset has several, as RegDB; read
            off the file's name if None.

    Raises:
        UserError: The file is refused; nothing has been written.
    """
    file = Path(file)
    content = read_checkpoint(file)
    found = recognise(content["net"], file.name, model, source)
    weights, half = _sound(found.state, file)
    kind = _dataset(found.model)
    splits = kind.splits if len(kind.splits) > 1 else ()
    if split is None and splits and (match := re.search(r"trial_(\d+)", file.name)):
        split = int(match[1])
    if split is not None and split not in splits:
        raise UserError(f"split {split} of {kind.title}: there are only {several_splits()}")
    tag = found.source.tag + (f"-split{split}" if split else "")
    target = weights_home() / f"{found.model}.{tag}" if folder is None else check_new_folder(folder)

    identities = _identities(found.state)
    with torch.device("meta"):
        net = create_model(
            found.model, num_classes=identities, **found.source.arguments(found.model)
        )
    counters = {
        name: torch.zeros_like(tensor, device="cpu")
        for name, tensor in net.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    weights = {**counters, **weights}
    net.load_state_dict(weights, assign=True)
    net.trained_on = {"source": found.source.tag, "dataset": kind.name}
    if split is not None:
        net.trained_on["split"] = split
    with whole_folder(target) as partial:
        save_pretrained(net, partial)
        digest = read_config(partial)["deen_zoo"]["weights_sha256"]  # loading compares it
        loaded = timm.create_model(f"local-dir:{partial}", pretrained=True).state_dict()
        differing = [n for n, tensor in loaded.items() if not torch.equal(tensor, weights[n])]
        if differing:
            raise RuntimeError(f"{target} differs from {file} in {', '.join(differing)}")
    epoch = _score(content, "epoch")
    return ConversionReport(
        folder=str(target),
        source=found.source.tag,
        same_names=found.ambiguous,
        model=found.model,
        dataset=kind.name,
        split=split,
        identities=identities,
        source_keys=len(content["net"]),
        keys=len(weights),
        half_precision=half,
        sha256=digest,
        epoch=None if epoch is None else int(epoch),
        rank1=_score(content, "cmc"),
        mAP=_score(content, "mAP"),
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


def _score(content: Mapping[str, Any], key: str) -> float | None:
    """A number that a checkpoint says of itself, the first of several; None if it says none."""
    try:
        number = float(np.asarray(content.get(key)).reshape(-1)[0])
    except (TypeError, ValueError, IndexError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
