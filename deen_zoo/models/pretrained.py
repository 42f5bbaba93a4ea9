"""Where pretrained weights come from, and what to say when they cannot be had.

In this order: what the caller names, weights installed on this machine (``deen-zoo convert FILE
--install``), a repository on the Hub. timm falls back on a pickle when there is no safetensors
file, trusts a download's length, and reports the Hub client's errors as they are. Here every source
ends in a local safetensors file whose digest has been compared with the one it was published with,
or in one line that says why not and what to do; nothing is ever unpickled.
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
from typing import Any

import timm
from huggingface_hub import constants, errors, hf_hub_download
from safetensors import SafetensorError, safe_open
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._hub import load_model_config_from_path
from timm.models._pretrained import PretrainedCfg

from ..errors import UserError
from ..io import sha256
from .base import NAMES, ReidModel
from .catalog import installed
from .catalog import where as public_weights

# The default organisation is asked only for what is pinned: model -> (ORG/NAME@COMMIT, SHA-256).
# Nobody who registers a name on the Hub can serve weights that way.
PINNED: dict[str, tuple[str, str]] = {}
HUB_ORGANISATION = os.environ.get("DEEN_ZOO_HUB_ORG")  # of one's own; read once, on import
TINY_WEIGHTS = str(Path(__file__).with_name("test_deen_resnet.safetensors"))
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1  # of config.json; a version that older ones must not read raises it

LOGIN = "log in with 'hf auth login', or set HF_TOKEN"
UPGRADE = "pip install -U deen-zoo"


def build_model(cls: type[ReidModel], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's ``build_model_with_cfg`` for a family's entrypoints.

    Args:
        cls: The family.
        variant: Name of the model, a key of its module's ``default_cfgs``.
        pretrained: Load its weights, from a verified safetensors file only.
        **kwargs: Arguments of ``cls`` and of timm.

    Raises:
        UserError: The weights cannot be had, or do not fit.
    """
    from .checkpoint import checkpoint_filter_fn

    place, origin, kwargs = _resolve(variant, pretrained, kwargs)
    try:
        out_indices = tuple(range(kwargs.get("num_stages", 4) + 1))
        model = build_model_with_cfg(
            cls,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
            **_without_form(kwargs),
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
    if isinstance(model, ReidModel):
        model.trained_on = origin.get("trained_on")
    return model


def _without_form(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments from a configuration of version 0.1.0 as they are called now."""
    kwargs = dict(kwargs)
    form = kwargs.pop("form", None)
    if form is not None:
        kwargs.update(dee_mean=form != "paper", mfa_softmax=form == "paper")
        if kwargs.get("modality") == "visible":  # which it wrote where none was given
            del kwargs["modality"]
    return kwargs


def _resolve(
    variant: str, pretrained: bool, kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Replace the source of ``build_model_with_cfg``'s arguments by a verified local file.

    A Hub id is pinned to the commit that was found, in ``pretrained_cfg["hf_hub_id"]``.

    Returns:
        Folder or repository of the configuration ("" for the package's own), what it says of the
        weights (its ``deen_zoo``), and the arguments.

    Raises:
        UserError: The weights cannot be had or must not be loaded; the message says what to do.
    """
    given, cache_dir = kwargs.get("pretrained_cfg"), kwargs.get("cache_dir")
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    tag, kwargs = "", dict(kwargs)
    if isinstance(given, str):  # as in deen_resnet50_sysu.yyds
        tag, given = given, None
        del kwargs["pretrained_cfg"]
    has_weights = timm.is_model_pretrained(variant)
    named = given or any(overlay.get(key) for key in ("file", "hf_hub_id", "url", "state_dict"))
    if pretrained and (tag or not (named or has_weights)):
        folder = _installed(variant, tag)
        if folder:
            given, _, args = load_model_config_from_path(folder)
            kwargs = {**args, **kwargs, "pretrained_cfg": given}
        elif tag or not hub_repository(variant):
            raise UserError(_no_weights(variant, tag))
    config: dict[str, Any] = {}
    place = digest = ""
    if isinstance(given, dict) and given.get("source") == "local-dir":
        place = str(given["file"])
        config = local_config(place, variant)
    elif isinstance(given, dict) and given.get("source") == "hf-hub":
        config, place = hub_config(given["hf_hub_id"], variant, cache_dir)
        overlay["hf_hub_id"] = place
    cfg = vars(resolve_pretrained_cfg(variant, given, overlay))
    if not pretrained:
        return place, {}, kwargs
    if cfg.get("source") == "local-dir":
        file = Path(cfg["file"]) / WEIGHTS
    elif cfg.get("state_dict") and cfg.get("source") != "hf-hub":
        return place, {}, kwargs
    elif cfg.get("file") and cfg.get("source") != "hf-hub":
        file = Path(cfg["file"])
    elif cfg.get("url") and not cfg.get("hf_hub_id"):
        raise UserError(
            f"{cfg['url']} is not loaded: give dict(file='FILE.safetensors') or "
            f"dict(hf_hub_id='ORG/NAME')"
        )
    else:
        if not config:
            repo, digest = cfg.get("hf_hub_id"), ""
            if not repo:
                repo, digest = hub_repository(variant) or ("", "")
            config, place = hub_config(repo, variant, cache_dir)
            overlay["hf_hub_id"] = place
        file = fetch(place, cfg.get("hf_hub_filename") or WEIGHTS, cache_dir)
    _check_file(file, config, digest)
    if config and "num_classes" not in kwargs and not _has_classifier(file):
        kwargs["num_classes"] = overlay["num_classes"] = 0
    kwargs["pretrained_cfg_overlay"] = {**overlay, "file": str(file), "source": ""}
    return place, config.get("deen_zoo") or {}, kwargs


def _installed(variant: str, tag: str) -> Path | None:
    """Folder of the installed weights of a model, or of one tag of it."""
    found = installed(variant)
    if tag and f"{variant}.{tag}" in found:
        found = {f"{variant}.{tag}": found[f"{variant}.{tag}"]}
    elif tag:  # one of RegDB's splits: yyds-split3
        found = {name: path for name, path in found.items() if name.startswith(f"{variant}.{tag}-")}
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


def hub_config(
    repo: str, variant: str = "", cache_dir: str | None = None
) -> tuple[dict[str, Any], str]:
    """A repository's checked ``config.json``, and ``ORG/NAME@COMMIT`` of the commit it is of.

    Args:
        repo: ``ORG/NAME`` or ``ORG/NAME@REVISION``: a branch, a tag or a commit.
        variant: The model that it must be of; any of this package if empty.
        cache_dir: In place of the Hub client's cache.

    Raises:
        UserError: It cannot be had, or is of another model or of a newer version.
    """
    path = fetch(repo, CONFIG, cache_dir)
    config = _read_config(path)
    _check_config(config, repo, variant)
    return config, f"{repo.partition('@')[0]}@{path.parent.name}"


def local_config(folder: str | os.PathLike[str], variant: str = "") -> dict[str, Any]:
    """The checked ``config.json`` of a folder; see :func:`hub_config`."""
    config = _read_config(Path(folder) / CONFIG)
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
        raise UserError(
            f"{repo}/{filename} is not loaded: only safetensors files are, since a pickle runs "
            f"code; 'deen-zoo convert' opens an official .t file that you trust"
        )
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
        _discard(path)
        raise UserError(
            f"{repo}/{filename} was cut or altered on its way: its digest is {found[:12]}..., the "
            f"Hub says {stated[:12]}...; it has been removed: try again, or look at your proxy"
        )
    return path


def _discard(path: Path) -> None:
    """Remove a cached file: its entry, the blob it points to, and the blob's shared store."""
    for entry in (path.resolve(), path.parent / os.readlink(path), path):
        entry.unlink(missing_ok=True)


def _check_file(path: Path, config: dict[str, Any], digest: str = "") -> None:
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not loaded: only safetensors files are; 'deen-zoo convert' turns another "
            f"repository's file into one"
        )
    if not path.is_file():
        raise UserError(f"{path}: there is no such file, and no pickle is loaded in its place")
    stated = (config.get("deen_zoo") or {}).get("weights_sha256")
    if "transformers_version" in config:  # it saves new weights and copies the old digest
        stated = None
    wanted = digest or stated
    if wanted and wanted != (found := sha256(path)):
        raise UserError(
            f"{path} is not the file that its {CONFIG} was written for: its SHA-256 is "
            f"{found[:12]}..., not {wanted[:12]}...: get both again"
        )
    try:
        with safe_open(str(path), framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from error


def _has_classifier(path: Path) -> bool:
    with safe_open(str(path), framework="pt") as file:
        return "classifier.weight" in file.keys()  # noqa: SIM118


def _read_config(path: Path) -> dict[str, Any]:
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


def _check_config(config: dict[str, Any], where: str, variant: str) -> None:
    """Refuse what this version cannot build, and what would load something else on the way."""
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
            f"load it with timm, or, if it is newer than this deen_zoo: {UPGRADE}"
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
            f"{where} has in its {CONFIG} what this deen_zoo does not take from one: "
            f"{', '.join(sorted(unknown))}; if it is newer: {UPGRADE}"
        )
    classes = config.get("num_classes", 0)
    wrong = [] if _count(classes) else [f"num_classes {classes!r}"]
    if args.get("num_classes", classes) != classes:
        wrong.append(f"model_args.num_classes {args['num_classes']!r} for num_classes {classes!r}")
    if not isinstance(own.get("weights_sha256", ""), str):
        wrong.append(f"deen_zoo.weights_sha256 {own['weights_sha256']!r}")
    if not isinstance(own.get("trained_on") or {}, dict):
        wrong.append(f"deen_zoo.trained_on {own['trained_on']!r}")
    wrong += [f"pretrained_cfg.{key} {v!r}" for key, v in cfg.items() if not _fits(key, v)]
    wrong += [f"model_args.{key} {v!r}" for key, v in args.items() if not _builds(key, v)]
    if wrong:
        raise UserError(f"{where} has values in its {CONFIG} that no model has: " + wrong[0][:200])


def _arguments(name: str) -> set[str]:
    """What a model's configuration may pass to its constructor: the arguments of the class that
    its entrypoint is annotated to return, or those of all families."""
    cls = typing.get_type_hints(timm.models.model_entrypoint(name)).get("return")
    families = [cls] if cls else ReidModel.__subclasses__()
    names = {"form"}.union(*(inspect.signature(family).parameters for family in families))
    return names - {"pretrained_backbone", "device", "dtype"}


def _number(value: Any, low: float, high: float) -> bool:
    """A finite number in [low, high]."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value) and low <= value <= high


def _count(value: Any, low: int = 0, high: int = 10**7) -> bool:
    return isinstance(value, int) and _number(value, low, high)


def _numbers(value: Any, low: float, high: float, lengths: tuple[int, ...], whole: bool) -> bool:
    fits: Callable[..., bool] = _count if whole else _number
    return (
        isinstance(value, list | tuple)
        and len(value) in lengths
        and all(fits(number, low, high) for number in value)
    )


def _fits(key: str, value: Any) -> bool:
    """Whether a value of ``pretrained_cfg`` can be a model's."""
    if key == "mean":
        return _numbers(value, 0, 1, (1, 3), False)
    if key == "std":
        return _numbers(value, 1e-3, 10, (1, 3), False)
    if key == "input_size":
        return _numbers(value, 1, 4096, (3,), True)
    if key == "crop_pct":
        return _number(value, 0.01, 1)
    if key == "crop_mode":
        return value in ("center", "squash", "border")
    if key == "interpolation":
        return value in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")
    if key == "num_classes":
        return _count(value)
    if key in ("custom_load", "label_offset"):  # timm would load by them, or cut the classifier
        return not value
    if key in ("first_conv", "classifier"):
        names = value if isinstance(value, list | tuple) else [value]
        return all(isinstance(name, str) for name in names)
    if key in ("test_input_size", "min_input_size", "pool_size", "test_pool_size"):
        return value is None or _numbers(value, 1, 4096, (2, 3), True)
    return True  # words


def _builds(key: str, value: Any) -> bool:
    """Whether a value of ``model_args`` is of a size that a model has; its constructor checks it
    for what it means."""
    if isinstance(value, dict):
        return all(_builds(name, inner) for name, inner in value.items())
    if isinstance(value, list):
        if key == "layers" and not _numbers(value, 1, 100, (4,), True):
            return False
        return len(value) <= 16 and all(_builds("", inner) for inner in value)
    if isinstance(value, bool) or value is None:
        return True
    return len(value) < 200 if isinstance(value, str) else _number(value, 0, 4096)


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
    at = f"{repo}@{revision}" if revision else repo
    hub = constants.ENDPOINT
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    cause = error.__cause__
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is no repository: give ORG/NAME or ORG/NAME@REVISION ({brief(error)})"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set: unset it to reach {hub}/{repo}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if cause is not None and getattr(cause, "response", None) is not None:
            return _explain(cause, repo, revision, filename)
        why = f"{hub} cannot be reached ({brief(cause)})" if cause else f"{hub} cannot be reached"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        return (
            f"{at}/{filename} is not in the cache {constants.HF_HUB_CACHE}, and {why}: load it "
            f"once with a connection, or from a folder: 'local-dir:FOLDER' with pretrained=True"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access on {hub}/{repo}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        variant = repo.rpartition("/")[2]
        ours = f". {_no_weights(variant, '')}" if hub_repository(variant) == (repo, "") else ""
        return (
            f"there is no {repo} on {hub}, or your login has no access to it{ours}; if it is "
            f"private, {LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repo} has no revision {revision!r}: choose a branch, tag or commit of "
            f"{hub}/{repo}/tree/main, or none for the newest"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return (
            f"{at} has no {filename}: it is no model that deen_zoo published, and nothing else is "
            f"loaded from it (a pickle never is)"
        )
    if status == 401:
        return f"{hub} wants a valid login for {repo}: {LOGIN}"
    if status == 403:
        return f"your login may not do this with {repo}: {LOGIN} of an account that may"
    if status is not None:
        return f"{hub} answered {status} for {at}: {brief(error)}; try again later"
    if not filename:
        return f"{hub} could not be reached for {repo} ({brief(error)}): try again"
    return f"{at}/{filename} could not be had whole and is not used ({brief(error)}): try again"


def brief(error: BaseException | None) -> str:
    """First line of an error, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
