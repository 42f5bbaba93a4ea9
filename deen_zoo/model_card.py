"""The model card of published weights: what they are, what was measured, and on what terms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants

from .data.datasets import get_dataset
from .errors import plural
from .evaluation import report
from .evaluation.results import METRICS
from .models import ReidModel
from .models.catalog import entries

__all__ = ["Measured", "card"]

TITLES = {"r1": "rank-1", "r5": "rank-5", "r10": "rank-10", "r20": "rank-20"}


@dataclass(frozen=True)
class Measured:
    """The part of ``results.json`` that was measured with one file of weights.

    Attributes:
        which: ``"last"`` or ``"best"`` epoch; the latter was chosen on the test set.
        epoch: Counted from 1; None when the weights were evaluated only.
        split: RegDB's split; None elsewhere.
        protocols: Entries as ``results.json`` has them, with this file's mean, std and trials.
        drawn: The data is a synthetic world.
    """

    which: str
    epoch: int | None
    split: int | None
    protocols: Sequence[Mapping[str, Any]]
    drawn: bool


def card(
    model: ReidModel,
    results: Mapping[str, Any],
    found: Measured,
    repo: str,
    tag: str,
    digest: str,
) -> ModelCard:
    """The model card: metadata that the Hub reads, then ``card.md`` filled in."""
    dataset = results["dataset"]
    cfg: Any = model.pretrained_cfg
    title = "a synthetic world" if found.drawn else get_dataset(dataset).title
    named = (model.trained_on or {}).get("source")
    source = next((entry for entry in entries() if entry["source"] == named), None)
    licence, name, link, in_words = _licence(results, found, repo, source)
    family = str(cfg["architecture"]).removeprefix("test_").partition("_")[0]  # "agw"
    data = ModelCardData(
        license=licence,
        license_name=name,
        license_link=link,
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["person-re-identification", "visible-infrared", "deen_zoo", "timm", family],
        model_name=repo.partition("/")[2],
        eval_results=[
            EvalResult(
                task_type="image-feature-extraction",
                task_name="Visible-infrared person re-identification",
                dataset_type="synthetic" if found.drawn else dataset,
                dataset_name=title,
                dataset_config=entry["name"],
                dataset_split="test" if found.split is None else f"test, split {found.split}",
                metric_type=TITLES.get(key, key),
                metric_name=f"{TITLES.get(key, key)}, a fraction",
                metric_value=float(entry["mean"][key]),
            )
            for entry in found.protocols
            for key in METRICS
        ],
    )
    template = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    body = template.substitute(
        title=repo.partition("/")[2],
        repo=repo,
        tag=tag,
        architecture=cfg["architecture"],
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        height=cfg["input_size"][1],
        width=cfg["input_size"][2],
        descriptor=f"{model.embed_dim:,}",
        network=cfg.get("paper_name") or "a network",
        flip=model.flip,
        identities=model.num_classes,
        results_note=_results_note(found, title),
        results=report(found.protocols),
        training=_training(results, found, source),
        citation=_citation(cfg),
        data=_data(results, found, title),
        bias="It has seen no real person"
        if found.drawn
        else "Its data are of few cameras and of the people who passed them",
        licence=in_words,
        sha256=digest,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _citation(cfg: Mapping[str, Any]) -> str:
    """The network's paper and its authors' code, as far as the model's configuration knows them."""
    papers = cfg.get("paper_ids") or ()
    papers = [papers] if isinstance(papers, str) else list(papers)
    links = [f"https://arxiv.org/abs/{p.partition(':')[2]}" for p in papers if ":" in p]
    links += [cfg["origin_url"]] if cfg.get("origin_url") else []
    name = cfg.get("paper_name") or cfg["architecture"]
    return f"Cite the authors of the network: {', '.join([name, *links])}."


def _results_note(found: Measured, title: str) -> str:
    notes = [f"Re-identification across modalities on {title}; per cent, with the counts found."]
    if found.drawn:
        notes.append("The people are drawn: these numbers say nothing about real cameras.")
    chances = [entry["chance"] for entry in found.protocols if "chance" in entry]
    if chances:
        notes.append(f"A random ranking has a rank-1 of about {100 * max(chances):.1f} %.")
    if found.split is not None:
        notes.append(
            f"This model is that of split {found.split} and was tested on it; published numbers "
            f"are means over ten splits, each with a model of its own."
        )
    if found.which == "best":
        notes.append(
            "The epoch was chosen by its rank-1 on the test set, as the reference does: this is "
            "optimistic."
        )
    return " ".join(notes)


def _training(results: Mapping[str, Any], found: Measured, source: dict[str, str] | None) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    if results["eval_only"]:
        origin = source["repository"] if source else "elsewhere"
        return (
            f"The weights come from {origin} and were evaluated, not trained, with deen_zoo "
            f"({versions}). Their authors say how they were trained."
        )
    recipe = dict(results["recipe"])
    name = recipe.pop("name")
    epoch = "" if found.epoch is None else f"; these are the weights after epoch {found.epoch}"
    epochs, processes = plural(results["epochs"], "epoch"), plural(results["processes"], "process")
    sections = [{key: v} if not isinstance(v, dict) else v for key, v in recipe.items()]
    settings = [pair for part in sections for pair in part.items() if pair[1] is not None]
    values = ", ".join(f"{key} {json.dumps(value)}" for key, value in settings)
    return (
        f"Trained with `{results['command']}`, seed {results['seed']}, stopped after "
        f"{epochs}{epoch}.\n\nThe recipe, {name}: {values}.\n\n"
        f"On {results['device']}, {processes}, precision "
        f"{results['precision']}; {versions}."
    )


def _data(results: Mapping[str, Any], found: Measured, title: str) -> str:
    facts = results["data"]
    names = f"{facts['images']:,} images; SHA-256 of their names `{facts['sha256']}`."
    if found.drawn:
        return f"Pictures drawn by `deen-zoo synthesize`, which show no real person: {names}"
    home = get_dataset(results["dataset"]).home
    if not home:
        return f"The publisher's own images: {names} They are not redistributed here."
    return (
        f"{title}: {names} It is given out on a signed request only ({home}), "
        f"for research, and is not redistributed here. It shows real people: keep to the terms "
        f"that you, too, would have to sign."
    )


def _licence(
    results: Mapping[str, Any], found: Measured, repo: str, source: dict[str, str] | None
) -> tuple[str, str | None, str | None, str]:
    """The terms of the weights: the Hub's name for them, their name, a link, and words."""
    code = "The code, deen_zoo, is under Apache-2.0."
    home = get_dataset(results["dataset"]).home
    see_card = "other", "see-card", f"{constants.ENDPOINT}/{repo}#licence"
    if results["eval_only"]:
        words = "That does not extend to the weights, whose authors set their terms."
        if source:
            words += f" The repository that they come from says: {source['licence']}."
        return *see_card, f"{code} {words}"
    if found.drawn:
        words = "So are these weights, which come from drawn pictures alone."
        return "apache-2.0", None, None, f"{code} {words}"
    if not home:
        words = "That does not extend to the weights, whose publisher sets their terms."
        return *see_card, f"{code} {words}"
    words = (
        f"That does not extend to the weights: they are for research only, within the terms of "
        f"the dataset that they were trained on ({home})."
    )
    return "other", "research-only", home, f"{code} {words}"
