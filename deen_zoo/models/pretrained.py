"""Where a model's weights come from, what they must be, and how they are saved.

In this order: what the caller names, weights installed on this machine (``deen-zoo convert FILE
--install``), a repository on the Hub. Every source ends in a local safetensors file, compared with
the digest that it was published with, or in one line that says why not and what to do. Nothing is
ever unpickled: timm would fall back on a pickle where there is no safetensors file.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from huggingface_hub import constants, errors, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._hub import load_model_config_from_path
from timm.models._pretrained import PretrainedCfg

from ..errors import UserError, brief, plural
from ..io import sha256, sha256_of, write_atomically
from .base import NAMES, ReidModel
from .catalog import installed, public_weights

# The default organisation is asked only for what is pinned: model -> (ORG/NAME@COMMIT, SHA-256).
# Nobody who registers a name on the Hub can serve weights that way.
PINNED: dict[str, tuple[str, str]] = {}
HUB_ORGANISATION = os.environ.get("DEEN_ZOO_HUB_ORG")  # of one's own; read once, on import
TINY_WEIGHTS = str(Path(__file__).with_name("test_deen_resnet.safetensors"))
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1  # of config.json; a version that older ones must not read raises it
UPGRADE = "pip install -U deen-zoo"
LOGIN = "log in with 'hf auth login', or set HF_TOKEN"
NO_PICKLE = "only safetensors files are; 'deen-zoo convert' turns another kind into one"

Model = TypeVar("Model", bound=ReidModel)
Config = dict[str, Any]


# building and loading


def build_model(cls: type[Model], variant: str, pretrained: bool, **kwargs: Any) -> Model:
    """timm's ``build_model_with_cfg`` for a family's entrypoints.

    ``variant`` is a key of the ``default_cfgs`` of the family's module, ``kwargs`` are arguments of
    ``cls`` and of timm. Weights are loaded from a verified safetensors file only.

    Raises:
        UserError: The weights cannot be had, or do not fit.
    """
    place, origin, kwargs = _load_plan(variant, pretrained, kwargs)
    form = kwargs.pop("form", None)
    if form is not None:  # a configuration of version 0.1.0
        kwargs.update(dee_mean=form != "paper", mfa_softmax=form == "paper")
        if kwargs.get("modality") == "visible":  # which it wrote where none was given
            del kwargs["modality"]
    maps: Config = dict(out_indices=None, feature_cls="getter")  # None: of all stages
    if "feature_cls" in kwargs:  # timm's others take numbers only
        maps["out_indices"] = tuple(range(kwargs.get("num_stages", 4) + 1))
    try:
        model: Model = build_model_with_cfg(
            cls,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=maps,
            **kwargs,
        )
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever timm and torch make of a stranger's numbers
        if not place:
            raise
        raise UserError(
            f"{place}: its {CONFIG} and the arguments given do not build a {variant}: "
            f"{brief(error)}"
        ) from error
    if isinstance(model, ReidModel):  # and not its features_only wrapper
        model.trained_on = origin.get("trained_on")
    return model


def _load_plan(variant: str, pretrained: bool, kwargs: Config) -> tuple[str, Config, Config]:
    """Replace the source of ``build_model_with_cfg``'s arguments by a verified local file.

    Returns:
        Folder or repository of the configuration ("" for the package's own), what it says of the
        weights (its ``deen_zoo``), and the arguments. A Hub id among them is pinned to the commit
        that was found.

    Raises:
        UserError: The weights cannot be had or must not be loaded; the message says what to do.
    """
    kwargs = dict(kwargs)
    overlay, cache_dir = dict(kwargs.get("pretrained_cfg_overlay") or {}), kwargs.get("cache_dir")
    given: Any = kwargs.get("pretrained_cfg")
    tag = ""
    if isinstance(given, str):  # as in deen_resnet50_sysu.yyds
        given, tag = None, kwargs.pop("pretrained_cfg")
    named = given or any(overlay.get(key) for key in ("file", "hf_hub_id", "url", "state_dict"))
    if pretrained and (tag or not (named or timm.is_model_pretrained(variant))):
        if folder := _installed(variant, tag):
            local_config(folder, variant)  # before timm's reader takes what is no configuration
            given, _, args = load_model_config_from_path(folder)
            kwargs = {**args, **kwargs, "pretrained_cfg": given}
        elif tag or not hub_repository(variant):
            raise UserError(_no_weights(variant, tag))
    kwargs = _with_tuples(kwargs)

    config: Config = {}
    place = digest = ""
    source = given.get("source") if isinstance(given, dict) else None
    if source == "local-dir":
        place = str(given["file"])
        config = local_config(place, variant)
    elif source == "hf-hub":
        config, place = hub_config(given["hf_hub_id"], variant, cache_dir)
        overlay["hf_hub_id"] = place
    if not pretrained:
        return place, {}, kwargs

    cfg = vars(resolve_pretrained_cfg(variant, given, overlay))
    from_hub = cfg.get("source") == "hf-hub"
    if cfg.get("source") == "local-dir":
        file = Path(cfg["file"]) / WEIGHTS
    elif cfg.get("state_dict") and not from_hub:
        return place, {}, kwargs
    elif cfg.get("file") and not from_hub:
        file = Path(cfg["file"])
    elif cfg.get("url") and not cfg.get("hf_hub_id"):
        raise UserError(
            f"{cfg['url']} is not loaded: give dict(file='FILE.safetensors') or "
            f"dict(hf_hub_id='ORG/NAME')"
        )
    else:
        if not config:
            repo = cfg.get("hf_hub_id")
            if not repo:
                repo, digest = hub_repository(variant) or ("", "")
            config, place = hub_config(repo, variant, cache_dir)
            overlay["hf_hub_id"] = place
        file = fetch(place, cfg.get("hf_hub_filename") or WEIGHTS, cache_dir)
    classes = _check_file(file, config, digest)
    if config and "num_classes" not in kwargs and not _classes(cfg["num_classes"], classes):
        kwargs["num_classes"] = overlay["num_classes"] = 0
    kwargs["pretrained_cfg_overlay"] = {**overlay, "file": str(file), "source": ""}
    return place, config.get("deen_zoo") or _shipped(file), kwargs


def _shipped(file: Path) -> Config:
    """What is known of the weights that come with the package."""
    if str(file) != TINY_WEIGHTS:
        return {}
    about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return {"trained_on": about["trained_on"]}


def _with_tuples(kwargs: Config) -> Config:
    """The arguments with tuples for the lists of a JSON file: timm's tools add tuples to them."""
    given = kwargs.get("pretrained_cfg")
    if not isinstance(given, dict):
        return kwargs
    cfg = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    return {**kwargs, "pretrained_cfg": cfg}


def _classes(stated: int, found: int) -> int:
    """Return ``found``; refuse a larger classifier than the file has before it is built."""
    if stated > found > 0:
        raise _other_classes(found, stated)
    return found


def _other_classes(found: int, stated: int) -> UserError:
    return UserError(
        f"the checkpoint was trained on {plural(found, 'identity')} and the model is for {stated}: "
        f"give num_classes={found} to load it whole, or num_classes=0 to leave the classifier out"
    )


def _installed(variant: str, tag: str) -> Path | None:
    """Folder of the installed weights of a model, or of one tag of it."""
    found = installed(variant)
    if tag:  # the tag alone finds one of RegDB's splits: yyds-split3
        whole = f"{variant}.{tag}"
        names = [whole] if whole in found else [n for n in found if n.startswith(f"{whole}-")]
        found = {name: found[name] for name in names}
    if len(found) > 1:
        raise UserError(
            f"several weights of {variant} are installed: create_model one of {', '.join(found)}"
        )
    for name, folder in found.items():
        _say_once(f"using the installed weights {name} ({folder})")
        return folder
    return None


@functools.cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)


def hub_repository(variant: str) -> tuple[str, str] | None:
    """The Hub repository of a model by name, and the SHA-256 pinned for its weights, if any."""
    if HUB_ORGANISATION:
        return f"{HUB_ORGANISATION}/{variant}", ""
    return PINNED.get(variant)


def _no_weights(variant: str, tag: str) -> str:
    name = f"{variant}.{tag}" if tag else variant
    have = ", ".join(installed(variant))
    public = public_weights(variant)
    return (
        f"{name} has no weights on this machine"
        + (f" (there are {have}). " if have else ". ")
        + (f"{public}, and create_model('{variant}', pretrained=True) loads it. Or t" if public
           else "No public weights of it are known: t")
        + "rain with 'deen-zoo reproduce', or name a repository: 'hf-hub:ORG/NAME', or "
        "DEEN_ZOO_HUB_ORG"
    )  # fmt: skip


def backbone_weights(name: str) -> str:
    """The ImageNet weights of a timm backbone as a verified local safetensors file.

    Raises:
        UserError: It has none on the Hub, or they cannot be had.
    """
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f"backbone {name} has no weights on the Hub: use e.g. 'resnet50.tv_in1k'")
    file = fetch(cfg.hf_hub_id, cfg.hf_hub_filename or WEIGHTS)
    _check_file(file, {})
    return str(file)


def checkpoint_filter_fn(state_dict: Config, model: Any) -> dict[str, torch.Tensor]:
    """timm's hook before loading: check the keys both ways.

    timm loads with ``strict=False`` when the class count differs, and a badly mapped checkpoint
    would pass with a warning; here a missing, surplus or misshapen key is an error that names it.

    Raises:
        UserError: The keys or shapes do not fit, or the checkpoint has another number of training
            identities than the model and nobody asked for a fresh classifier.
    """
    expected = model.state_dict()
    classifier = state_dict.get("classifier.weight")
    asked, configured = model.num_classes, model.pretrained_cfg["num_classes"]
    if classifier is not None:
        count = classifier.shape[0]
        if asked == configured and count != asked:
            raise _other_classes(count, asked)
        model.pretrained_cfg["num_classes"] = count  # what timm compares with
        if asked != count:
            expected["classifier.weight"] = classifier
    elif asked != configured:  # a fresh one was asked for
        expected.pop("classifier.weight", None)

    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    wanted = {name: tensor.shape for name, tensor in expected.items()}
    if model.in_chans != 3:  # timm adapts the first convolutions next
        for name in set(shapes) & set(wanted):
            if re.match(r"(visible|infrared)_stem\.conv1\.(0\.)?weight", name):
                wanted[name] = wanted[name][:1] + shapes[name][1:2] + wanted[name][2:]
    differing = misfits(shapes, wanted)
    if any(differing.values()):
        raise UserError(
            f"the checkpoint does not fit {model.pretrained_cfg.get('architecture', 'the model')}: "
            + in_words(differing)
        )
    return state_dict


def misfits(found: dict[str, torch.Size], wanted: dict[str, torch.Size]) -> dict[str, list[str]]:
    """How the shapes of a state dict differ from a network's: names that are missing, surplus or
    misshapen, in the network's order."""
    return {
        "missing": [n for n in wanted if n not in found],
        "surplus": [n for n in found if n not in wanted],
        "misshapen": [
            f"{n} {tuple(found[n])} for {tuple(wanted[n])}"
            for n in wanted
            if n in found and found[n] != wanted[n]
        ],
    }


def in_words(misfits: dict[str, list[str]]) -> str:
    """The first names of each kind of :func:`misfits`."""
    return "; ".join(
        f"{kind}: {', '.join(names[:4])}"
        + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for kind, names in misfits.items()
        if names
    )


# saving


def save_pretrained(model: Any, folder: str | os.PathLike[str]) -> Path:
    """Write ``config.json`` and ``model.safetensors``: a folder for timm and for transformers.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds the same model from it, in a
    process that has imported ``deen_zoo``. Each file is written whole and then renamed.

    Raises:
        OSError: One cannot be written; the message names it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights_bytes(model)
    config = model_config(model, sha256_of(weights))
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def weights_bytes(model: Any, classifier: bool = True) -> bytes:
    """The content of ``model.safetensors``, or that of its tensors without the classifier."""
    tensors = {
        name: t.detach().cpu().contiguous()
        for name, t in model.state_dict().items()
        if classifier or not name.startswith("classifier.")
    }
    return save(tensors, {"format": "pt"})


def model_config(model: Any, weights_sha256: str) -> Config:
    """``config.json`` of a model: what builds it again, and the digest of its weights' file."""
    from .. import __version__

    sources = ("architecture", "url", "file", "state_dict", "hf_hub_id", "source", "tag")
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in sources}
    cfg["num_classes"] = model.num_classes
    cfg["input_size"] = [model.in_chans, *cfg["input_size"][1:]]
    own = {"format": FORMAT, "version": __version__, "weights_sha256": weights_sha256}
    return {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": model.model_args,
        "pretrained_cfg": cfg,
        "deen_zoo": own | ({"trained_on": model.trained_on} if model.trained_on else {}),
    }


# files and configurations of others


def hub_config(repo: str, variant: str = "", cache_dir: str | None = None) -> tuple[Config, str]:
    """A repository's checked ``config.json``, and ``ORG/NAME@COMMIT`` of the commit it is of.

    ``repo`` is ``ORG/NAME`` or ``ORG/NAME@REVISION``: a branch, a tag or a commit. The model must
    be a ``variant``, or any of this package if that is empty.

    Raises:
        UserError: It cannot be had, or is of another model or of a newer version.
    """
    path = fetch(repo, CONFIG, cache_dir)
    config = read_config(path.parent)
    _check_config(config, repo, variant)
    return config, f"{repo.partition('@')[0]}@{path.parent.name}"


def local_config(folder: str | os.PathLike[str], variant: str = "") -> Config:
    """The checked ``config.json`` of a folder; see :func:`hub_config`."""
    config = read_config(folder)
    _check_config(config, str(folder), variant)
    return config


def fetch(repo: str, filename: str, cache_dir: str | None = None) -> Path:
    """A file of a Hub repository, from the cache or downloaded, whose digest has been checked.

    The cache names a large file by its SHA-256 and a small one by its git object id, as the Hub
    stated them; what differs is removed.

    Raises:
        UserError: It cannot be had, or has been altered on the way.
        OSError: It cannot be written.
    """
    if not filename.endswith((".safetensors", ".json")):
        raise UserError(f"{repo}/{filename} is not loaded, a pickle runs code: {NO_PICKLE}")
    name, _, revision = repo.partition("@")
    with hub_errors(name, revision, filename):
        path = Path(hf_hub_download(name, filename, revision=revision or None, cache_dir=cache_dir))
    stated = Path(os.readlink(path)).name if path.is_symlink() else ""
    found = stated
    if re.fullmatch("[0-9a-f]{64}", stated):
        found = sha256(path)
    elif re.fullmatch("[0-9a-f]{40}", stated):
        found = sha256(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size))
    if found != stated:
        # The entry in the cache, the blob it points to, and the blob's shared store.
        for entry in (path.resolve(), path.parent / os.readlink(path), path):
            entry.unlink(missing_ok=True)
        raise UserError(
            f"{repo}/{filename} was cut or altered on its way: its digest is {found[:12]}..., the "
            f"Hub says {stated[:12]}...; it has been removed: try again, or look at your proxy"
        )
    return path


def _check_file(path: Path, config: Config, digest: str = "") -> int:
    """How many identities its classifier has (0 without one), if it is the safetensors file that
    ``config`` was written for."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not loaded: {NO_PICKLE}")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file, and no pickle is loaded in its place")
    wanted = digest or (config.get("deen_zoo") or {}).get("weights_sha256")
    if "transformers_version" in config:  # it saves new weights and copies the old digest
        wanted = digest
    if wanted and wanted != (found := sha256(path)):
        raise UserError(
            f"{path} is not the file that its {CONFIG} was written for: its SHA-256 is "
            f"{found[:12]}..., not {wanted[:12]}...: get both again"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            if "classifier.weight" not in file.keys():  # noqa: SIM118, it is no dictionary
                return 0
            return int((file.get_slice("classifier.weight").get_shape() or [0])[0])
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from error


def load_weights(model: Any, folder: str | os.PathLike[str]) -> None:
    """Load the weights of a folder, checked against its ``config.json``, into a model.

    Raises:
        UserError: They are damaged, missing or of another network; the message names the file.
    """
    own, path = read_config(folder).get("deen_zoo"), Path(folder) / WEIGHTS
    _check_file(path, {"deen_zoo": own if isinstance(own, dict) else {}})
    state = load_file(path)
    differing = misfits(
        {name: tensor.shape for name, tensor in state.items()},
        {name: tensor.shape for name, tensor in model.state_dict().items()},
    )
    if any(differing.values()):
        raise UserError(f"{path} does not fit {type(model).__name__}: {in_words(differing)}")
    model.load_state_dict(state)


def read_config(folder: str | os.PathLike[str]) -> Config:
    """The ``config.json`` of a folder as it is, of one's own class of models too.

    Raises:
        UserError: There is none, or it is no JSON object.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} has no {CONFIG}: give a folder that deen_zoo.save_pretrained, "
            f"'deen-zoo reproduce' (its 'checkpoint') or 'deen-zoo convert' wrote"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): get it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model's configuration: it holds {type(config).__name__}")
    return config


def _check_config(config: Config, where: str, variant: str) -> None:
    """Refuse settings that this version cannot build, or that would load another file."""
    own, cfg = (config.get(key) or {} for key in ("deen_zoo", "pretrained_cfg"))
    args: Any = config.get("model_args", {})
    backbone_args: Any = args.get("backbone_args") or {} if isinstance(args, dict) else None
    if not all(isinstance(part, dict) for part in (own, args, cfg, backbone_args)):
        raise UserError(f"{where} has a {CONFIG} that is not a model's: get it again")
    if own.get("format", FORMAT) not in range(FORMAT + 1):
        raise UserError(
            f"{where} was written by a newer deen_zoo ({own.get('version')}), whose format "
            f"{own['format']} this one does not know: {UPGRADE}"
        )
    models, architecture = sorted(NAMES), config.get("architecture")
    if architecture not in models:
        raise UserError(
            f"{where} is of architecture {architecture!r}, which is none of {', '.join(models)}: "
            f"load it with timm; if it is a model of your own, name its module too, --model "
            f"MODULE:FOLDER, or import it; if it is newer than this deen_zoo: {UPGRADE}"
        )
    if not cfg:
        raise UserError(f"{where} has a {CONFIG} without a pretrained_cfg: get it again")
    if variant not in ("", architecture):
        raise UserError(
            f"{where} holds a {architecture}, not a {variant}: "
            f"create_model('{architecture}', ...) or create_model('hf-hub:...') builds it"
        )
    known = {
        "model_args": _arguments(str(architecture)),
        "backbone_args": set(inspect.signature(timm.models.ResNet).parameters),
        "pretrained_cfg": {field.name for field in fields(PretrainedCfg)} - {"file", "state_dict"},
    }
    found = {"model_args": args, "backbone_args": backbone_args, "pretrained_cfg": cfg}
    unknown = [f"{part}.{key}" for part in known for key in set(found[part]) - known[part]]
    if ":" in str(args.get("backbone", "")):
        unknown.append("model_args.backbone")
    if unknown:
        raise UserError(
            f"the {CONFIG} of {where} has settings that this deen_zoo does not accept: "
            f"{', '.join(sorted(unknown))}; if it is newer: {UPGRADE}"
        )
    classes = config.get("num_classes", 0)
    valid = {
        f"num_classes {classes!r}": _number(classes, 0, 10**7, whole=True),
        "model_args.num_classes, another one": args.get("num_classes", classes) == classes,
        "deen_zoo.weights_sha256": isinstance(own.get("weights_sha256", ""), str),
        "deen_zoo.trained_on": isinstance(own.get("trained_on") or {}, dict),
        **{f"pretrained_cfg.{k} {v!r}": k not in VALID or VALID[k](v) for k, v in cfg.items()},
        **{f"model_args.{k} {v!r}": _builds(k, v) for k, v in args.items()},
    }
    for value, fits in valid.items():
        if not fits:
            raise UserError(f"the {CONFIG} of {where} has an invalid value: {value[:200]}")


def _arguments(name: str) -> set[str]:
    """Arguments that a ``config.json`` may give: those of the class that the model's entrypoint
    returns by its annotation, or those of all families."""
    cls = typing.get_type_hints(timm.models.model_entrypoint(name)).get("return")
    families = [cls] if cls else ReidModel.__subclasses__()
    names = {"form"}.union(*(inspect.signature(family).parameters for family in families))
    return names - {"pretrained_backbone", "device", "dtype"}


def _number(value: Any, low: float, high: float, whole: bool = False) -> bool:
    """Whether it is a finite number in [low, high]."""
    plain = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value) and low <= value <= high


def _numbers(value: Any, low: float, high: float, *lengths: int, whole: bool = False) -> bool:
    fits = isinstance(value, list | tuple) and len(value) in lengths
    return fits and all(_number(number, low, high, whole) for number in value)


# What a value of ``pretrained_cfg`` must be, where a wrong one would change numbers in silence.
VALID: dict[str, Callable[[Any], bool]] = {
    "mean": lambda v: _numbers(v, 0, 1, 1, 3),
    "std": lambda v: _numbers(v, 1e-3, 10, 1, 3),
    "input_size": lambda v: _numbers(v, 1, 4096, 3, whole=True),
    "num_classes": lambda v: _number(v, 0, 10**7, whole=True),
    "custom_load": lambda v: not v,  # timm would load by it
    "label_offset": lambda v: not v,  # timm would cut the classifier
}


def _builds(key: str, value: Any) -> bool:
    """Whether a value of ``model_args`` is not absurdly large; the constructor does the rest."""
    if isinstance(value, dict):
        return all(_builds(name, inner) for name, inner in value.items())
    if isinstance(value, list):
        if key == "layers" and not _numbers(value, 1, 100, 4, whole=True):
            return False
        return len(value) <= 16 and all(_builds("", inner) for inner in value)
    if isinstance(value, bool) or value is None:
        return True
    return len(value) < 200 if isinstance(value, str) else _number(value, 0, 4096)


# the Hub's errors


@contextmanager
def hub_errors(repo: str, revision: str = "", filename: str = "") -> Iterator[None]:
    """Turn what the Hub client raises into a :class:`UserError` in the user's language.

    An ``OSError`` of the file system, such as a full disk, passes as it is.
    """
    transport: type[Exception] = getattr(errors, "HTTPError", OSError)  # of its HTTP library
    try:
        yield
    except (OSError, errors.HFValidationError, transport) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(_explain(error, repo, revision, filename)) from error


def _explain(error: BaseException, repo: str, revision: str, filename: str) -> str:
    at, hub = f"{repo}@{revision}" if revision else repo, constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__
        if cause is not None and getattr(cause, "response", None) is not None:
            return _explain(cause, repo, revision, filename)
        why = f"{hub} cannot be reached ({brief(cause or error)})"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        return (
            f"{at}/{filename} is not in the cache {constants.HF_HUB_CACHE}, and {why}: load it "
            f"once with a connection, or from a folder: 'local-dir:FOLDER' with pretrained=True"
        )
    variant = repo.rpartition("/")[2]
    ours = f". {_no_weights(variant, '')}" if hub_repository(variant) == (repo, "") else ""
    kinds = {
        errors.HFValidationError: f"{repo!r} is no repository: give ORG/NAME or ORG/NAME@REVISION "
        f"({brief(error)})",
        errors.OfflineModeIsEnabled: f"HF_HUB_OFFLINE is set: unset it to reach {hub}/{repo}",
        errors.GatedRepoError: f"{repo} is gated: ask for access on {hub}/{repo}, then {LOGIN}",
        errors.RepositoryNotFoundError: f"repository {repo} was not found on {hub}, or your login "
        f"has no access to it{ours}; if it is private, {LOGIN}",
        errors.RevisionNotFoundError: f"{repo} has no revision {revision!r}: choose a branch, tag "
        f"or commit of {hub}/{repo}/tree/main, or none for the newest",
        errors.EntryNotFoundError: f"{at} has no {filename}: it is no model that deen_zoo "
        f"published, and nothing else is loaded from it (a pickle never is)",
    }
    for kind, message in kinds.items():
        if isinstance(error, kind):
            return message
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{hub} wants a valid login for {repo}: {LOGIN}"
    if status == 403:
        return f"your login may not do this with {repo}: {LOGIN} of an account that may"
    if status is not None:
        return f"{hub} answered {status} for {at}: {brief(error)}; try again later"
    if not filename:
        return f"{hub} could not be reached for {repo} ({brief(error)}): try again"
    return f"{at}/{filename} could not be had whole and is not used ({brief(error)}): try again"
