"""What a run leaves behind to read: ``results.json``, ``report.md`` and ``curves.png``."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.datasets import get_dataset
from ..errors import MissingExtraError, require
from ..evaluation import published_ablation, report
from ..io import write_atomically

__all__ = ["markdown", "plot", "write_results"]


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json`` (also into the checkpoint folders of the run), report and plots."""
    text = json.dumps(results, indent=2) + "\n"
    for model in results["models"]:
        for which in ("last", "best"):
            if which in model and not results["eval_only"]:
                write_atomically(folder / model[which]["checkpoint"] / "results.json", text)
        if model["history"]:
            _try_plot(folder / Path(model["last"]["checkpoint"]).parent, model["history"])
    write_atomically(folder / "results.json", text)
    drawn = (folder / _curves(results)).exists()  # not without matplotlib
    write_atomically(folder / "report.md", markdown(results, drawn))


def markdown(results: dict[str, Any], curves: bool = True) -> str:
    """The report: measured beside published, last beside best epoch, and how it came about."""
    recipe = results["recipe"]
    lines = [f"# {results['model']} on {results['dataset']}", ""]
    if results["eval_only"]:
        lines.append(f"Evaluated, not trained here: {results['eval_only']}.")
    else:
        lines.append(
            f"Recipe `{recipe['name']}`, {results['epochs']} epochs, seed {results['seed']}, on "
            f"{results['device']}. The numbers are those of the last epoch, in per cent."
        )
    if results["drawn"]:
        lines += ["", "Drawn people: these numbers say nothing about real cameras."]
    lines += ["", report(results["protocols"].values())]
    if all("best" in entry for entry in results["protocols"].values()):
        lines += [*_best_beside_last(results["protocols"]), ""]
    row = _ablation_row(results)
    if row:
        lines += [row, ""]
    if curves and any(model["history"] for model in results["models"]):
        lines += [f"![loss and rank-1]({_curves(results)})", ""]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    data = results["data"]
    lines += [f"Data: {data['images']} images, names' SHA-256 `{data['sha256']}`. {versions}."]
    for model in results["models"]:
        if model["last"]["sha256"]:
            lines.append(f"Weights, split {model['trial']}: SHA-256 `{model['last']['sha256']}`.")
    return "\n".join(lines) + "\n"


def _curves(results: dict[str, Any]) -> str:
    trial = results["models"][0]["trial"]
    several = len(get_dataset(results["dataset"]).splits) > 1
    return f"trial-{trial}/curves.png" if several else "curves.png"


def _best_beside_last(protocols: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "The reference keeps the epoch with the best rank-1 *on the test set*, which flatters:",
        "",
        "| protocol | last epoch R-1 | mAP | best epoch R-1 | mAP |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, entry in protocols.items():
        cells = [
            f"{100 * numbers[key]:.2f}"
            for numbers in (entry["mean"], entry["best"]["mean"])
            for key in ("r1", "mAP")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _ablation_row(results: dict[str, Any]) -> str:
    """The row of the poster's Table 4 that a run corresponds to, in words; "" if there is none."""
    loss, model = results["recipe"]["loss"], results["recipe"]["model"]
    if "cpm" not in loss:
        return ""
    dee = model["dee"] is not False
    for row in published_ablation():
        switches = {
            "dee": dee,
            "cpm": dee and bool(loss["cpm"]),
            "ort": dee and bool(loss["orthogonality"]),
            "mfa": model["mfa"] is not False,
        }
        if all(row[key] == on for key, on in switches.items()):
            numbers = ", ".join(
                f"{name} {100 * row[name]['r1']:.1f}/{100 * row[name]['mAP']:.1f}"
                for name in ("llcm-ir2vis", "sysu-all")
                if name in results["protocols"] and not results["drawn"]
            )
            on = " + ".join(key.upper() for key, value in switches.items() if value) or "baseline"
            return f"Row of the poster's Table 4: {on}{f', R-1/mAP {numbers}' if numbers else ''}."
    return ""


def _try_plot(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    try:
        plot(folder / "curves.png", history)
    except MissingExtraError as error:
        print(f"no plot of the losses: {error}", file=sys.stderr)


def plot(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Draw the parts of the loss and the rank-1 over epochs.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", extra="viz").Figure(figsize=(9, 3.5), layout="tight")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    columns = list(history[0])
    for name in columns[columns.index("loss") : columns.index("seconds")]:
        left.plot(epochs, [row[name] for row in history], label=name)
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    tested = [row for row in history if row["r1"] is not None]
    for name, label in (("r1", "rank-1"), ("mAP", "mAP")):
        values = [100 * row[name] for row in tested]
        right.plot([row["epoch"] for row in tested], values, marker=".", label=label)
    right.set(xlabel="epoch", ylabel="per cent", ylim=(0, 100))
    right.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())
