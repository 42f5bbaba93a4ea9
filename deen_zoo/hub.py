"""From a checkpoint folder to a model repository on the Hub, with a card and measured results."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants

from .data.datasets import get_dataset
from .errors import UserError
from .evaluation.results import METRICS
from .io import check_new_folder, sha256, whole_folder
from .model_card import Measured, card
from .models import ReidModel, create_model, locate
from .models.pretrained import CONFIG, WEIGHTS, hub_errors, model_config

__all__ = ["Publication", "measured", "publish"]

RESULTS, CARD = "results.json", "README.md"


@dataclass(frozen=True)
class Publication:
    """What :func:`publish` did.

    Attributes:
        repo: ``ORG/NAME``.
        tag: Version tag; ``create_model("hf-hub:ORG/NAME@TAG")`` loads it.
        url: Page of the version; None after a dry run.
        folder: Folder that the dry run wrote; None otherwise.
        files: Name and size in bytes of each file.
        left_out: Names of the files in the checkpoint folder that were not published.
        weights_sha256: SHA-256 of ``model.safetensors``.
    """

    repo: str
    tag: str
    url: str | None
    folder: str | None
    files: dict[str, int]
    left_out: list[str]
    weights_sha256: str


def publish(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    results: str | os.PathLike[str] | None = None,
    tag: str | None = None,
    private: bool = False,
    dry_run: str | os.PathLike[str] | None = None,
) -> Publication:
    """Publish a checkpoint folder: its weights, its configuration, its results and a card.

    The card's numbers are those of ``results.json`` and of these very weights; nothing else in
    the folder is uploaded. Both are checked before anything is created on the Hub.

    Args:
        folder: Checkpoint folder of ``reproduce`` or ``convert``, with ``config.json`` and
            ``model.safetensors``.
        repo: ``ORG/NAME``; created if it does not exist.
        results: The ``results.json`` measured with these weights; by default the folder's.
        tag: Version tag; by default the next free one of ``v1``, ``v2``, ...
        private: Create the repository as a private one.
        dry_run: Write what would be uploaded into this folder, and use no network.

    Raises:
        UserError: The folder does not load, its weights are not those that were measured, or the
            Hub refuses; the message says what to do.
        OSError: Something cannot be written.
    """
    folder = Path(locate(folder))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo!r} is no repository to publish to: give ORG/NAME")
    if tag is not None and not re.fullmatch(r"[\w.-]+", tag):
        raise UserError(f"tag {tag!r}: give one such as v1, of letters, digits, '.', '-' and '_'")
    target = None if dry_run is None else check_new_folder(dry_run)
    model = _load(folder)
    digest = sha256(folder / WEIGHTS)
    file = Path(results) if results else folder / RESULTS
    content = _read_results(file, folder)
    try:  # the card, too, before anything is created
        content = _without_paths(content)
        found = measured(content, digest)
        draft: Any = card(model, content, found, repo, tag or "v1", digest)
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise UserError(  # keys are missing, or values of another type
            f"{file} is not as 'deen-zoo reproduce' wrote it ({type(error).__name__}: {error}): "
            "take the original, or evaluate again with --eval-only"
        ) from error
    architecture = model.pretrained_cfg["architecture"]
    if not content["eval_only"] and content["model"] != architecture:
        raise UserError(
            f"{folder} holds a {architecture}, and the results are of {content['model']}: give "
            f"the results.json of this model"
        )
    left_out = {path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, RESULTS, CARD}
    config = model_config(model, digest)
    config["pretrained_cfg"]["license"] = draft.data.license

    def texts(tag: str) -> dict[str, bytes]:
        written = {
            CONFIG: json.dumps(config, indent=2) + "\n",
            RESULTS: json.dumps(content, indent=2) + "\n",
            CARD: str(card(model, content, found, repo, tag, digest)),
        }
        return {name: text.encode() for name, text in written.items()}

    url = None
    if target is None:
        with hub_errors(repo):
            api = HfApi(library_name="deen_zoo")
            tag = _prepare(api, repo, tag, private)
            files = texts(tag)
            url = _upload(api, repo, tag, folder / WEIGHTS, digest, files)
    else:
        tag = tag or "v1"
        files = texts(tag)
        with whole_folder(target) as partial:
            shutil.copyfile(folder / WEIGHTS, partial / WEIGHTS)
            for name, data in files.items():
                (partial / name).write_bytes(data)
    sizes = {name: len(data) for name, data in files.items()}
    sizes[WEIGHTS] = (folder / WEIGHTS).stat().st_size
    written = None if target is None else str(target)
    return Publication(repo, tag, url, written, sizes, sorted(left_out), digest)


def _load(folder: Path) -> ReidModel:
    if not (folder / CONFIG).is_file() and (folder / "checkpoint" / CONFIG).is_file():
        raise UserError(f"{folder} is the folder of a run: give {folder / 'checkpoint'}")
    model = create_model(f"local-dir:{folder}", pretrained=True)
    broken = [k for k, t in model.state_dict().items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise UserError(f"{folder / WEIGHTS} holds numbers that are not finite, in {broken[0]}")
    return model


def _read_results(path: Path, folder: Path) -> dict[str, Any]:
    how = (
        f"measure with 'deen-zoo reproduce DATASET --data-root ROOT --eval-only {folder} "
        f"--output RUN', then give --results RUN/{RESULTS}"
    )
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file, and nothing unmeasured is published: {how}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {how}") from error
    needed = {"dataset", "model", "models", "protocols", "eval_only", "data", "versions", "recipe"}
    if not isinstance(content, dict) or needed - set(content):
        raise UserError(f"{path} is not the {RESULTS} of 'deen-zoo reproduce': {how}")
    return content


def measured(results: Mapping[str, Any], digest: str) -> Measured:
    """Find what ``results.json`` says about the weights with this SHA-256.

    Raises:
        UserError: It says nothing about them, or a metric is not a number between 0 and 1.
    """
    models = results["models"]
    found = [
        (which, model)
        for which in ("last", "best")
        for model in models
        if model.get(which, {}).get("sha256") == digest
    ]
    if not found:
        known = {m[which]["sha256"] for m in models for which in ("last", "best") if which in m}
        raise UserError(
            f"the weights (SHA-256 {digest[:12]}...) are not those that the results were measured "
            f"with ({', '.join(str(k)[:12] for k in known)}): evaluate them with --eval-only"
        )
    which, model = found[0]
    if which == "best" and len(models) > 1:
        raise UserError(
            "the results have the best epochs of several splits only as one mean, so these weights "
            "have no numbers of their own: publish the last epoch, or a run with --splits N"
        )
    entries = []
    for entry in results["protocols"].values():
        own = dict(entry)
        if which == "best":
            own |= {part: entry["best"][part] for part in ("mean", "std")}
        elif len(models) > 1:
            row = next(row for row in entry["trials"] if row["trial"] == model["split"])
            own |= {"mean": row, "std": dict.fromkeys(METRICS, 0.0), "trials": [row]}
        for part, key in itertools.product(("mean", "std"), METRICS):
            value = own[part].get(key)
            if not isinstance(value, float | int) or not 0 <= value <= 1:
                raise UserError(
                    f"the results' {part} {key} of {entry['name']} is {value}, no number between "
                    f"0 and 1: evaluate again"
                )
        entries.append(own)
    if not entries:
        raise UserError("the results are of no protocol: evaluate again")
    dataset = get_dataset(results["dataset"])
    split = model["split"] if len(dataset.splits) > 1 else None
    # A drawn world has no published counts, also where it stands in for a real dataset.
    counted = not dataset.expected or any(entry["expected_counts"] for entry in entries)
    drawn = dataset.synthetic or not counted
    return Measured(which, model[which]["epoch"], split, entries, drawn)


def _without_paths(results: Mapping[str, Any]) -> dict[str, Any]:
    """``results.json`` without the folders of the machine that it was written on."""
    content: dict[str, Any] = copy.deepcopy(dict(results))
    for model in content["models"]:
        for which in {"last", "best"} & set(model):
            model[which]["checkpoint"] = Path(model[which]["checkpoint"]).name
    if content["eval_only"]:
        content["eval_only"] = Path(content["eval_only"]).name
    words = shlex.split(content["command"])
    content["command"] = shlex.join(Path(w).name if os.path.isabs(w) else w for w in words)
    return content


def _prepare(api: HfApi, repo: str, tag: str | None, private: bool) -> str:
    """Create the repository if it does not exist, and return the tag to use."""
    api.create_repo(repo, private=private, exist_ok=True)
    taken = {ref.name for ref in api.list_repo_refs(repo).tags}
    if tag in taken:
        raise UserError(
            f"{repo} has a version {tag} already ({', '.join(sorted(taken))}): name "
            f"another with --tag, since a published version does not change"
        )
    return tag or next(f"v{n}" for n in range(1, len(taken) + 2) if f"v{n}" not in taken)


def _upload(
    api: HfApi, repo: str, tag: str, weights: Path, digest: str, files: Mapping[str, bytes]
) -> str:
    """One commit of exactly these files (the client has the Hub check the card), then the tag.

    The weights are read from where they are, so that a killed upload leaves no copy behind.
    """
    adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name]) for name in files]
    adds.append(CommitOperationAdd(path_in_repo=weights.name, path_or_fileobj=weights))
    if adds[-1].upload_info.sha256.hex() != digest:
        raise UserError(f"{weights} changed while it was being published: start again")
    commit = api.create_commit(repo, adds, commit_message=f"{tag}, by deen-zoo publish")
    api.create_tag(repo, tag=tag, revision=commit.oid)
    return f"{constants.ENDPOINT}/{repo}/tree/{tag}"
