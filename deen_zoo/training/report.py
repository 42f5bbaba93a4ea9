"""What a run leaves to read: ``results.json``, ``report.md`` and its pictures."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..data.datasets import get_dataset
from ..errors import UserError, plural
from ..evaluation import report
from ..evaluation.report import markdown_table
from ..features.files import FeatureTable
from ..io import write_atomically
from ..models.base import NAMES
from .recipes import RECIPES, flat, shown
from .sections import flatten
from .settings import Settings

__all__ = ["command", "markdown", "summary", "write_results"]

PICTURES = {
    "curves.png": "Loss on the training set and scores on the test set, over the epochs",
    "ranking.png": "Five random infrared queries and the most similar of all visible test images",
    "similarities.png": "Similarity of all infrared to all visible test images, of one person and "
    "of two people",
    "tsne.png": "Descriptors of twenty random people in two dimensions",
}


def write_results(folder: Path, results: dict[str, Any], table: FeatureTable | None = None) -> None:
    """Write ``results.json`` (also into the run's checkpoint folders), pictures and ``report.md``.

    ``table`` holds descriptors of the first protocol's images, for the pictures.
    """
    _draw(folder, results, table)
    text = json.dumps(results, indent=2) + "\n"
    for model in results["models"]:
        for which in ("last", "best"):
            if which in model and not results["eval_only"]:
                write_atomically(folder / model[which]["checkpoint"] / "results.json", text)
    write_atomically(folder / "report.md", markdown(folder, results))
    write_atomically(folder / "results.json", text)


def _draw(folder: Path, results: dict[str, Any], table: FeatureTable | None) -> None:
    from ..visualize import curves, sample_ranking, similarities, tsne

    for model in results["models"]:
        if model["history"]:
            curves(model["history"], folder / model["last"]["checkpoint"] / ".." / "curves.png")
    if table is None:
        return
    for draw, name in ((sample_ranking, "ranking.png"), (similarities, "similarities.png"),
                       (tsne, "tsne.png")):  # fmt: skip
        try:
            draw(table, folder / name)
        except UserError as error:  # too few people or pairs for this picture
            print(f"no {name}: {error}", file=sys.stderr)


def markdown(folder: Path, results: dict[str, Any]) -> str:
    """The report: what was run, measured next to published, pictures, and how to run it again."""
    title = get_dataset(results["dataset"]).title
    lines = [f"# {results['model']} on {title}", ""]
    if results["eval_only"]:
        lines.append(f"The weights `{results['eval_only']}` were evaluated, not trained here.")
    else:
        lines.append(
            f"Trained{_start(results)} with the recipe `{results['recipe']['name']}`"
            f"{_changes(results['recipe'])} for {plural(results['epochs'], 'epoch')}, seed "
            f"{results['seed']}, on {results['device']} ({results['precision']}). The numbers are "
            "those of the last epoch, in per cent."
        )
    if results["drawn"]:
        lines += ["", "The people are drawn: these numbers say nothing about real cameras."]
    lines += ["", "## Results", "", report(results["protocols"].values())]
    lines += _differences(results)
    chances = [f"{100 * e['chance']:.1f} % on {n}" for n, e in results["protocols"].items()]
    lines += [f"A random ranking has a rank-1 of about {', '.join(chances)}.", ""]
    if all("best" in entry for entry in results["protocols"].values()):
        lines += _best_next_to_last(results["protocols"])
    pictures = []
    for name, about in PICTURES.items():
        split = Path(results["models"][0]["last"]["checkpoint"]).parent / name
        place = split if name == "curves.png" and not results["eval_only"] else Path(name)
        if (folder / place).is_file():
            pictures += [f"![{about}]({place.as_posix()})", "", f"{about}.", ""]
    if pictures:
        lines += ["## Pictures", "", *pictures]
    about = "In another folder, with `--output`:"
    if results["device"] == "cpu":  # another number of threads rounds differently
        about = f"In another folder, with `--output`, and `OMP_NUM_THREADS={results['threads']}`:"
    lines += ["## Run it again", "", about, "", "```", results["command"], "```", ""]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    data = results["data"]
    lines.append(
        f"{plural(results['processes'], 'process')} with {plural(results['threads'], 'thread')} "
        f"each; {versions}. Data: {plural(data['images'], 'image')}, SHA-256 of their names "
        f"`{data['sha256']}`."
    )
    for model in results["models"]:
        if model["last"]["sha256"]:
            lines.append(f"Weights, split {model['split']}: SHA-256 `{model['last']['sha256']}`.")
    return "\n".join(lines) + "\n"


def _start(results: dict[str, Any]) -> str:
    """What the weights started from, where the model's name tells it."""
    name = results["model"].rpartition(":")[2]
    imagenet = NAMES.get(name, False) and not results["scratch"]
    if name not in NAMES:
        return ""
    return " from ImageNet's weights" if imagenet else " from random weights"


def _changes(recipe: dict[str, Any]) -> str:
    """How the settings differ from those of the recipe of that name."""
    if recipe["name"] not in RECIPES:
        return ""
    usual = flatten(json.loads(json.dumps(asdict(RECIPES[recipe["name"]]))), 2)
    differ = [f"{key} {shown(v)}" for key, v in flatten(recipe, 2).items() if usual.get(key) != v]
    return f" (changed: {', '.join(differ)})" if differ else ""


def summary(folder: Path, results: dict[str, Any]) -> str:
    """The last lines of the command: what the numbers mean, where the report is, what is next."""
    name, entry = next(iter(results["protocols"].items()))
    how = plural(len(entry["trials"]), "draw" if entry["draw"] else "split")
    lines = [
        f"On {name}, rank-1 is {100 * entry['mean']['r1']:.1f} % (mean of {how}); a random ranking "
        f"has about {100 * entry['chance']:.1f} %."
    ]
    history = results["models"][0]["history"]
    tested = [row for row in history if row["r1"] is not None]
    if len(tested) > 1:
        first, last = tested[0], tested[-1]
        lines.append(
            f"On one gallery it was {100 * first['r1']:.1f} % after epoch {first['epoch']} and "
            f"{100 * last['r1']:.1f} % after epoch {last['epoch']}."
        )
    if results["drawn"]:
        learnt = not results["eval_only"] and entry["mean"]["r1"] > 1.5 * entry["chance"]
        shown = "shows that training works, and " if learnt else ""
        lines.append(f"The people are drawn: this {shown}says nothing about real cameras.")
    lines += [*_differences(results), f"Report with pictures: {folder / 'report.md'}"]
    module, own, model = results["model"].rpartition(":")
    if not results["eval_only"] and (not own or model in NAMES):
        checkpoint = f"{module}{own}{folder / results['models'][0]['last']['checkpoint']}"
        lines.append(f"Try next: deen-zoo extract IMAGES -o rows.safetensors --model {checkpoint}")
    return "\n".join(line for line in lines if line)


def command(settings: Settings) -> str:
    """The command that makes these results again, in another folder."""
    kind, recipe = settings.kind, settings.recipe
    name = recipe.name if recipe.name in RECIPES else "official"
    base, usual = flat(RECIPES[name]), Settings.create(
        settings.dataset, settings.output, recipe=replace(recipe, task=None),
        data_root=None if kind.synthetic else settings.output / "no such root",
    )  # fmt: skip
    words = ["deen-zoo", "reproduce", settings.dataset]
    words += [] if name == kind.default_recipe else ["--recipe", name]
    for key, value in flat(recipe).items():
        if key == "model.args":
            changed = {f"{key}.{arg}": json.dumps(one) for arg, one in value.items()
                       if base[key].get(arg) != one}  # fmt: skip
        else:
            changed = {} if base.get(key) == value else {key: shown(value)}
        words += [word for change in changed.items() for word in ("--set", "=".join(change))]
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name in ("resume", "recipe") or value == getattr(usual, item.name):
            continue
        words.append(f"--{item.name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else (value,))
    return shlex.join(words)


def _differences(results: dict[str, Any]) -> list[str]:
    """One line for each protocol and published number: measured less published, in points."""
    lines = []
    for name, entry in results["protocols"].items():
        for other in entry["published"]:
            if "weights" in other:  # its difference stands in the table
                continue
            found = [
                f"{word} {100 * (entry['mean'][key] - other[key]):+.1f}"
                for key, word in (("r1", "rank-1"), ("mAP", "mAP"))
                if key in other
            ]
            lines.append(f"{name}, measured less {other['source']}: {', '.join(found)} points.")
    return [*lines, ""] if lines else []


def _best_next_to_last(protocols: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        (name, *(f"{100 * numbers[key]:.2f}" for numbers in (entry["mean"], entry["best"]["mean"])
                 for key in ("r1", "mAP")))
        for name, entry in protocols.items()
    ]  # fmt: skip
    head = ("protocol", "last epoch R-1", "mAP", "best epoch R-1", "mAP")
    about = "The reference keeps the epoch that is best *on the test set*, which is optimistic:"
    return [about, "", markdown_table(head, rows), ""]
