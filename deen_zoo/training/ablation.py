"""The ablation of the poster's Table 4: which component brings what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..device import choose_device
from ..distributed import join
from ..evaluation import published_ablation
from ..io import write_atomically
from .reproduce import reproduce
from .settings import Settings

__all__ = ["ablate", "table"]

SWITCHES = ("dee", "cpm", "ort", "mfa")
TITLES = ("DEE", "L_cpm", "L_ort", "MFA")


def ablate(settings: Settings, seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """Train and evaluate the seven rows, each with every seed.

    Each run is in a folder of its own below ``OUTPUT/ablation``; with ``resume`` finished ones are
    read back and the others gone on with. Writes ``ablation.json`` and ``ablation.md``.

    Returns:
        ``dataset``, ``seeds``, and ``rows``: the switches of each row and, for each protocol,
        rank-1 and mAP of the last epoch, a number for each seed; and the published ones, if any.
    """
    rows = []
    with join(choose_device(settings.device)) as world:
        for row in published_ablation():
            name = "+".join(key for key in SWITCHES if row[key]) or "baseline"
            scores: dict[str, dict[str, list[float]]] = {}
            for seed in seeds:
                one = _row_settings(settings, row, name, seed)
                done = one.output / "results.json"
                if settings.resume and done.exists():
                    results = json.loads(done.read_text())
                else:
                    results = reproduce(one, world)
                for protocol, entry in results["protocols"].items():
                    score = scores.setdefault(protocol, {"r1": [], "mAP": []})
                    for key, values in score.items():
                        values.append(entry["mean"][key])
            synthetic = settings.dataset == "synthetic"
            theirs = {p: row[p] for p in scores if p in row and not synthetic}
            switches = {key: row[key] for key in SWITCHES}
            rows.append({"name": name, **switches, "measured": scores, "published": theirs})
        out = {
            "dataset": settings.dataset,
            "model": settings.model,
            "recipe": settings.recipe.name,
            "epochs": settings.epochs,
            "seeds": list(seeds),
            "rows": rows,
        }
        if world.main:
            write_atomically(settings.output / "ablation.json", json.dumps(out, indent=2) + "\n")
            write_atomically(settings.output / "ablation.md", table(out) + "\n")
    return out


def _row_settings(settings: Settings, row: dict[str, Any], name: str, seed: int) -> Settings:
    recipe = replace(
        settings.recipe,
        cpm_weight=settings.recipe.cpm_weight * row["cpm"],
        ort_weight=settings.recipe.ort_weight * row["ort"],
    )
    output = settings.output / "ablation" / name / f"seed-{seed}"
    return replace(
        settings, output=output, recipe=recipe, seed=seed, dee=row["dee"], mfa=row["mfa"]
    )


def table(results: dict[str, Any]) -> str:
    """Markdown in the form of Table 4, per cent; mean ± standard deviation where seeds are many."""
    protocols = list(results["rows"][0]["measured"])
    head = [*TITLES, *(f"{p} {key}" for p in protocols for key in ("R-1", "mAP"))]
    lines = [head, ["---"] * 4 + ["---:"] * (len(head) - 4)]
    for row in results["rows"]:
        cells = ["x" if row[key] else "" for key in SWITCHES]
        for protocol in protocols:
            for key in ("r1", "mAP"):
                values = 100 * np.array(row["measured"][protocol][key])
                cell = f"{values.mean():.1f}"
                if len(values) > 1:
                    cell += f" ± {values.std(ddof=1):.1f}"
                if protocol in row["published"]:
                    cell += f" ({100 * row['published'][protocol][key]:.1f})"
                cells.append(cell)
        lines.append(cells)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    seeds = f"seeds {', '.join(map(str, results['seeds']))}"
    note = "; published in brackets" if any(row["published"] for row in results["rows"]) else ""
    spread = ", mean ± standard deviation over seeds" if len(results["seeds"]) > 1 else ""
    return f"{text}\n\n{results['model']}, {results['epochs']} epochs, {seeds}{spread}{note}."
